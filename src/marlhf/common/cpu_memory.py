"""CPU memory: a reused gradient buffer, and heap trimming.

The C library keeps freed memory in fragments that later, larger arrays may not fit into, and the
operating system provides fresh pages slowly (about 2 GB/s). docs/performance.md has the figures.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection

import torch
from torch import Tensor, nn


def trim_heap(device: torch.device) -> None:
    """Return free heap pages to the operating system (glibc's `malloc_trim`); on CPUs only."""
    if device.type != "cpu":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def trim_heap_before_embedding_gradients(module: nn.Module) -> None:
    """Trim the heap in each backward pass, just before gradients of embeddings are allocated.

    They are the largest and the last allocations of the pass, and do not fit into the fragments of
    freed activations: without trimming, those would add to the peak.
    """

    def register(layer: nn.Module, inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: trim_heap(gradient.device))

    for layer in module.modules():
        if isinstance(layer, nn.Embedding) and layer.weight.requires_grad:
            layer.register_forward_hook(register)


class GradientBuffer:
    """A CPU gradient buffer, reused across steps; one model at a time uses it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def attach_to(self, weights: Collection[Tensor]) -> None:
        """Give each fp32 weight a gradient of zeros in this buffer, overwriting the last user's."""
        sizes = [weight.numel() for weight in weights]
        if len(self._memory) < sum(sizes):
            self._memory = torch.empty(sum(sizes))
        gradients = self._memory[: sum(sizes)].zero_().split(sizes)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.view_as(weight)
