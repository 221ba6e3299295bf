"""Numbers of an audit: the critic and every arm against the truth, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marlhf.algorithm.macro import expand, macro_mask, reduce, segment_ids
from marlhf.credit import agreement
from marlhf.credit.agreement import Agreement, Halves
from marlhf.credit.truth import true_advantages, true_values
from marlhf.evaluation.statistics import Array, Estimate, bootstrap_statistics
from marlhf.runs.rollouts import KeptRollout
from marlhf.views.replay import Arm

Numbers = dict[str, Any]
Owners = np.ndarray[Any, np.dtype[np.int64]]
Statistics = Callable[[Array], Sequence[Array]]


@dataclass(frozen=True)
class Evidence:
    """What an audit has sampled.

    kept         the responses, `copies` in a row to each prompt
    places       [B,T] bool: prefixes whose value is known
    returns_BTK  of continuations, NaN elsewhere
    kl_coef, gamma   of the run: those of the truth
    """

    kept: KeptRollout
    copies: int
    places: Tensor
    returns_BTK: Tensor
    kl_coef: float
    gamma: float

    @property
    def prompts(self) -> int:
        """How many there are."""
        return len(self.places) // self.copies

    @property
    def values(self) -> Halves:
        """Truth of the prefixes before `places`, in order."""
        return true_values(self.returns_BTK, self.places)

    def prompt_of(self, mask: Tensor) -> Owners:
        """Index of the prompt of every True in a mask [B,..], in order."""
        return (mask.nonzero()[:, 0] // self.copies).numpy()

    def knows(self, starts: Tensor) -> bool:
        """Whether all of these are places."""
        return not bool((starts & ~self.places).any())

    def advantages(self, starts: Tensor) -> Halves:
        """Truth of the macro actions that begin at `starts [B,T]`, in order."""
        tokens = self.kept.token_data(self.kl_coef)
        return true_advantages(self.returns_BTK, starts, tokens, self.gamma)

    def estimates(self, owners: Owners, statistics: Statistics) -> list[Numbers | None]:
        """Statistics over macro actions of prompts, resampled by prompt.

        owners   [N] the prompt of each macro action
        """
        of_all = bootstrap_statistics(
            lambda counts: statistics(counts[:, owners]), self.prompts, len(owners)
        )
        return [numbers(estimate) for estimate in of_all]


def numbers(estimate: Estimate | None) -> Numbers | None:
    """An estimate as plain data."""
    if estimate is None:
        return None
    return {"value": estimate.mean, "low": estimate.low, "high": estimate.high}


def of_values(evidence: Evidence, owners: Owners, values: Array, truth: Halves) -> Numbers:
    """Bias, error and explained variance of values against the truth, with a verdict."""

    def statistics(weights: Array) -> Sequence[Array]:
        return [f(weights, values, truth) for f in _VALUE_STATISTICS.values()]

    estimates = evidence.estimates(owners, statistics)
    named: Numbers = dict(zip(_VALUE_STATISTICS, estimates, strict=True))
    prompts = len(np.unique(owners))
    return named | {"verdict": verdict(named["excess"], named["explained"], prompts)}


_VALUE_STATISTICS = {
    "bias": agreement.bias,
    "error": agreement.error,
    "explained": agreement.explained,
    "excess": agreement.excess,
}
_FEWEST = 6  # prompts that all agree do so by chance once in 2**5 times


def verdict(
    excess: Mapping[str, Any] | None, explained: Mapping[str, Any] | None, prompts: int
) -> str:
    """What the interval of the error, less that of a constant, lets one say.

    The explained variance has the same sign, but no interval where the truth hardly varies.
    """
    if prompts >= _FEWEST and excess is not None and excess["low"] is not None:
        if excess["low"] > 0:
            return "worse than a constant"
        if excess["high"] < 0:
            return "better than a constant"
        if explained is not None and explained["low"] is not None:
            return "not shown to be better than a constant"
    return "too few prompts, or too little variance of the truth, to tell"


def by_position(evidence: Evidence) -> list[Numbers]:
    """Truth and critic in ranges of positions, where about equally many prefixes are known."""
    positions = evidence.places.nonzero()[:, 1].numpy()
    owners, truth = evidence.prompt_of(evidence.places), evidence.values
    critic = evidence.kept.tensors.get("values")
    values = None if critic is None else critic[evidence.places].double().numpy()
    rows = []
    for first, last in agreement.bins(positions):
        inside = (positions >= first) & (positions <= last)
        part = Halves(truth.one[inside], truth.other[inside])
        of_part = None if values is None else values[inside]

        def statistics(
            weights: Array, part: Halves = part, of_part: Array | None = of_part
        ) -> Sequence[Array]:
            of_truth = [agreement.mean(weights, part.mean)]
            if of_part is None:
                return of_truth
            of_critic = [agreement.mean(weights, of_part)]
            against = [f(weights, of_part, part) for f in (agreement.bias, agreement.error)]
            return of_truth + of_critic + against

        names = ["truth"] if values is None else ["truth", "critic", "bias", "error"]
        estimates = evidence.estimates(owners[inside], statistics)
        row: Numbers = {"first": first, "last": last, "prefixes": int(inside.sum())}
        row["position"] = float(positions[inside].mean())
        rows.append(row | dict(zip(names, estimates, strict=True)))
    return rows


def of_critic(evidence: Evidence) -> Numbers | None:
    """The critic's values before tokens against the truth; None without a critic."""
    values = evidence.kept.tensors.get("values")
    if values is None:
        return None
    owners = evidence.prompt_of(evidence.places)
    of_places = values[evidence.places].double().numpy()
    return of_values(evidence, owners, of_places, evidence.values)


