"""Model files -> policy, reference, critic and tokenizer, and back.

A path is a hub name, a directory of safetensors, or a directory with one GGUF file. All faults but
those in the weights' values are found before any weight is read.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from marlhf.common.errors import UserError, one_line
from marlhf.common.paths import local_path, special_kind, text_file
from marlhf.compat.transformers import zero_noise
from marlhf.config import LoraSettings, ModelSettings
from marlhf.models.adapters import add_adapter, grow, merged, save_adapter, saved_adapter
from marlhf.models.decoding import eos_token_ids
from marlhf.models.gate import check_adapter, check_finite, check_model
from marlhf.models.policy import Policy, backbone_forward, backbone_of, fix_rotary

# (frozen module, the part of it that every forward pass begins with) -> the module, placed
Shard = Callable[[Any, nn.Module], Any]
# transformers reports an unreadable one as missing
_MODEL_FILES = (".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".jinja", ".py")
_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


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
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "neither"
        final = folder / "final"
        hint = f"; did you mean {str(final)!r}?" if (final / "config.json").is_file() else ""
        raise UserError(
            f"{key}: directory {path!r} must hold a config.json or exactly one .gguf "
            f"file; found {found}{hint}"
        )
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{key}: reading {files[0].name} needs: pip install 'marlhf[gguf]'")
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": files[0].name}


def load_model_config(
    settings: ModelSettings, key: str = "model.path", weights: bool = True
) -> Any:
    """The model's configuration, with dropout and router jitter set to zero.

    Also checks that its weights exist and their files are complete, unless `weights` is false (they
    will not be needed). Raises UserError.
    """
    config = _from_pretrained(AutoConfig, settings, key)
    if weights:
        _check_files(Path(settings.path).expanduser(), key)
    for part in (config, config.get_text_config()):
        zero_noise(part)
    return config


def load_classifier_config(settings: ModelSettings, key: str, weights: bool = True) -> Any:
    """The configuration of a one-label model, as `load_model_config`. Raises UserError."""
    config = load_model_config(settings, key, weights)
    if config.num_labels != 1:
        kind = "".join(f"is a {n}, " for n in config.architectures or [] if "CausalLM" in n)
        raise UserError(
            f"{key}: {settings.path!r} {kind}has {config.num_labels} labels, must have 1 (a "
            "sequence classifier trained as a reward model)"
        )
    return config


def load_tokenizer(settings: ModelSettings, key: str = "model.path") -> Any:
    """The model's tokenizer. Raises UserError."""
    tokenizer = _from_pretrained(AutoTokenizer, settings, key, what="the tokenizer of ")
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    return tokenizer


def load_causal_lm(
    settings: ModelSettings, config: Any | None = None, key: str = "model.path"
) -> PreTrainedModel:
    """A causal LM with fp32 weights, whatever the checkpoint's dtype. Raises UserError."""
    config = config if config is not None else load_model_config(settings, key)
    model = _load_weights(AutoModelForCausalLM, settings, config, key)
    if "gguf_file" in model_source(settings.path, key):
        model = _without_quantization(model)
    return model


def load_policy(
    settings: ModelSettings, tokenizer: Any, config: Any, key: str, longest: int | None = None
) -> Policy:
    """A frozen policy, to sample from; `longest` as in `admit`.

    Raises UserError.
    """
    model = load_causal_lm(settings, config, key).requires_grad_(False).eval()
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
    positions = position_limit(model.config)
    longest = min((n for n in (longest, positions) if n is not None), default=None)
    if longest is not None:
        fix_rotary(model, longest)
    check_model(model, key, longest, samples)


