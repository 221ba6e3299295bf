"""Gathers weights sharded by ZeRO-3, for sampling, for saving, and for copies.

All functions must run on all ranks, and are no-ops for weights that are not sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from marlhf.compat.deepspeed import gathered_parameter, is_sharded, without_hooks


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    """All linear layers in a module."""
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def in_bf16(parameter: nn.Parameter) -> nn.Parameter:
    """A frozen bf16 copy of a parameter."""
    return nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)


@contextmanager
def replaced_parameters(
    parts: Iterable[nn.Module], others: Mapping[nn.Parameter, nn.Parameter]
) -> Iterator[None]:
    """Context in which the direct parameters of `parts` are replaced by the values of `others`.

    A module outside `parts` that shares a parameter, as tied embeddings do, keeps the original.
    """
    originals = [
        (part, name, parameter)
        for part in parts
        for name, parameter in part.named_parameters(recurse=False)
        if parameter in others
    ]
    for part, name, parameter in originals:
        setattr(part, name, others[parameter])
    try:
        yield
    finally:
        for part, name, parameter in originals:
            setattr(part, name, parameter)


def has_shards(module: nn.Module) -> bool:
    """Whether any weight of a module is sharded."""
    return any(is_sharded(p) for p in module.parameters())


@contextmanager
def gathered(module: nn.Module, offloads: Sequence[Any], bf16: bool) -> Iterator[None]:
    """Context with a module's weights gathered: its forward passes need no other rank.

    offloads   `DeepSpeedZeRoOffload` handles, whose hooks are off meanwhile
    bf16       weights of linear layers are bf16 copies, rounded as by autocast
    """
    parameters = {p for p in module.parameters() if is_sharded(p)}
    if not parameters:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    linear = linear_layers(module) if bf16 else []
    rounded: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in (p for layer in linear for p in layer.parameters(recurse=False)):
        is_rounded = parameter.is_floating_point() and parameter.dtype != torch.bfloat16
        if parameter in parameters and is_rounded:
            with gathered_parameter(parameter):  # one at a time
                rounded[parameter] = in_bf16(parameter)
    with ExitStack() as stack:
        for offload in offloads:
            if not parameters.isdisjoint(offload.module.parameters()):
                stack.enter_context(without_hooks(offload))
        stack.enter_context(replaced_parameters(linear, rounded))
        others = [p for p in module.parameters() if p in parameters]
        stack.enter_context(GatheredParameters(others))
        yield


@contextmanager
def unsharded_on_cpu(module: nn.Module, is_main: bool) -> Iterator[None]:
    """Context with all weights of a module on the first rank's CPU, to write them.

    They are gathered one at a time, so that no device has to hold all.
    """
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in module.parameters() if has_shards(module) else ():
        with gathered_parameter(parameter):
            if is_main:
                complete = parameter.detach().to("cpu", copy=True)
                copies[parameter] = nn.Parameter(complete, parameter.requires_grad)
    with replaced_parameters(module.modules(), copies):
        yield


@torch.no_grad()
def trained_weights(module: nn.Module, is_main: bool) -> dict[str, Tensor]:
    """A copy of the trained weights on the first rank's CPU; empty on the others."""
    copies = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            with gathered_parameter(parameter):
                if is_main:
                    copied = torch.clone(parameter.cpu(), memory_format=torch.contiguous_format)
                    copies[name] = copied
    return copies


@torch.no_grad()
def set_trained_weights(module: nn.Module, weights: Mapping[str, Tensor], is_main: bool) -> None:
    """Restore the first rank's copy from `trained_weights`, on all ranks.

    The optimiser is not updated: only for use after training.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            with gathered_parameter(parameter, modifier_rank=0):
                if is_main:
                    parameter.copy_(weights[name])
                if torch.distributed.is_initialized() and not is_sharded(parameter):
                    torch.distributed.broadcast(parameter, 0)