def of_advantages(evidence: Evidence, arm: Arm, starts: Tensor) -> Numbers:
    """Rank and sign agreement of an arm's advantages with the truth.

    rank, sign   over its own macro actions, which begin at `starts`; None where the truth is not
                 known at all of these
    finest       rank over the stretches between places, each with the mean advantage of its tokens:
                 comparable between arms that cut elsewhere
    """
    batch = arm.batch
    of_macros = batch.advantages_BM[batch.mask_BM]
    ids = segment_ids(evidence.places, batch.segment_ids >= 0)
    # a sum of equal float32 in float64 is exact: ties between stretches stay ties
    of_tokens = expand(batch.advantages_BM, batch.segment_ids).float().double()
    of_places = reduce(of_tokens, ids, "equal")[macro_mask(ids)]
    return {
        "macro_actions": len(of_macros),
        "rank": _agreement(evidence, starts, of_macros, agreement.rank_agreement),
        "sign": _agreement(evidence, starts, of_macros, agreement.sign_agreement),
        "finest": _agreement(evidence, evidence.places, of_places, agreement.rank_agreement),
    }


def _agreement(
    evidence: Evidence, starts: Tensor, advantages: Tensor, how: Callable[..., Agreement]
) -> Numbers:
    """Agreement of advantages with the truth of the macro actions that begin at `starts`."""
    names = ("measured", "corrected", "reliability")
    if not evidence.knows(starts):
        return dict.fromkeys(names)
    x, truth = advantages.double().numpy(), evidence.advantages(starts)
    owners = evidence.prompt_of(starts)
    estimates = evidence.estimates(owners, lambda weights: how(weights, x, truth))
    return dict(zip(names, estimates, strict=True))


def of_arm_values(
    evidence: Evidence, arm: Arm, starts: Tensor, continuation_values: Tensor | None
) -> Numbers | None:
    """Values of an arm's macro actions against the truth, where that is known.

    None where the arm has none.
    """
    batch = arm.batch
    values_BM = batch.values_BM
    if values_BM is None and continuation_values is not None:
        values_BM = reduce(continuation_values, batch.segment_ids, "first")
    if values_BM is None:
        return None
    values = values_BM[batch.mask_BM].double().numpy()
    truth = true_values(evidence.returns_BTK, starts)
    known = ~np.isnan(values) & evidence.places[starts].numpy()
    owners = evidence.prompt_of(batch.mask_BM)[known]
    part = Halves(truth.one[known], truth.other[known])
    return of_values(evidence, owners, values[known], part)


def of_gradient(products: Tensor) -> Numbers:
    """Signal to noise of a gradient, from the inner products [P,P] of its prompts' gradients.

    signal_to_noise   of one prompt's gradient
    noise_scale       1 over it: prompts in a batch whose gradient has as much signal as noise; None
                      where there is no signal, and no end to an interval that reaches 0
    variance          trace of the covariance of the prompts' gradients
    squared_mean      squared norm of their mean, without its noise
    """
    G = products.double().numpy()

    def statistics(weights: Array) -> Sequence[Array]:
        return [agreement.signal_to_noise(weights, G)]

    estimate = numbers(bootstrap_statistics(statistics, len(G), len(G))[0])
    squares = float(G.diagonal().mean())
    off = float(G.sum() - G.diagonal().sum()) / max(len(G) * (len(G) - 1), 1)
    return {
        "signal_to_noise": estimate,
        "noise_scale": _inverse(estimate),
        "variance": squares - off,
        "squared_mean": off,
    }


def _inverse(estimate: Numbers | None) -> Numbers | None:
    if estimate is None or estimate["value"] <= 0:
        return None
    low, high = estimate["low"], estimate["high"]
    return {
        "value": 1 / estimate["value"],
        "low": None if high is None else 1 / high,
        "high": None if low is None or low <= 0 else 1 / low,
    }


def union(masks: Sequence[Tensor]) -> Tensor:
    """[B,T] bool: True in any of the masks."""
    return torch.stack(list(masks)).any(0)
