"""Private parts of PEFT: switching adapters without freezing, and what a LoRA layer consists of."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

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
    """Undo `activate(layer, None)`."""
    layer._disable_adapters = False


# private: LoraLayer.lora_A, .lora_B, .scaling, .lora_variant, .lora_bias, .get_delta_weight,
#          BaseTunerLayer.base_layer, lora.layer.ParamWrapper (0.21)
# why: merging an adapter into a copy of the weight, or applying it in fewer products, without
#      changing the layer
# remove when: PEFT returns a merged weight, and an adapter's factors, without changing the layer
@needs(
    "peft.tuners.lora:LoraLayer.lora_A",
    "peft.tuners.lora:LoraLayer.lora_B",
    "peft.tuners.lora:LoraLayer.scaling",
    "peft.tuners.lora:LoraLayer.lora_variant",
    "peft.tuners.lora:LoraLayer.lora_bias",
    "peft.tuners.tuners_utils:BaseTunerLayer.get_base_layer(self)",
    "peft.tuners.lora:Linear.get_delta_weight(self, adapter)",
)
def merges(layer: nn.Module, adapter: str | None) -> bool:
    """Whether the adapter is a low-rank update, and nothing else, of the layer's weight."""
    return (
        isinstance(layer, LoraLayer)
        and adapter is not None
        and adapter in layer.lora_A
        and adapter not in layer.lora_variant
        and getattr(layer.lora_B[adapter], "bias", None) is None
        and hasattr(layer, "get_delta_weight")
    )


def weight_update(layer: Any, adapter: str) -> Tensor:
    """Low-rank update `[out,in]` of a layer's weight, transposed where the weight is."""
    return layer.get_delta_weight(adapter)


def low_rank_factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """`A [r,in]` and `B [out,r]` of the update `B A` of a layer's output."""
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return down, up * layer.scaling[adapter]


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer that a LoRA layer adapts; any other layer itself."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def is_lora(layer: nn.Module) -> bool:
    """Whether a layer has low-rank adapters."""
    return isinstance(layer, LoraLayer)


def has_lora_bias(layer: nn.Module) -> bool:
    """Whether an adapter of a layer changes its bias."""
    return isinstance(layer, LoraLayer) and any(layer.lora_bias.values())


def is_variant(layer: Any) -> bool:
    """Whether an adapter of a LoRA layer is more than a low-rank update (DoRA, aLoRA)."""
    return bool(layer.lora_variant)


def is_fused(layer: object) -> bool:
    """Whether a layer adapts one parameter of a module, such as fused experts."""
    return isinstance(layer, ParamWrapper)
