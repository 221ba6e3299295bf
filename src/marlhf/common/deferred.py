"""Parameters whose values are made on demand, and take no memory until then.

Families with fused experts have one tensor where their files hold one per expert. It is made from
those at the moment it is placed, see `distributed.placement`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_MAKE = "marlhf_make_values"


def deferred(like: Tensor, make: Callable[[], Tensor]) -> nn.Parameter:
    """A parameter of the shape and dtype of `like`, which may be a meta tensor.

    Until `make` gives its values it is one number, seen as the full shape: NaN, where the dtype has
    it, so that no result is computed from it.
    """
    is_floating = like.is_floating_point()
    stand_in = torch.full((), float("nan") if is_floating else 0, dtype=like.dtype)
    parameter = nn.Parameter(stand_in.expand(like.shape), requires_grad=is_floating)
    setattr(parameter, _MAKE, make)
    return parameter


def values_of(parameter: Tensor) -> Tensor:
    """The values of any parameter, detached; a deferred one makes them at each call."""
    make: Callable[[], Tensor] | None = getattr(parameter, _MAKE, None)
    return (parameter if make is None else make()).detach()


def set_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Set the values of any parameter, which is then deferred no more."""
    parameter.data = values
    if hasattr(parameter, _MAKE):
        delattr(parameter, _MAKE)


def make_values(module: nn.Module) -> None:
    """Make the values of all deferred parameters of a module, to compute with it."""
    for parameter in module.parameters():
        if hasattr(parameter, _MAKE):
            set_values(parameter, values_of(parameter))
