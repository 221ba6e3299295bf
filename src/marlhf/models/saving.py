"""Trained models -> plain `from_pretrained` directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from marlhf.common.memory_errors import doing
from marlhf.common.tokenization import Tokenizer
from marlhf.config import ModelSettings
from marlhf.distributed import plain_copy, replaced_parameters
from marlhf.models.adapters import save_adapter
from marlhf.models.policy import Policy


def final_dtype(settings: ModelSettings, model_config: Any) -> torch.dtype:
    """Dtype of the weights in `final/`."""
    of_checkpoint = getattr(model_config, "dtype", None) or torch.float32
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "checkpoint": of_checkpoint}
    return dtypes[settings.final_dtype]


def save_model(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a model's weights and configuration, in a dtype; the model stays as it is."""
    cast = {
        p: nn.Parameter(p.detach().to("cpu", dtype), requires_grad=False)
        for p in model.parameters()
        if p.is_floating_point() and p.dtype != dtype
    }
    with replaced_parameters(model.modules(), cast):
        model.save_pretrained(folder)


def convert(model: Any, dtype: torch.dtype) -> Any:
    """The model with floating-point parameters in a dtype, converted in place one at a time."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


@doing("saving")
def save_policy(
    policy: Policy, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write a plain `from_pretrained` directory; adapters are merged, and also saved alone."""
    model: Any = policy.model
    if hasattr(model, "peft_config"):
        assert policy.adapter is not None
        save_adapter(model, folder / "adapter", policy.adapter)
        model = plain_copy(model)
        model.set_adapter(policy.adapter)  # merging takes modules_to_save of the active adapter
        model = convert(model.merge_and_unload(adapter_names=[policy.adapter]), dtype)
    save_model(model, folder, dtype)
    tokenizer.save_pretrained(folder)
