"""Weights prepared for decoding, kept for the duration of sampling.

Decoding a token of a small batch is bound by memory bandwidth on a CPU. oneDNN's blocked layout
streams faster than a row-major one; layers with the same input (queries, keys and values; gate and
up) are fused into one product; adapters are merged. docs/performance.md has the gain of each.

On a GPU it is bound by launches of kernels. Merged adapters would need another copy of the weights,
and bf16 would round them away; so they stay factors, with one product for a shared input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from marlhf.compat.peft import base_layer, is_lora, low_rank_factors, merges, weight_update
from marlhf.compat.torch import has_packed_linear, pack_linear_weight, packed_linear, version

SMALLEST = 2**16  # parameters; smaller weights stay in the processor's caches
FEWEST_TOKENS = 16  # packing costs about what ten tokens gain

Outputs = Callable[[Tensor], Sequence[Tensor]]


@contextmanager
def shared_inputs(model: nn.Module, adapter: str | None) -> Iterator[list[list[nn.Module]]]:
    """Record the linear layers called by forward passes in this context, by input tensor.

    Only consecutive calls are grouped.
    """
    groups: list[list[nn.Module]] = []
    last: Tensor | None = None

    def called(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal last
        if last is None or inputs[0] is not last:
            groups.append([])
        last = inputs[0]
        groups[-1].append(layer)

    hooks = [layer.register_forward_pre_hook(called) for layer in _linears(model, adapter)]
    try:
        yield groups
    finally:
        last = None
        for hook in hooks:
            hook.remove()


@contextmanager
def packed(
    groups: Sequence[Sequence[nn.Module]], adapter: str | None, batch_size: int, tokens: int
) -> Iterator[None]:
    """Run groups of layers in fewer or faster products, in the dtype of autocast.

    On a CPU on fused, prepacked copies of their weights, with merged adapters. Elsewhere an adapter
    adds one product to a layer, and one to layers with the same input. Layers that would not gain
    are left unchanged. The weights must not change in this context.

    batch_size   to pack for
    tokens       maximum number of tokens to decode
    """
    replaced: dict[Any, None] = {}
    try:
        for group in groups if tokens >= FEWEST_TOKENS else ():
            layers = [layer for layer in group if layer not in replaced]
            if (gain := _outputs(layers, adapter, batch_size)) is None:
                continue
            layers, outputs = gain
            product = _Product(outputs, len(layers))
            for i, layer in enumerate(layers):
                replaced[layer] = None
                layer.forward = partial(product, i)
        yield
    finally:
        for layer in replaced:
            del layer.forward


def _linears(module: Any, adapter: str | None) -> Iterator[nn.Module]:
    """Linear layers in a module; one whose adapter can be merged counts as one layer."""
    is_plain = type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module)
    if is_plain or _merges(module, adapter):
        yield module
        return
    children = [base_layer(module)] if is_lora(module) else module.children()
    for child in children:
        yield from _linears(child, adapter)


def _merges(module: Any, adapter: str | None) -> bool:
    """Whether a module is a linear layer with a plain, mergeable LoRA update."""
    return merges(module, adapter) and type(base_layer(module)) in (nn.Linear, Conv1D)


def _weight_of(layer: Any) -> Tensor:
    """Weight [out,in] of a layer, without adapters."""
    base: Any = base_layer(layer)
    return base.weight.T if type(base) is Conv1D else base.weight


def _outputs(
    layers: Sequence[Any], adapter: str | None, batch_size: int
) -> tuple[Sequence[Any], Outputs] | None:
    """Layers of a group that gain, and a function with all their outputs; or None."""
    if layers and _weight_of(layers[0]).device.type != "cpu":
        adapted = [layer for layer in layers if is_lora(layer)]
        return (adapted, _low_rank(adapted, adapter)) if adapted else None
    linear = _linear(layers, adapter, batch_size)
    sizes = [_weight_of(layer).shape[0] for layer in layers]
    return None if linear is None else (layers, lambda x: linear(x).split(sizes, -1))


def _low_rank(layers: Sequence[Any], adapter: str | None) -> Outputs:
    """Outputs with one product for the first factors of all adapters, and one per second."""
    assert adapter is not None
    dtype, bases = _dtype(_weight_of(layers[0])), [base_layer(layer) for layer in layers]
    downs, ups = zip(*(low_rank_factors(layer, adapter) for layer in layers), strict=True)
    down, ranks = torch.cat(downs).to(dtype), [len(down) for down in downs]
    ups = [up.T.to(dtype) for up in ups]

    def outputs(x: Tensor) -> Sequence[Tensor]:
        x = x.to(dtype)
        inner = nn.functional.linear(x, down).flatten(0, -2).split(ranks, -1)
        sums = [base(x) for base in bases]
        for y, low, up in zip(sums, inner, ups, strict=True):
            y.flatten(0, -2).addmm_(low, up)  # in place: else a copy is made first
        return sums

    return outputs


def _linear(
    layers: Sequence[Any], adapter: str | None, batch_size: int
) -> Callable[[Tensor], Tensor] | None:
    """A fused linear function with the concatenated outputs of all layers, on packed weights.

    None where packing would not gain.
    """
    weights = [_weight_of(layer) for layer in layers]
    dtype = _dtype(weights[0]) if weights else torch.float32
    if sum(map(Tensor.numel, weights)) < SMALLEST or not has_packed_linear(dtype):
        return None
    for i, layer in enumerate(layers):
        if is_lora(layer):
            assert adapter is not None
            update = weight_update(layer, adapter)
            update = update.T if type(base_layer(layer)) is Conv1D else update
            # base rounded before the sum, as where ZeRO-3 gathered it: samples stay the same
            weights[i] = weights[i].to(dtype) + update
    bias = _bias_of(layers, weights, dtype)
    packed_weight = pack_linear_weight(torch.cat([w.to(dtype) for w in weights]), batch_size)
    return partial(packed_linear, packed_weight=packed_weight, bias=bias)


def _bias_of(layers: Sequence[Any], weights: Sequence[Tensor], dtype: Any) -> Tensor | None:
    biases: list[Any] = [layer.bias for layer in map(base_layer, layers)]
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, weights, strict=True)
    return torch.cat([w.new_zeros(len(w)) if b is None else b for b, w in pairs]).to(dtype)


def _dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the product: autocast's where it is enabled."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _Product:
    """Outputs of layers with the same input, computed once for all of them."""

    def __init__(self, outputs: Outputs, count: int) -> None:
        self._compute, self._count = outputs, count
        self._input: Tensor | None = None
        self._version = 0
        self._outputs: Sequence[Tensor] = ()

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """The output of layer `index`."""
        if x is not self._input or version(x) != self._version:
            self._input, self._version = x, version(x)
            self._outputs = self._compute(x)
        output = self._outputs[index]
        if index + 1 == self._count:
            self._input, self._outputs = None, ()
        return output
