"""LoRA: one or more adapters on a shared frozen base."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from marlhf.common.deferred import make_values
from marlhf.common.errors import UserError, one_line
from marlhf.common.extras import require
from marlhf.config import LoraSettings
from marlhf.distributed import (
    QUANTIZATION_CONFIG,
    is_quantized,
    quantizable_layers,
    round_to_four_bits,
)
from marlhf.models.policy import backbone_of

_RESERVED_LORA_KEYS = {
    "r": "must be given as model.lora.r",
    "lora_alpha": "must be given as model.lora.alpha",
    "target_modules": "must be given as model.lora.target_modules",
    "bias": "must stay none: the reference is the base with the adapters off",
    "lora_dropout": "must stay 0: with dropout the ratio of new to old policy would be noise",
    "layer_replication": "cannot be given: it changes the base, which is the reference",
    "trainable_token_indices": "cannot be given: PEFT loses it when adapters are merged",
}
# keys whose values name modules
_OF_MODULES = {
    *("target_modules", "target_parameters", "exclude_modules", "modules_to_save"),
    *("rank_pattern", "alpha_pattern"),
}
_HEADS = {"score", "classifier"}  # PEFT saves these of every sequence classifier
# keys with which an adapter neither reads nor copies weights of the base's linear layers
_READ_NO_BASE = {
    *("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "use_rslora", "init_lora_weights", "fan_in_fan_out", "lora_bias"),
}
_QUANTIZATION_FILE = "quantization_config.json"


def add_adapter(model: Any, lora: LoraSettings, name: str, task: str = "CAUSAL_LM") -> Any:
    """Freeze a model and add a LoRA adapter, or one more to a PEFT model. Raises UserError."""
    from peft import get_peft_model

    is_first = not hasattr(model, "peft_config")
    trained_before = [] if is_first else [p for p in model.parameters() if p.requires_grad]
    try:
        config = _lora_config(lora, task)
        if is_first and task == "CAUSAL_LM":  # a classifier need not have all of the policy's
            _check_names(model, lora)
        if not is_first:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
        _check_merging(model.get_base_model(), config)
    except UserError:
        raise
    except Exception as error:  # peft's checks raise errors of any type
        raise UserError(f"model.lora: {one_line(error)}") from error
    model.set_adapter(name)  # freezes all others
    for parameter in trained_before:
        parameter.requires_grad_(True)
    return model


def _check_names(model: Any, lora: LoraSettings) -> None:
    """Check that each name and pattern of the configuration matches a module or parameter.

    PEFT ignores those that match nothing, as long as one module has an adapter. Raises UserError.
    """
    given = {"target_modules": lora.target_modules, **lora.extra}
    modules = dict(model.named_modules())
    parameters = [name for name, _ in model.named_parameters()]
    for key, value in given.items():
        is_regex = isinstance(value, str)  # over full names
        for entry in () if key not in _OF_MODULES else [value] if is_regex else value or ():
            pattern = entry if is_regex or key.endswith("pattern") else re.escape(entry)
            matches = re.compile(pattern if is_regex else rf"(.*\.)?({pattern})").fullmatch
            names = modules if key == "target_modules" else [*modules, *parameters]
            if entry == "all-linear" or any(map(matches, filter(None, names))):
                continue
            last = {name.rpartition(".")[2]: module for name, module in modules.items()}
            with_matrices = sorted(
                name
                for name, m in last.items()
                if getattr(getattr(m, "weight", None), "ndim", 0) > 1
            )
            possible = f"it has {', '.join(with_matrices)}"
            if is_regex and entry in last:
                possible = f"a text is a regex over full names, so give a list, [{entry}]"
            raise UserError(
                f"model.lora.{'' if key == 'target_modules' else 'extra.'}{key}: given {entry!r}, "
                f"which matches no module of {type(model).__name__}; {possible}"
            )


def _check_merging(base: Any, config: Any) -> None:
    """Check that the adapter can be merged. Raises UserError.

    An adapter with a bias needs layers with one. A weight shared by several layers cannot have an
    adapter, as merging would change them all.
    """
    from marlhf.compat.peft import AuxiliaryTrainingWrapper, BaseTunerLayer, is_lora

    modules = base.named_modules() if config.lora_bias else ()
    layers = [(n, m.get_base_layer()) for n, m in modules if is_lora(m)]
    for name, layer in layers:
        if getattr(layer, "bias", None) is None:
            raise UserError(f"model.lora.extra.lora_bias: given true, but {name} has no bias")
    head = base.get_output_embeddings()
    is_tied = getattr(base.config.get_text_config(), "tie_word_embeddings", False)
    for module in (head, base.get_input_embeddings()) if head is not None and is_tied else ():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise UserError(
                "model.lora: adapts the embeddings or the head, which are one weight in this model "
                "(tie_word_embeddings); take them out of target_modules and extra.modules_to_save"
            )
    check_shared(base, "model.lora")


def check_shared(base: Any, key: str) -> None:
    """Refuse adapters on a weight of several modules, such as Zamba's repeated blocks.

    Each module may have its own adapter, and one weight cannot merge several. Raises UserError.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners: dict[int, list[str]] = {}
    for name, module in base.named_modules():
        for weight in module.parameters(recurse=False):
            owners.setdefault(id(weight), []).append(name.removesuffix(".base_layer"))
    for module in (m for m in base.modules() if isinstance(m, BaseTunerLayer)):
        for weight in module.get_base_layer().parameters(recurse=False):
            if len(shared := owners[id(weight)]) > 1:
                raise UserError(
                    f"{key}: adapts a weight that {len(shared)} layers share, {shared[0]} and "
                    f"{shared[1]} among them; take them out of target_modules"
                )


