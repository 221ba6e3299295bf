"""Model files -> policy, reference, critic and tokenizer.

A path is a hub name, a directory of safetensors, or a directory with one GGUF file. Every fault but
one in the weights' values is reported before any weight is read.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from marlhf.common.deferred import deferred
from marlhf.common.errors import UserError, one_line
from marlhf.common.memory_errors import doing
from marlhf.common.paths import local_path, special_kind, text_file
from marlhf.common.tokenization import Tokenizer
from marlhf.compat.transformers import file_dtypes, fix_rotary, zero_noise
from marlhf.config import ModelSettings
from marlhf.distributed import ALONE, Placement
from marlhf.distributed.placement import Use
from marlhf.models.adapters import (
    add_adapter,
    grow,
    merged,
    saved_adapter,
)
from marlhf.models.decoding import eos_token_ids
from marlhf.models.gate import (
    check_adapter,
    check_finite,
    check_model,
)
from marlhf.models.policy import Policy, backbone_of, score_offset
from marlhf.models.quantized_base import check_quantization

# an unreadable one is reported here, as transformers would call it missing
_MODEL_FILES = (".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".jinja", ".py")
_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_MOST_LAYERS = 500  # no model has more


def model_source(path: str, key: str) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for a model path.

    Raises UserError, naming the configuration `key`, when a local path holds no model.
    """
    folder = local_path(path, key)
    if not folder.exists():
        if not _HUB_NAME.match(path) or path.startswith("."):
            raise UserError(
                f"{key}: given {path!r}, which does not exist; must be a directory with "
                "a model, or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct"
            )
        return {"pretrained_model_name_or_path": path}
    if not folder.is_dir():
        kind = special_kind(folder) or "a file"
        raise UserError(f"{key}: given {path!r}, which is {kind}; must be the model's directory")
    for file in folder.iterdir():
        if file.suffix in _MODEL_FILES:
            text_file(file, key)
    if (folder / "config.json").is_file():
        return {"pretrained_model_name_or_path": str(folder)}
    files = sorted(folder.glob("*.gguf"))
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{key}: directory {path!r} holds an adapter alone; must hold a complete model, which "
            f"`marlhf merge {path} OUT` writes"
        )
    if len(files) != 1:
        names = ", ".join(f.name for f in files) or "neither"
        final = folder / "final"
        hint = f"; did you mean {str(final)!r}?" if (final / "config.json").is_file() else ""
        raise UserError(
            f"{key}: directory {path!r} must hold a config.json or exactly one .gguf "
            f"file; found {names}{hint}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{key}: reading {files[0].name} needs: pip install 'marlhf[gguf]'")
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": files[0].name}


def load_model_config(
    settings: ModelSettings, key: str = "model.path", weights: bool = True
) -> Any:
    """The model's configuration, with dropout and router jitter set to zero.

    Checks that the weights exist and their files are complete, unless `weights` is false because
    they will not be read. Raises UserError.
    """
    attention = {} if settings.attention is None else {"attn_implementation": settings.attention}
    config = _from_pretrained(AutoConfig, settings, key, **attention)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if isinstance(layers, int) and not 1 <= layers <= _MOST_LAYERS:
        raise UserError(
            f"{key}: the config.json of {settings.path!r} says {layers} layers, must be 1 to "
            f"{_MOST_LAYERS}"
        )
    if attention:
        _check_attention(config, settings)
    if settings.quantization is not None:
        is_gguf = "gguf_file" in model_source(settings.path, key)
        check_quantization(config, settings, is_gguf, computes=weights)
    if weights:
        _check_files(Path(settings.path).expanduser(), key)
    for part in (config, config.get_text_config()):
        zero_noise(part)
    return config


