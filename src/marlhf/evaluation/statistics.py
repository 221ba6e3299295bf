"""Statistics of samples: bootstrap intervals, pass@k, best-of-n, win rates, distinct n-grams.

Pure functions in float64. The unit of resampling is the prompt: responses to one prompt are not
independent of each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

_WORD = re.compile(r"\w+|[^\w\s]")
_DRAWS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Estimate:
    """A mean, or another statistic, over prompts and its 95% interval.

    The interval is None for fewer than two prompts, and where resamples leave it undefined.
    """

    mean: float
    low: float | None
    high: float | None
    prompts: int


def bootstrap(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> Estimate | None:
    """Mean and 95% percentile interval (Efron 1979) of one value per prompt; None without any.

    For a paired comparison pass the differences: then both policies' values of a prompt are drawn
    together. The same seed and count draw the same prompts.
    """
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        return None
    mean = float(x.mean())
    if len(x) == 1:
        return Estimate(mean, None, None, 1)
    draws = _draws(len(x), resamples, seed, len(x))
    low, high = np.quantile(np.concatenate([x[index].mean(1) for index in draws]), [0.025, 0.975])
    return Estimate(mean, float(low), float(high), len(x))


def bootstrap_statistics(
    statistics: Callable[[Array], Sequence[Array]],
    prompts: int,
    width: int,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Estimate | None]:
    """Statistics of all prompts, with 95% percentile intervals; None where undefined.

    statistics   [R,prompts], how often each prompt counts in each of R resamples -> some [R]; NaN
                 where one is undefined
    width        numbers that they hold per resample, which bounds R

    More than one in twenty resamples without a value leave the interval undefined.
    """
    if prompts == 0:
        return []
    values = [float(x[0]) for x in statistics(np.ones((1, prompts)))]
    parts: list[Sequence[Array]] = []
    for index in _draws(prompts, resamples, seed, max(width, prompts)) if prompts > 1 else ():
        counts = np.zeros((len(index), prompts))
        np.add.at(counts, (np.arange(len(index))[:, None], index), 1.0)
        parts.append(statistics(counts))
    drawn = [np.concatenate(of_all) for of_all in zip(*parts, strict=True)] or [None] * len(values)
    return [
        _with_interval(value, x, prompts, resamples) for value, x in zip(values, drawn, strict=True)
    ]


def _with_interval(
    value: float, drawn: Array | None, prompts: int, resamples: int
) -> Estimate | None:
    if not math.isfinite(value):
        return None
    defined = [] if drawn is None else drawn[np.isfinite(drawn)]
    if len(defined) < 0.95 * resamples:
        return Estimate(value, None, None, prompts)
    low, high = np.quantile(defined, [0.025, 0.975])
    return Estimate(value, float(low), float(high), prompts)


def _draws(prompts: int, resamples: int, seed: int, width: int) -> Iterator[Any]:
    """Indices [R,prompts] of prompts drawn with replacement, a part of the resamples at a time."""
    generator = np.random.default_rng(seed & 0xFFFFFFFFFFFFFFFF)
    chunk = max(1, _DRAWS_AT_ONCE // width)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        yield generator.integers(0, prompts, (size, prompts))


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased pass@k, 1 - C(n-c, k) / C(n, k) (Chen et al. 2021).

    The chance that any of k of the n samples is among the c that passed. 1 - (1 - c/n)^k is biased.
    """
    assert 1 <= k <= samples
    assert 0 <= passed <= samples
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def best_of_n(scores: Sequence[float], n: int, values: Sequence[float] | None = None) -> float:
    """Expected value of the best of n samples by `scores`, drawn without replacement.

    values   values to average, by default the scores: choose by one reward, report another

    Unbiased for the best of n fresh samples. The i-th smallest of N scores is the best of n with
    probability C(i-1, n-1) / C(N, n); equal scores share theirs (random ties).
    """
    x = np.asarray(scores, dtype=np.float64)
    y = x if values is None else np.asarray(values, dtype=np.float64)
    assert 1 <= n <= len(x)
    total = math.comb(len(x), n)
    weights = np.array([math.comb(i, n - 1) / total for i in range(len(x))])
    order = np.argsort(x, kind="stable")
    _, first, counts = np.unique(x[order], return_index=True, return_counts=True)
    shared = np.repeat(np.add.reduceat(weights, first) / counts, counts)
    return float(shared @ y[order])


def best_of_n_kl(n: int) -> float:
    """Upper bound, in nats, of best-of-n's KL to plain sampling: log n - (n-1)/n.

    For comparing the curve with the KL of a trained policy. Source: Beirami et al. 2024.
    """
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True)
class WinRate:
    """Wins of a policy over a baseline.

    rate                 a tie counts one half
    wins, ties, losses   numbers of pairs
    """

    rate: Estimate | None
    wins: int
    ties: int
    losses: int


def win_rate(outcomes: Sequence[Sequence[float]], resamples: int = 2000, seed: int = 0) -> WinRate:
    """Win rate from outcomes of each prompt's pairs: above 0.5 won, 0.5 tied."""
    flat = [x for pairs in outcomes for x in pairs]
    return WinRate(
        bootstrap([float(np.mean(pairs)) for pairs in outcomes if len(pairs)], resamples, seed),
        wins=sum(x > 0.5 for x in flat),
        ties=sum(x == 0.5 for x in flat),
        losses=sum(x < 0.5 for x in flat),
    )


def outcome(value: float, baseline: float) -> float:
    """1 for a win, one half for a tie, 0 for a loss."""
    return 0.5 if value == baseline else float(value > baseline)


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Share of distinct n-grams among all n-grams of the texts (Li et al. 2016).

    None without n-grams. It falls with the amount of text: compare equal amounts only. A word is a
    run of letters and digits, lower-cased, or one other mark.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words: list[Any] = _WORD.findall(text.lower())
    return list(zip(*(words[i:] for i in range(n)), strict=False))
