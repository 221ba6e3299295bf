"""Host memory for models and optimiser states that a phase does not use.

A frozen model keeps its host copy, so that only one direction is copied: to the device before use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# module -> the device that it runs on, and the host copies of its parameters and buffers
_ON_HOST: WeakKeyDictionary[nn.Module, tuple[torch.device, list[Tensor]]] = WeakKeyDictionary()


def keep_on_host(module: nn.Module, device: torch.device) -> None:
    """Hold a frozen module in host memory from now on, but within `in_use`."""
    copies = []
    for tensor in (*module.parameters(), *module.buffers()):
        assert not tensor.requires_grad
        copies.append(host_copy(tensor.data))
        tensor.data = copies[-1]
    _ON_HOST[module] = device, copies


@contextmanager
def in_use(module: nn.Module) -> Iterator[None]:
    """Context in which a module of `keep_on_host` is on its device."""
    kept = _ON_HOST.pop(module, None)
    if kept is None:
        yield
        return
    device, copies = kept
    tensors = [*module.parameters(), *module.buffers()]
    for tensor, copy in zip(tensors, copies, strict=True):
        tensor.data = copy.to(device, non_blocking=True)
    try:
        yield
    finally:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.data = copy
        _ON_HOST[module] = kept


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where that can be had."""
    copy = torch.empty_like(tensor, device="cpu")
    with suppress(RuntimeError):  # no GPU driver, or no more pinned memory is allowed
        copy = copy.pin_memory()
    return copy.copy_(tensor)


def move_states(optimizer: torch.optim.Optimizer, device: torch.device | None) -> None:
    """Move an optimiser's states to a device; None: to host memory."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                moved = host_copy(value) if device is None else value.to(device, non_blocking=True)
                state[name] = moved