def _check_attention(config: Any, settings: ModelSettings) -> None:
    """Check that the attention can be had here, for this model. Raises UserError."""
    try:
        with torch.device("meta"):
            AutoModel.from_config(config, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # a package or device is missing, a family has no such attention
        raise UserError(
            f"model.attention: given {settings.attention!r}, which {settings.path!r} cannot have "
            f"here: {one_line(error)}"
        ) from error


def load_classifier_config(settings: ModelSettings, key: str, weights: bool = True) -> Any:
    """As `load_model_config`, for a classifier with one label. Raises UserError."""
    config = load_model_config(settings, key, weights)
    if config.num_labels != 1:
        kind = "".join(f"is a {n}, " for n in config.architectures or [] if "CausalLM" in n)
        raise UserError(
            f"{key}: {settings.path!r} {kind}has {config.num_labels} labels, must have 1 (a "
            "sequence classifier trained as a reward model)"
        )
    score_offset(config, key)
    return config


def load_tokenizer(settings: ModelSettings, key: str = "model.path") -> Tokenizer:
    """The model's tokenizer. Raises UserError."""
    tokenizer = _from_pretrained(AutoTokenizer, settings, key, what="the tokenizer of ")
    try:
        tokenizer("a")
    except Exception as error:  # of any type: loading does not check what the files hold
        raise UserError(
            f"{key}: the tokenizer of {settings.path!r} encodes no text: {one_line(error)}"
        ) from None
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    return tokenizer


def load_causal_lm(
    settings: ModelSettings,
    config: Any | None = None,
    key: str = "model.path",
    placement: Placement = ALONE,
    use: Use = "trained",
) -> PreTrainedModel:
    """A causal LM in the dtypes of `Placement`, whatever the checkpoint's. Raises UserError."""
    config = config if config is not None else load_model_config(settings, key)
    lm = placement.read(lambda: read_causal_lm(settings, config, key))
    quantized = settings.quantization is not None
    return placement.place(lm, backbone_of(lm), use, quantized=quantized)


def read_causal_lm(
    settings: ModelSettings, config: Any, key: str = "model.path"
) -> PreTrainedModel:
    """A causal LM as its files hold it, for `Placement.place`. Raises UserError."""
    model = _read_weights(AutoModelForCausalLM, settings, config, key)
    if "gguf_file" in model_source(settings.path, key):
        model = _without_quantization(model)
    return model


@doing("loading")
def load_policy(
    settings: ModelSettings,
    tokenizer: Tokenizer,
    config: Any,
    key: str,
    longest: int | None = None,
    placement: Placement = ALONE,
) -> Policy:
    """A frozen policy, to sample from; `longest` as in `admit`.

    Raises UserError.
    """
    model = load_causal_lm(settings, config, key, placement, "frozen").requires_grad_(False).eval()
    eos_ids = eos_token_ids(model, tokenizer, key)
    admit(model, longest, key)
    return Policy(model, eos_ids=eos_ids)


def admit(
    model: Any, longest: int | None = None, key: str = "model.path", samples: bool = True
) -> None:
    """Fix a model's rotary factors and check the model; other arguments as in `check_model`.

    longest   tokens of the run's longest sequence, None for the model's limit

    Raises UserError for a family that the library does not compute exactly.
    """
    check_model(model, key, fix_positions(model, longest), samples)


def fix_positions(model: Any, longest: int | None) -> int | None:
    """Fix rotary factors for the longest sequence; return its length where that is limited."""
    limits = (longest, position_limit(model.config))
    longest = min((n for n in limits if n is not None), default=None)
    if longest is not None:
        fix_rotary(model, longest)
    return longest


def read_classifier(settings: ModelSettings, key: str, base: str | None = None) -> PreTrainedModel:
    """A one-label sequence classifier as its files hold it, for `Placement.place`.

    An adapter is merged into `base`, by default the base that it names. Raises UserError.
    """
    config = load_classifier_config(settings, key)
    adapter = saved_adapter(settings.path)
    if adapter is not None:
        path = base or adapter.base_model_name_or_path
        if not path:
            raise UserError(f"{key}: the adapter {settings.path!r} does not name its base")
        of_base = replace(settings, path=path, revision=None)
        base_key = "base" if base else f"{key}: the adapter's base"
        model = _read_weights(
            AutoModelForSequenceClassification,
            of_base,
            _as_large_as(load_model_config(of_base, base_key), config),
            base_key,
            except_for="score.weight",
        )
        model = merged(model, settings.path)
        if model.config.get_text_config().vocab_size < config.get_text_config().vocab_size:
            grow(model, config.get_text_config().vocab_size)
        model.config = config
        return model.requires_grad_(True)  # PEFT froze the base
    return _read_weights(AutoModelForSequenceClassification, settings, config, key)


def _as_large_as(base: Any, config: Any) -> Any:
    """A copy of `config` with the vocabulary size of `base`."""
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        part.vocab_size = base.get_text_config().vocab_size
        part.pad_token_id = None  # may lie beyond the base's tokens, and does not affect weights
    return config


def _from_pretrained(
    auto: Any, settings: ModelSettings, key: str, what: str = "", **arguments: Any
) -> Any:
    """Call `auto.from_pretrained` on a model path. Raises any error as a one-line UserError."""
    source = model_source(settings.path, key)
    if settings.revision is not None and Path(settings.path).expanduser().exists():
        raise UserError(
            f"model.revision: given {settings.revision!r}, but {settings.path!r} is local and has "
            "no revisions"
        )
    try:
        return auto.from_pretrained(
            **source,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            **arguments,
        )
    except Exception as error:  # from transformers, safetensors, the hub, or a model's own code
        is_local = Path(settings.path).expanduser().exists()
        source = "" if is_local else ", which is no folder here, from the hub"
        described = f"{what}{settings.path!r}{source}"
        raise UserError(f"{key}: cannot load {described}: {one_line(error)}") from error


def _read_weights(
    auto: Any, settings: ModelSettings, config: Any, key: str, except_for: str = ""
) -> Any:
    """A model with its files' weights, but for `except_for`. Raises UserError."""
    # what dequantises computes, and may not in the dtype of a file
    moves = "gguf_file" not in model_source(settings.path, key)
    moves = moves and getattr(config, "quantization_config", None) is None
    with file_dtypes(deferred if moves else None):
        model, report = _from_pretrained(
            auto,
            settings,
            key,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported instead: no weight stays random
        )
    missing = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if set(missing) - {except_for}:
        raise UserError(
            f"{key}: the weights in {settings.path!r} do not make a {type(model).__name__} as its "
            f"config.json describes it: {len(missing)} are missing or of another shape, "
            f"{missing[0]} among them"
        )
    _check_surplus(model, report["unexpected_keys"], settings, key)
    check_finite(model, key)
    return model


def _check_surplus(model: Any, keys: Collection[str], settings: ModelSettings, key: str) -> None:
    """Refuse files with more layers than the model, multi-token prediction layers excepted.

    Raises UserError.
    """
    text = model.config.get_text_config()
    extra = getattr(text, "num_nextn_predict_layers", None) or 0
    stacks = {n: len(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    for surplus in sorted(keys):
        for number in re.finditer(r"\.(\d+)\.", surplus):
            stack = surplus[: number.start()]
            names = [n for n in stacks if n == stack or n.endswith(f".{stack}")]
            layers = min((stacks[n] for n in names), default=None)
            if layers is not None and int(number[1]) >= layers + extra:
                raise UserError(
                    f"{key}: the weights in {settings.path!r} have more layers than its "
                    f"config.json, which says {layers}: {surplus} is not among them"
                )


def _check_files(folder: Path, key: str) -> None:
    """Check that a local model has weights and no truncated safetensors. Raises UserError."""
    if not folder.is_dir():
        return
    if not any(file.suffix in (".safetensors", ".bin", ".gguf") for file in folder.iterdir()):
        raise UserError(f"{key}: directory {str(folder)!r} has a config.json but no weights")
    file = folder
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt"):
                pass
    except Exception as error:  # safetensors has its own exception type
        raise UserError(f"{key}: cannot read {str(file)!r}: {one_line(error)}") from error


def as_loaded(model: Any, argument: str) -> Any:
    """Prepare a model object in place, as loading prepares one from files.

    Sets dropout and router jitter to zero. Raises UserError, also for weights that are not finite.
    """
    if hasattr(model, "peft_config"):
        raise UserError(
            f"{argument}: given a PEFT model; must be a plain one, with its adapter in model.lora"
        )
    try:  # as `save_pretrained` will, only after training
        if model.can_generate():
            model.generation_config.validate(strict=True)
    except ValueError as error:
        raise UserError(f"{argument}: its generation_config: {one_line(error)}") from error
    for part in (model.config, model.config.get_text_config(), *model.modules()):
        zero_noise(part)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    check_finite(model, argument)
    return model


def config_of(settings: ModelSettings, model: Any = None) -> Any:
    """Configuration of a model given as an object, or of the one in files. Raises UserError."""
    if model is None:
        return load_model_config(settings)
    check_quantization(model.config, settings)
    return model.config


def place_object(model: Any, settings: ModelSettings, argument: str, placement: Placement) -> Any:
    """Place a model given as an object: the first rank's, on all.

    Weights get fp32, unless they stay frozen under adapters. Raises UserError.
    """
    model = placement.read(lambda: as_loaded(model, argument))
    as_given, quantized = settings.lora is not None, settings.quantization is not None
    return placement.place(model, backbone_of(model), as_given=as_given, quantized=quantized)


@doing("loading")
def build_policy(
    settings: ModelSettings,
    tokenizer: Tokenizer,
    lm_config: Any,
    model: Any = None,
    placement: Placement = ALONE,
    longest: int | None = None,
    samples: bool = True,
) -> Policy:
    """The causal LM to train, with its adapter if it has one.

    model       used instead of loading one
    placement   where it lives
    longest     as in `admit`
    samples     whether the model will be sampled from

    Raises UserError, where possible before any weight is read.
    """
    check_tokenizer(tokenizer, lm_config)
    if model is None:
        check_architecture(lm_config, settings)
        use = "trained" if settings.lora is None else "base"
        lm = load_causal_lm(settings, lm_config, placement=placement, use=use)
    else:
        lm = place_object(model, settings, "model", placement)
    policy = Policy(lm, eos_ids=eos_token_ids(lm, tokenizer))
    admit(lm, longest, samples=samples)
    if settings.gradient_checkpointing:
        enable_checkpointing(lm)
    if settings.lora is not None:
        policy.model = add_adapter(lm, settings.lora, "policy")
        policy.adapter = "policy"
        check_adapter(policy.model, samples)
    return policy


def check_tokenizer(tokenizer: Tokenizer, lm_config: Any, key: str = "model.path") -> None:
    """Check that the model has every token of the tokenizer. Raises UserError."""
    vocabulary = lm_config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise UserError(f"{key}: the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}")


def check_architecture(lm_config: Any, settings: ModelSettings, key: str = "model.path") -> None:
    """Check that a configuration makes a causal LM that takes the adapters. Raises UserError."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                lm_config, trust_remote_code=settings.trust_remote_code
            )
    except Exception as error:
        fault = f"is no causal language model: {one_line(error)}"
        raise UserError(f"{key}: {settings.path!r} {fault}") from error
    if settings.lora is not None:
        add_adapter(model, settings.lora, "policy")


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass (works in `train()` mode only).

    Raises UserError for a family that does not support it.
    """
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"model.gradient_checkpointing: given true, must be false: {one_line(error)}"
        ) from error


def position_limit(model_config: Any) -> int | None:
    """Maximum sequence length of the model in tokens, None without a limit."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def _without_quantization(model: Any) -> Any:
    """The same weights in a model without GGUF quantization config, to be saved."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        clean = AutoModelForCausalLM.from_config(config)
    clean.load_state_dict(model.state_dict(), assign=True)
    clean.tie_weights()
    # buffers outside the state dict (rotary frequencies) come from the loaded model
    loaded = dict(model.named_buffers())
    for name, buffer in list(clean.named_buffers()):
        if buffer.is_meta:
            owner = clean.get_submodule(name.rpartition(".")[0])
            owner.register_buffer(name.rpartition(".")[2], loaded[name], persistent=False)
    clean.generation_config = model.generation_config
    return clean.eval()
