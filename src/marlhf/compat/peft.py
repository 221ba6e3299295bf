"""Private parts of PEFT: switching adapters without freezing, and what a LoRA layer consists of."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from marlhf.compat import needs

CLASSIFIER_HEAD = "base_model.model.score.weight"
"""Key of a sequence classifier's head in the weights of a saved adapter."""


# private: BaseTunerLayer._disable_adapters, ._active_adapter, AuxiliaryTrainingWrapper's likewise,
#          peft.utils.other (0.21)
# why: `set_adapter` and `enable_adapters` also set requires_grad of every other adapter
# remove when: PEFT can switch adapters without touching requires_grad
@needs(
    "peft.tuners.tuners_utils:BaseTunerLayer._disable_adapters",
    "peft.tuners.tuners_utils:BaseTunerLayer._active_adapter",
    "peft.utils.other:AuxiliaryTrainingWrapper._disable_adapters",
    "peft.utils.other:AuxiliaryTrainingWrapper._active_adapter",
)
def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers of a PEFT model that adapters can be switched in."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    assert layers, "a PEFT model without a layer that has adapters"
    return layers


def activate(layer: Any, adapter: str | None) -> None:
    """Make one adapter of a layer active, or none; requires_grad stays as it is."""
    layer._disable_adapters = adapter is None
    if adapter is not None:
        layer._active_adapter = [adapter]


def enable(layer: Any) -> None:
    """End what `activate(layer, None)` did."""
    layer._disable_adapters = False


# private: LoraLayer.lora_A, .lora_B, .lora_variant, .get_delta_weight (0.21)
# why: merging an adapter into a copy of the weight, while the layer itself stays as it is
# remove when: PEFT returns a merged weight without changing the layer
@needs(
    "peft.tuners.lora:LoraLayer.lora_A",
    "peft.tuners.lora:LoraLayer.lora_B",
    "peft.tuners.lora:LoraLayer.lora_variant",
    "peft.tuners.lora:Linear.get_delta_weight(self, adapter)",
)
def is_plain_lora(layer: nn.Module, adapter: str | None) -> bool:
    """Whether the adapter is a low-rank update, and nothing else, of the layer's weight."""
    return (
        isinstance(layer, LoraLayer)
        and adapter is not None
        and adapter in layer.lora_A
        and adapter not in layer.lora_variant
        and getattr(layer.lora_B[adapter], "bias", None) is None
        and hasattr(layer, "get_delta_weight")
    )