def load_classifier(settings: ModelSettings, key: str, base: str | None = None) -> PreTrainedModel:
    """A one-label sequence classifier (a reward model) with fp32 weights.

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
        model = _load_weights(
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
    return _load_weights(AutoModelForSequenceClassification, settings, config, key)


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
        here = Path(settings.path).expanduser().exists()
        source = "" if here else ", which is no folder here, from the hub"
        given = f"{what}{settings.path!r}{source}"
        raise UserError(f"{key}: cannot load {given}: {one_line(error)}") from error


def _load_weights(
    auto: Any, settings: ModelSettings, config: Any, key: str, except_for: str = ""
) -> Any:
    """A model with fp32 weights, all from its files but `except_for`. Raises UserError."""
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
        for place in re.finditer(r"\.(\d+)\.", surplus):
            stack = surplus[: place.start()]
            names = [n for n in stacks if n == stack or n.endswith(f".{stack}")]
            layers = min((stacks[n] for n in names), default=None)
            if layers is not None and int(place[1]) >= layers + extra:
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


def as_loaded(model: Any, lora: LoraSettings | None, argument: str) -> Any:
    """Bring a model given as an object into a loaded one's state, in place.

    Without dropout or router jitter, and with fp32 weights unless they stay frozen under adapters.
    Raises UserError.
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
    return model if lora is not None else model.float()


def build_policy(
    settings: ModelSettings,
    tokenizer: Any,
    lm_config: Any,
    model: Any = None,
    shard: Shard = lambda module, backbone: module,
    longest: int | None = None,
    samples: bool = True,
) -> Policy:
    """The causal LM to train, with its adapter if it has one.

    model     used instead of loading one
    shard     places the frozen base of an adapter on the ranks
    longest   as in `admit`
    samples   whether the model will be sampled from

    Raises UserError, where possible before any weight is read.
    """
    check_tokenizer(tokenizer, lm_config)
    if model is None:
        check_architecture(lm_config, settings)
        lm = load_causal_lm(settings, lm_config)
    else:
        lm = as_loaded(model, settings.lora, "model")
    policy = Policy(lm, eos_ids=eos_token_ids(lm, tokenizer))
    admit(lm, longest, samples=samples)
    if settings.gradient_checkpointing:
        enable_checkpointing(lm)
    if settings.lora is not None:
        shard(policy, backbone_of(lm))
        policy.model = add_adapter(lm, settings.lora, "policy")
        policy.adapter = "policy"
        check_adapter(policy.model, samples)
    return policy


def check_tokenizer(tokenizer: Any, lm_config: Any, key: str = "model.path") -> None:
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


def reference_of(policy: Policy, shard: Shard = lambda module, backbone: module) -> Policy:
    """A frozen copy of the current policy; with LoRA, the shared base without adapter."""
    if hasattr(policy.model, "peft_config"):
        return Policy(policy.model, adapter=None, eos_ids=policy.eos_ids)
    reference = Policy(copy.deepcopy(policy.model), eos_ids=policy.eos_ids)
    return shard(reference.requires_grad_(False).eval(), backbone_of(reference.model))


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


def save_policy(policy: Policy, tokenizer: Any, folder: Path) -> None:
    """Write a plain `from_pretrained` directory; adapters are merged, and also saved alone."""
    model: Any = policy.model
    if hasattr(model, "peft_config"):
        assert policy.adapter is not None
        save_adapter(model, folder / "adapter", policy.adapter)
        model = copy.deepcopy(model)
        model.set_adapter(policy.adapter)  # merging takes modules_to_save of the active adapter
        model = model.merge_and_unload(adapter_names=[policy.adapter])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def position_limit(model_config: Any) -> int | None:
    """Maximum sequence length of the model in tokens, None without a limit."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def check_packing(policy: Policy) -> None:
    """Check that two examples packed in one row get the hidden states of each alone.

    Raises UserError for a family that does not keep them apart.
    """
    model: Any = policy.model
    lm = model.get_base_model() if policy.adapter else model
    ids = torch.arange(1, 8, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    parts = ids[:, :3], ids[:, 3:]
    positions = [torch.arange(part.shape[1], device=lm.device)[None] for part in parts]
    backbone, fault = backbone_of(lm), "does not keep examples in one row apart"
    try:
        apart = [
            backbone_forward(backbone, i, None, p) for i, p in zip(parts, positions, strict=True)
        ]
        together = backbone_forward(backbone, ids, None, torch.cat(positions, 1))
        if torch.allclose(together, torch.cat(apart, 1), rtol=1e-3, atol=1e-3):
            return
    except Exception as error:  # of the model's code
        fault = f"cannot read several examples in one row ({one_line(error)})"
    raise UserError(f"packing: given true, but {type(lm).__name__} {fault}; must be false")


def _without_quantization(model: Any) -> Any:
    """The same weights in a model without GGUF quantization config, which can be saved."""
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
