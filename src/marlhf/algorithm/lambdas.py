"""Lambda of GAE per macro action, by the names that `ppo.lam` and `ppo.critic_lam` take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from marlhf.algorithm.macro import macro_lengths
from marlhf.common.errors import UserError
from marlhf.common.plugins import plugin_call
from marlhf.common.registry import Registry, Spec

Lambdas = Callable[[Tensor], Tensor]
"""Lengths of macro actions in tokens, int64 [B,M] with 0 where there is none -> lambda [B,M]."""

LAMBDAS = Registry(
    kind="lambda",
    group="marlhf.lambdas",
    factories={
        "per_token": "marlhf.algorithm.lambdas.PerToken",
        "length_adaptive": "marlhf.algorithm.lambdas.LengthAdaptive",
    },
    arguments=("lengths",),
)


@dataclass(frozen=True)
class Constant:
    """The same for every macro action."""

    lam: float

    def __call__(self, lengths_BM: Tensor) -> Tensor:
        return torch.full(lengths_BM.shape, self.lam, dtype=torch.float64, device=lengths_BM.device)


@dataclass(frozen=True)
class PerToken:
    """lam^w for a macro action of w tokens.

    The credit horizon is `1 / (1 - lam)` tokens, so that segmenters
    differ in where they cut alone, and not in how far credit reaches.
    """

    lam: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise UserError(f"lam: given {self.lam:g}, must be in [0, 1]")

    def __call__(self, lengths_BM: Tensor) -> Tensor:
        base = torch.full((), self.lam, dtype=torch.float64, device=lengths_BM.device)
        return base**lengths_BM


@dataclass(frozen=True)
class LengthAdaptive:
    """1 - 1 / (alpha l) for a response of l macro actions, at least 0.

    Source: Yue et al. 2025, VAPO (arXiv 2504.05118) eq. 8, where l counts tokens.
    """

    alpha: float = 0.05

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise UserError(f"alpha: given {self.alpha:g}, must be above 0")

    def __call__(self, lengths_BM: Tensor) -> Tensor:
        counts_B = (lengths_BM > 0).sum(1).clamp(min=1).double()
        lam_B = (1 - 1 / (self.alpha * counts_B)).clamp(min=0)
        return lam_B[:, None].expand(lengths_BM.shape)


def build_lambdas(spec: float | Spec | Lambdas) -> Lambdas:
    """Build lambda from a number, name, mapping, import path or callable. Raises UserError."""
    if isinstance(spec, int | float):
        return Constant(float(spec))
    return LAMBDAS.build(spec)


def macro_lambdas(lambdas: Lambdas, segment_ids: Tensor, key: str) -> Tensor:
    """Lambda of each macro action, float64 [B,M]. Raises UserError, naming the key."""
    lengths_BM = macro_lengths(segment_ids)
    with plugin_call(key):
        lam_BM = lambdas(lengths_BM.clone())
    if not isinstance(lam_BM, Tensor) or lam_BM.shape != lengths_BM.shape:
        raise UserError(
            f"{key}: gave {type(lam_BM).__name__}, must be a tensor of shape "
            f"{tuple(lengths_BM.shape)}, one entry per macro action"
        )
    lam_BM = torch.where(lengths_BM > 0, lam_BM.double(), torch.zeros_like(lam_BM).double())
    if not bool(((lam_BM >= 0) & (lam_BM <= 1)).all()):
        raise UserError(f"{key}: gave a lambda outside [0, 1]")
    return lam_BM