def _lora_config(lora: LoraSettings, task: str) -> Any:
    from peft import LoraConfig

    for key in lora.extra:
        if (fault := key_fault(key)) is not None:
            raise UserError(f"model.lora.extra.{key}: {fault}")
    if lora.extra.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise UserError(
            f"model.lora.extra.init_lora_weights: given {lora.extra['init_lora_weights']!r}, must "
            "be true, false, gaussian or orthogonal: others change the base, which is the reference"
        )
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=lora.target_modules,
        lora_dropout=0.0,
        task_type=task,
        **lora.extra,
    )


def key_fault(key: str) -> str | None:
    """Why a key cannot be given in `model.lora.extra`; None if it can."""
    from peft import LoraConfig, PeftConfig

    if key in {field.name for field in fields(PeftConfig)}:
        return "is chosen by the library"
    allowed = {field.name for field in fields(LoraConfig)} - _RESERVED_LORA_KEYS.keys()
    if key in allowed:
        return None
    close = difflib.get_close_matches(key, allowed, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return _RESERVED_LORA_KEYS.get(key, f"peft.LoraConfig has no such key{hint}")


def check_reads_no_base(lora: LoraSettings, why: str, also: Collection[str] = ()) -> None:
    """Refuse keys with which an adapter reads or copies weights of the base. Raises UserError.

    why    it cannot, after "which is not supported"
    also   further keys that are allowed
    """
    from peft import LoraConfig

    plain = LoraConfig()
    for key, value in lora.extra.items():
        if key in _READ_NO_BASE or key in also or key_fault(key) is not None:
            continue  # a fault of a key is reported when the adapter is added
        if value != getattr(plain, key):
            raise UserError(
                f"model.lora.extra.{key}: given {value!r}, which is not supported {why}"
            )


def trainable_parameters(module: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """Parameters for an optimiser: all that require a gradient, or an adapter's and the head's."""
    return [
        parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        and (adapter is None or adapter in name.split(".") or name.startswith("head."))
    ]


def saved_adapter(folder: Path | str) -> Any | None:
    """The PEFT configuration in an adapter's folder; None for other folders. Raises UserError."""
    if not (Path(folder).expanduser() / "adapter_config.json").is_file():
        return None
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(Path(folder).expanduser()))
    except Exception as error:  # of json, of peft's checks
        raise UserError(f"cannot read the adapter {str(folder)!r}: {one_line(error)}") from error


def is_adapter_of(folder: Path | str, base: str) -> bool:
    """Whether a folder holds an adapter on `base` that can share the base with others.

    The adapter must have been trained on the model in `base`, and change none of its weights.
    """
    config = saved_adapter(folder)
    if config is None or not config.base_model_name_or_path:
        return False
    if {*(config.modules_to_save or ())} - _HEADS or config.trainable_token_indices:
        return False
    trained_on = config.base_model_name_or_path
    return (
        trained_on == base
        or Path(trained_on).expanduser().resolve() == Path(base).expanduser().resolve()
    )


def save_adapter(model: Any, folder: Path, name: str) -> None:
    """Write an adapter of a PEFT model, with the same bytes in every process.

    Beside that of a quantised base stands how the base was quantised, for merging.
    """
    for key, value in list(vars(model.peft_config[name]).items()):
        if isinstance(value, set):  # order of iteration differs per process
            setattr(model.peft_config[name], key, sorted(value))
    model.save_pretrained(folder, selected_adapters=[name])
    if is_quantized(model):
        text = json.dumps(QUANTIZATION_CONFIG, indent=2) + "\n"
        (folder / name / _QUANTIZATION_FILE).write_text(text, encoding="utf-8")


def attach(model: Any, folder: Path | str, name: str) -> Tensor | None:
    """Add a saved adapter to a PEFT model on the same base, ready for training.

    Returns the weight of its scalar head `[1,H]`, None without one. Raises UserError.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    from marlhf.compat.peft import CLASSIFIER_HEAD

    config = saved_adapter(folder)
    assert config is not None
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
    trained_before = [p for p in model.parameters() if p.requires_grad]
    try:
        weights = load_peft_weights(str(Path(folder).expanduser()), device="cpu")
        head = weights.pop(CLASSIFIER_HEAD, None)
        _drop_embeddings(weights, model.get_base_model(), folder)
        model.add_adapter(name, config)
        loaded = set_peft_model_state_dict(model, weights, adapter_name=name)
    except Exception as error:
        raise UserError(f"cannot read the adapter {str(folder)!r}: {one_line(error)}") from error
    if loaded.unexpected_keys:
        raise UserError(
            f"the adapter {str(folder)!r} does not fit the base: it has {loaded.unexpected_keys[0]}"
        )
    model.set_adapter(name)
    for parameter in trained_before:
        parameter.requires_grad_(True)
    return head


def is_of_quantized_base(folder: Path | str) -> bool:
    """Whether an adapter was trained on a base in 4 bits."""
    return (Path(folder).expanduser() / _QUANTIZATION_FILE).is_file()


def merged(model: Any, folder: Path | str) -> Any:
    """Merge a saved adapter into a model's weights, in place, in fp32.

    Where it was trained on a base in 4 bits, these are the weights of that base: only with them is
    the sum the model that was trained. Raises UserError.
    """
    from peft import PeftModel, load_peft_weights

    config: Any = saved_adapter(folder)
    if config.trainable_token_indices:
        raise UserError(
            f"the adapter {str(folder)!r} has trainable_token_indices, which PEFT loses when it "
            "merges; train it with modules_to_save instead"
        )
    make_values(model)
    try:
        weights = load_peft_weights(str(Path(folder).expanduser()), device="cpu")
        sizes = [len(weights[name]) for name in _embeddings(model) if name in weights]
        if sizes and sizes[0] != model.get_input_embeddings().weight.shape[0]:
            grow(model, sizes[0])
        if is_of_quantized_base(folder):
            require("bitsandbytes", "quantization")
            round_to_four_bits(quantizable_layers(backbone_of(model)).values())
        adapted = PeftModel.from_pretrained(model.float(), str(Path(folder).expanduser()))
        check_shared(adapted.get_base_model(), f"the adapter {str(folder)!r}")
        return adapted.merge_and_unload()
    except UserError:
        raise
    except Exception as error:  # of peft, of safetensors
        raise UserError(f"cannot read the adapter {str(folder)!r}: {one_line(error)}") from error


@torch.no_grad()
def grow(model: Any, size: int) -> None:
    """Resize a model's embeddings and head to `size` tokens; new rows are zeros."""
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(size, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None and size > old:
            module.weight[old:].zero_()


def _embeddings(model: Any) -> list[str]:
    """PEFT's names of the embeddings and the language-model head in an adapter's weights."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [
        f"base_model.model.{name}.weight"
        for name, module in model.named_modules()
        if any(module is embedding for embedding in modules if embedding is not None)
    ]


def _drop_embeddings(weights: dict[str, Tensor], base: Any, folder: Path | str) -> None:
    """Drop embeddings that PEFT saved only because their number had changed in training.

    Embeddings of the base's tokens equal the base's; those of new tokens are never used with it.
    Raises UserError if they were trained.
    """
    for name in _embeddings(base):
        saved = weights.pop(name, None)
        base_weight = base.get_parameter(name.removeprefix("base_model.model."))
        if saved is not None and not torch.allclose(
            saved[: len(base_weight)].to(base_weight), base_weight, atol=1e-2
        ):
            raise UserError(
                f"the adapter {str(folder)!r} has embeddings of its own, and cannot share the base"
            )
