"""LoRA: adapters on a frozen base, several of which may share it."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from torch import nn

from marlhf.config import LoraSettings
from marlhf.errors import UserError, one_line

_OWN_LORA_KEYS = {
    "r": "must be given as model.lora.r",
    "lora_alpha": "must be given as model.lora.alpha",
    "target_modules": "must be given as model.lora.target_modules",
    "task_type": "is chosen by the library",
    "lora_dropout": "must stay 0: with dropout the ratio of new to old policy would be noise",
}


def add_adapter(model: Any, lora: LoraSettings, name: str, task: str = "CAUSAL_LM") -> Any:
    """Freeze a model and add a LoRA adapter; a PEFT model gets one more. Raises UserError."""
    from peft import get_peft_model

    is_first = not hasattr(model, "peft_config")
    trained_before = [] if is_first else [p for p in model.parameters() if p.requires_grad]
    try:
        config = _lora_config(lora, task)
        if not is_first:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    except UserError:
        raise
    except Exception as error:  # peft raises whatever its checks come to
        raise UserError(f"model.lora: {one_line(error)}") from error
    model.set_adapter(name)  # which freezes all others
    for parameter in trained_before:
        parameter.requires_grad_(True)
    return model


def _lora_config(lora: LoraSettings, task: str) -> Any:
    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig)} - _OWN_LORA_KEYS.keys()
    for key in lora.extra.keys() - known:
        close = difflib.get_close_matches(key, known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        fault = _OWN_LORA_KEYS.get(key, f"peft.LoraConfig has no such key{hint}")
        raise UserError(f"model.lora.extra.{key}: {fault}")
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=lora.target_modules,
        lora_dropout=0.0,
        task_type=task,
        **lora.extra,
    )


def trainable_parameters(module: nn.Module, adapter: str | None = None) -> list[nn.Parameter]:
    """What an optimiser should hold: all that requires a gradient, or one adapter and the head."""
    return [
        parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        and (adapter is None or f".{adapter}." in name or name.startswith("head."))
    ]
