"""A policy's weights for an engine: complete, adapters merged, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.compat.deepspeed import gathered_parameter
from marlhf.compat.peft import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    merges,
    weight_update,
)
from marlhf.compat.transformers import as_in_files
from marlhf.distributed import QuantizedLinear
from marlhf.models.policy import Policy, unwrapped


def policy_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Yield `(name, weight)` of a policy, as they would be in `final/`; tied ones once.

    A tensor is only valid until the next one. Under ZeRO-3 every step is a collective, and must be
    taken on all ranks.
    Raises UserError for adapters that are more than low-rank updates of linear layers.
    """
    lm = unwrapped(policy.model)
    adapted = dict(_adapted(lm, policy.adapter))
    for name, parameter in lm.named_parameters():
        module_name, _, weight_name = name.rpartition(".")
        module_name = module_name.removesuffix(".base_layer")
        if any(part.startswith("lora_") for part in name.split(".")):
            continue
        with torch.no_grad(), gathered_parameter(parameter):
            weight, layer = parameter.detach(), lm.get_submodule(name.rpartition(".")[0])
            if weight_name == "weight" and isinstance(layer, QuantizedLinear):
                weight = layer.dequantized()
            if weight_name == "weight" and module_name in adapted:
                weight = weight + weight_update(adapted[module_name], policy.adapter or "")
            plain_name = f"{module_name}.{weight_name}" if module_name else weight_name
            yield from as_in_files(lm, {plain_name: weight}).items()


def _adapted(lm: Any, adapter: str | None) -> Iterator[tuple[str, Any]]:
    """Layers with an adapter, by name. Raises UserError."""
    for name, layer in lm.named_modules():
        if not isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        module: Any = layer
        if not merges(module, adapter):
            raise UserError(
                f"model.lora: {name} has an adapter that is not a plain low-rank update of a "
                "linear layer; this engine cannot take it, rollout.engine=transformers can"
            )
        yield name, layer
