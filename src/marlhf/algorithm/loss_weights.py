"""Weights of tokens in the policy loss, by the names that `ppo.weights` takes.

A segmenter or an estimator may weigh macro actions too, see `Segmenter` and `Credit`; all weights
of a token are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from marlhf.algorithm.experience import MacroBatch
from marlhf.algorithm.macro import expand
from marlhf.common.errors import UserError, short_repr
from marlhf.common.plugins import copied, plugin_call
from marlhf.common.registry import Registry, Spec
from marlhf.common.types import ResponseBatch
from marlhf.segmenters import SegmenterFn

LossWeights = Callable[[ResponseBatch, Tensor, Tensor], Tensor]
"""(responses, segment_ids [B,T], advantages [B,M]) -> weights [B,T], at least 0.

`expand` turns a weight per macro action [B,M] into one per token.
"""

LOSS_WEIGHTS = Registry(
    kind="loss weights",
    group="marlhf.loss_weights",
    factories={
        "low_probability": "marlhf.algorithm.loss_weights.LowProbability",
        "positive": "marlhf.algorithm.loss_weights.Positive",
    },
    arguments=("responses", "segment_ids", "advantages"),
)


@dataclass(frozen=True)
class LowProbability:
    """1 where the policy gave the sampled token a probability below `threshold`, else 0.

    Tokens that were nearly certain say little about a choice, and get no gradient. The mean loss
    still counts them, see `ppo.aggregate`.
    Source: the probability mask of Guo et al. 2025, SPO (arXiv 2505.23564).
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold: given {self.threshold:g}, must be in (0, 1]")

    def __call__(
        self, responses: ResponseBatch, segment_ids: Tensor, advantages_BM: Tensor
    ) -> Tensor:
        assert responses.logprobs is not None
        return (responses.logprobs.exp() < self.threshold).to(advantages_BM.dtype)


@dataclass(frozen=True)
class Positive:
    """`weight` for macro actions with a positive advantage, 1 for the others."""

    weight: float = 2.0

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise UserError(f"weight: given {self.weight:g}, must be at least 0")

    def __call__(
        self, responses: ResponseBatch, segment_ids: Tensor, advantages_BM: Tensor
    ) -> Tensor:
        weights_BM = torch.where(advantages_BM > 0, self.weight, 1.0)
        return expand(weights_BM.to(advantages_BM.dtype), segment_ids)


def build_loss_weights(
    specs: Spec | Sequence[Spec], segmenter: SegmenterFn | None = None
) -> tuple[LossWeights, ...]:
    """Build the weights of a spec or of a list of them. Raises UserError.

    segmenter   weighs too, if it has a method `loss_weights`
    """
    of_segmenter = getattr(segmenter, "loss_weights", None)
    named = [specs] if isinstance(specs, str | dict) else specs
    all_specs = [*named, *([] if of_segmenter is None else [of_segmenter])]
    return tuple(LOSS_WEIGHTS.build(spec) for spec in all_specs)


def weighted(
    batch: MacroBatch, functions: Iterable[LossWeights], responses: ResponseBatch
) -> MacroBatch:
    """Multiply the weights of the policy loss by those of the functions. Raises UserError.

    The advantages that they get are those of the loss, whitened if configured.
    """
    for function in functions:
        name = LOSS_WEIGHTS.label(function)
        with plugin_call(name):
            weights = function(*copied((responses, batch.segment_ids, batch.advantages_BM)))
        weights_BT = _checked(weights, batch, name)
        if batch.weights_BT is not None:
            weights_BT = weights_BT * batch.weights_BT
        batch = replace(batch, weights_BT=weights_BT)
    return batch


def _checked(weights: Any, batch: MacroBatch, name: str) -> Tensor:
    mask, like = batch.segment_ids >= 0, batch.advantages_BT
    if not isinstance(weights, Tensor):
        raise UserError(f"{name}: gave {short_repr(weights)}, must be a tensor")
    if weights.shape != mask.shape:
        raise UserError(
            f"{name}: gave shape {tuple(weights.shape)}, must be {tuple(mask.shape)}, one entry "
            "per token (marlhf.algorithm.macro.expand makes one of each macro action's)"
        )
    weights = torch.where(mask, weights.detach().to(like), torch.zeros_like(like))
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        worst = weights[~(weights.isfinite() & (weights >= 0))][0]
        raise UserError(f"{name}: gave {float(worst):g}, must be finite and at least 0")
    return weights
