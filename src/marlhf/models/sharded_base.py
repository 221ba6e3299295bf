"""Checks that LoRA adapters train correctly on a base sharded by ZeRO-3.

PEFT's plain layers add a product to the output of the base's layer. Its other layers read or copy
weights of the base, which are gathered on a rank only during that layer's pass. The keys and layers
allowed below were compared with one process; all others are refused before any weight is read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from marlhf.common.errors import UserError
from marlhf.config import ModelSettings, PPOConfig
from marlhf.models import building
from marlhf.models.adapters import add_adapter, check_reads_no_base, saved_adapter
from marlhf.models.loading import load_classifier_config

_HEAD = "score"  # of a classifier: replicated on every rank
_ELSEWHERE = "the profiles single, ddp, zero1 and zero2 do not shard the base"


def check_adapters(settings: ModelSettings, model_config: Any) -> None:
    """Check the adapter that a job trains, if any, for a sharded base. Raises UserError."""
    if settings.lora is None:
        return
    check_reads_no_base(settings.lora, f"under ZeRO-3: there the base is sharded; {_ELSEWHERE}")
    is_classifier = any(n.endswith("Classification") for n in model_config.architectures or ())
    model = _without_weights(settings, model_config, is_classifier)
    if model is None:
        return
    task = "SEQ_CLS" if is_classifier else "CAUSAL_LM"
    model = add_adapter(model, settings.lora, "policy", task)
    unsupported, supported = _layers(model)
    if unsupported:
        targets = settings.lora.target_modules
        instead = f"; or give target_modules: [{', '.join(supported)}]" if supported else ""
        raise UserError(
            f"model.lora.target_modules: given {targets!r}, which adapts {unsupported}; under "
            f"ZeRO-3 that is not supported, as the base is sharded; {_ELSEWHERE}{instead}"
        )


def check_ppo_adapters(
    config: PPOConfig,
    lm_config: Any,
    reward_paths: Sequence[str],
    start: building.CriticStart | None = None,
    critic: Any = None,
) -> None:
    """Check the adapters of policy, critic and reward models for sharded bases.

    start    initialisation of the critic; default: as configured
    critic   a model to start the critic from, instead of one in `config`
    Raises UserError.
    """
    if config.model.lora is None:
        return
    check_adapters(config.model, lm_config)
    if start is None:
        first = next(iter(reward_paths), None)
        start = building.critic_start(config, lm_config, None, first, critic=critic)
    if critic is not None:
        check_adapters(config.model, critic.config)
    elif start.source is not None:
        check_adapters(start.source, load_classifier_config(start.source, "critic.path"))
    for path in {*reward_paths, start.adapter} - {None}:
        if building.is_adapter_of(path, config.model.path):
            _check_saved(path, config.model, lm_config)


def _check_saved(folder: str, settings: ModelSettings, lm_config: Any) -> None:
    """Check a saved adapter for the policy's sharded base. Raises UserError."""
    from peft import get_peft_model

    adapter = saved_adapter(folder)
    model = _without_weights(settings, lm_config, is_classifier=False)
    if adapter is None or model is None:
        return
    adapter.task_type, adapter.modules_to_save = "CAUSAL_LM", None  # as `attach` reads it
    unsupported, _ = _layers(get_peft_model(model, adapter))
    if unsupported:
        raise UserError(
            f"the adapter {folder!r}: adapts {unsupported}; under ZeRO-3 that is not supported, as "
            f"the base is sharded; {_ELSEWHERE}"
        )


def _without_weights(settings: ModelSettings, config: Any, is_classifier: bool) -> Any:
    """A model on the meta device; None for one that `loading` will refuse."""
    auto: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return auto.from_config(
                copy.deepcopy(config), trust_remote_code=settings.trust_remote_code
            )
    except Exception:
        return None


def _layers(model: Any) -> tuple[str | None, list[str]]:
    """The first unsupported part, in words, or None; and the supported modules' names.

    PEFT's plain linear and embedding layers are supported.
    """
    from peft.tuners.lora import Embedding, Linear

    from marlhf.compat.peft import AuxiliaryTrainingWrapper, BaseTunerLayer, is_fused, is_variant

    unsupported, supported = None, set()
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, nn.ModuleList) and name.endswith("experts"):
            # a rank that skips an expert would miss its gather and hang the others
            unsupported = unsupported or f"a model whose experts are separate modules, {name}"
        if not isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper) or name == _HEAD:
            continue
        if isinstance(layer, Linear | Embedding) and not is_variant(layer):
            supported.add(name.rpartition(".")[2])
        elif unsupported is None:
            kind = (
                "the fused experts"
                if is_fused(layer) and name.endswith("experts")
                else f"by PEFT's {type(layer).__name__} the module"
            )
            unsupported = f"{kind} {name}"
    return unsupported, sorted(supported)
