"""How far values and advantages agree with a Monte-Carlo truth: pure functions, in float64.

Every statistic is a function of `weights [R,N]`, how often each of N macro actions counts in each
of R resamples of the prompts, and returns [R]; NaN where it is undefined.

The truth comes as two independent estimates, *halves*, so that its own noise can be told from
what it measures:

    error         E (v - V1)(v - V2) = E (v - V)^2, without the variance of V1 and V2
    reliability   r(h1, h2) = var V / (var V + noise), the share of a half's variance that is no
                  noise; of the mean of both halves: 2r / (1 + r) (Spearman 1910, Brown 1910)
    corrected     r(x, V) = r(x, mean of halves) / sqrt(reliability) (Spearman 1904)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from marlhf.evaluation.statistics import Array


class Halves(NamedTuple):
    """Two independent estimates [N] of one truth."""

    one: Array
    other: Array

    @property
    def mean(self) -> Array:
        """The best estimate of the truth."""
        return (self.one + self.other) / 2


class Agreement(NamedTuple):
    """Agreement with the truth's estimate, with the truth itself, and the estimate's reliability.

    Each [R].
    """

    measured: Array
    corrected: Array
    reliability: Array


def mean(weights: Array, x: Array) -> Array:
    """Weighted mean of x [N] or [R,N]."""
    return _divided((weights * x).sum(1), weights.sum(1))


def correlation(weights: Array, x: Array, y: Array) -> Array:
    """Pearson's correlation of x and y, each [N] or [R,N]; undefined where one is constant."""
    total = weights.sum(1)
    x, y = x - mean(weights, x)[:, None], y - mean(weights, y)[:, None]
    variances = (weights * x * x).sum(1) * (weights * y * y).sum(1)
    scale = np.sqrt(np.where(variances > 1e-24 * total**2, variances, np.nan))
    return (weights * x * y).sum(1) / scale


def ranks(weights: Array, x: Array) -> Array:
    """[R,N] rank of each x among all, where each counts `weights` times; ties share theirs."""
    order = np.argsort(x, kind="stable")
    ordered = x[order]
    is_new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    sizes = np.add.reduceat(weights[:, order], np.flatnonzero(is_new), axis=1)
    middles = np.cumsum(sizes, axis=1) - sizes / 2
    of_all = np.empty_like(weights)
    of_all[:, order] = middles[:, np.cumsum(is_new) - 1]
    return of_all


def rank_agreement(weights: Array, x: Array, truth: Halves) -> Agreement:
    """Spearman's rank correlation with the truth."""
    ranked = [ranks(weights, y) for y in (x, truth.mean, truth.one, truth.other)]
    measured = correlation(weights, ranked[0], ranked[1])
    reliability = spearman_brown(correlation(weights, ranked[2], ranked[3]))
    return Agreement(measured, measured / np.sqrt(reliability), reliability)


def sign_agreement(weights: Array, x: Array, truth: Halves) -> Agreement:
    """Share of macro actions on whose sign x and the truth agree.

    A zero agrees by half. Corrected as correlations are, by way of that of two normal variables
    whose signs agree as often: r = sin(pi (p - 1/2)) (Sheppard 1899).
    """

    def as_correlation(y: Array, z: Array) -> Array:
        return np.sin(np.pi / 2 * mean(weights, np.sign(y) * np.sign(z)))

    of_arm = as_correlation(x, truth.mean)
    reliability = spearman_brown(as_correlation(truth.one, truth.other))
    corrected = np.clip(of_arm / np.sqrt(reliability), -1, 1)
    return Agreement(_as_share(of_arm), _as_share(corrected), reliability)


def spearman_brown(of_half: Array) -> Array:
    """Reliability of the mean of two halves, from their correlation; undefined unless above 0."""
    return np.where(of_half > 0, 2 * of_half / (1 + of_half), np.nan)


def bias(weights: Array, values: Array, truth: Halves) -> Array:
    """Mean of the values less the truth."""
    return mean(weights, values - truth.mean)


def error(weights: Array, values: Array, truth: Halves) -> Array:
    """Root mean square of the values less the truth, without the truth's own noise.

    0 where the values are nearer to the truth's estimate than its noise explains.
    """
    squares = (values - truth.one) * (values - truth.other)
    return np.sqrt(np.maximum(mean(weights, squares), 0))


def excess(weights: Array, values: Array, truth: Halves) -> Array:
    """Mean squared error of the values less that of a constant, biases aside.

    var v - 2 cov(v, V): the truth's variance cancels, and its noise with it, so that this is
    defined where `explained` is not. 0 for a constant, above 0 for what is worse than one.
    """
    moved = values - values[:1]  # those of a constant are exactly 0
    return _covariance(weights, moved, moved - 2 * truth.mean)


def explained(weights: Array, values: Array, truth: Halves) -> Array:
    """Share of the truth's variance that the values explain, their bias aside.

    1 for the truth itself, 0 for a constant, negative for what is worse than one.
    """
    variance = _covariance(weights, truth.one, truth.other)
    return _divided(-excess(weights, values, truth), variance)


def signal_to_noise(weights: Array, products: Array) -> Array:
    """Squared norm of the mean gradient over the trace of the gradients' covariance.

    weights    [R,P] of prompts
    products   [P,P] of the prompts' gradients with each other

    Both are unbiased: products of a gradient with itself, which hold its noise, are left out of the
    squared mean. May be negative where the mean is smaller than its noise. 1 over it is the simple
    noise scale of McCandlish et al. 2018 (arXiv 1812.06162), in prompts.
    """
    squares = products.diagonal()
    total, same = weights.sum(1), (weights**2).sum(1)
    pairs = ((weights @ products) * weights).sum(1) - weights**2 @ squares
    of_mean = _divided(pairs, total**2 - same)
    return _divided(of_mean, mean(weights, squares) - of_mean)


def bins(positions: Array, most: int = 8) -> list[tuple[int, int]]:
    """At most `most` ranges `(first, last)` of positions, with about equally many in each."""
    places, counts = np.unique(positions.astype(np.int64), return_counts=True)
    ends = np.cumsum(counts) * most / max(counts.sum(), 1)
    parts = np.minimum(np.ceil(ends - 1e-9), most)
    return [
        (int(places[parts == part].min()), int(places[parts == part].max()))
        for part in np.unique(parts)
    ]


def _covariance(weights: Array, x: Array, y: Array) -> Array:
    x, y = x - mean(weights, x)[:, None], y - mean(weights, y)[:, None]
    return mean(weights, x * y)


def _as_share(of_signs: Array) -> Array:
    return 0.5 + np.arcsin(of_signs) / np.pi


def _divided(x: Array, y: Array) -> Array:
    return x / np.where(y > 0, y, np.nan)
