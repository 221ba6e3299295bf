"""Reward models for training: one-label sequence classifiers, made from causal LMs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
)

from marlhf.common.errors import UserError, one_line
from marlhf.common.memory_errors import doing
from marlhf.common.tokenization import Tokenizer
from marlhf.config import ModelSettings
from marlhf.distributed import ALONE, Placement, plain_copy
from marlhf.models.adapters import grow, save_adapter
from marlhf.models.gate import check_adapter
from marlhf.models.loading import (
    add_adapter,
    admit,
    check_architecture,
    enable_checkpointing,
    read_causal_lm,
    read_classifier,
)
from marlhf.models.policy import backbone_of, hidden_width, length_switch
from marlhf.models.saving import convert, save_model


@doing("loading")
def build_classifier(
    settings: ModelSettings,
    base_config: Any,
    tokenizer: Tokenizer,
    placement: Placement = ALONE,
    longest: int | None = None,
) -> Any:
    """Load or make a one-label sequence classifier to train, in PEFT with LoRA.

    `settings.path` has a reward model, or a causal LM, which gets a new scalar head, initialised
    with std (H + 1)^-1/2. `placement` is where it lives; `longest` is as in `admit`. Raises
    UserError.
    """
    switch = length_switch(base_config)
    if switch is not None and longest is not None and longest > switch:
        raise UserError(
            f"max_length: given {longest}, but {settings.path!r} has other rotary factors for "
            f"texts of more than {switch} tokens; must be at most {switch}"
        )
    is_lm = not any(n.endswith("Classification") for n in base_config.architectures or ())
    if is_lm:
        check_architecture(base_config, settings)
        _without_weights(base_config)

    def read() -> Any:
        if is_lm:
            model: Any = _with_scalar_head(read_causal_lm(settings, base_config))
        else:
            model = read_classifier(settings, "model.path")
        _check_head(model)
        if settings.lora is None:
            _pad(model, tokenizer)
        return model

    model = placement.read(read)
    if settings.lora is not None:
        placement.place(model.score)  # trained, and complete on every rank
        backbone, quantized = backbone_of(model), settings.quantization is not None
        placement.place(backbone, backbone, "base", quantized=quantized)
    else:
        placement.place(model, backbone_of(model))
    admit(model, longest, samples=False)
    if settings.gradient_checkpointing:
        enable_checkpointing(model)
    if settings.lora is None:
        return model
    model = add_adapter(model, settings.lora, "reward", "SEQ_CLS")
    check_adapter(model)
    return model


def _with_scalar_head(lm: Any) -> Any:
    """A sequence classifier around a causal LM's backbone."""
    model = _without_weights(lm.config)
    setattr(model, model.base_model_prefix, backbone_of(lm))
    hidden_size = hidden_width(lm)
    model.score = nn.Linear(hidden_size, 1, bias=False)
    # the scale of Stiennon et al. 2020 (arXiv 2009.01325)
    nn.init.normal_(model.score.weight, std=(hidden_size + 1) ** -0.5)
    return model


def _without_weights(lm_config: Any) -> Any:
    """The sequence classifier of a causal LM's family, on the meta device. Raises UserError."""
    config = copy.deepcopy(lm_config)
    config.num_labels, config.architectures = 1, None
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"model.path: its family, {config.model_type}, has no sequence classifier in "
            "transformers, and so no reward model; choose a base of another family"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(f"model.path: {one_line(error)}") from error
    _check_head(model)  # an encoder has another
    return model


def _check_head(model: Any) -> None:
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise UserError(
            f"model.path: {type(model).__name__} has no linear `score` head; must be decoder-only"
        )


def _pad(model: Any, tokenizer: Tokenizer) -> None:
    """Set the pad token, so that stock transformers finds the last non-pad token.

    A pad token beyond the embeddings gets a zero embedding, which has no effect.
    """
    embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embeddings:
        grow(model, len(tokenizer))
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


@doing("saving")
def save_classifier(
    model: Any,
    tokenizer: Tokenizer,
    offset: float,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a plain `from_pretrained` directory of a sequence classifier.

    Scores minus `config.score_offset` are centred. An adapter is merged, and also saved alone in
    `adapter/reward`, as a reward model on its base. The config.json there has the vocabulary size
    to which the base must grow.
    """
    model.config.score_offset = offset
    if hasattr(model, "peft_config"):
        # before growing, so that no embeddings are saved
        save_adapter(model, folder / "adapter", "reward")
        model = convert(plain_copy(model).merge_and_unload(), dtype)
        _pad(model, tokenizer)
        model.config.save_pretrained(folder / "adapter" / "reward")
        tokenizer.save_pretrained(folder / "adapter" / "reward")
    save_model(model, folder, dtype)
    tokenizer.save_pretrained(folder)
