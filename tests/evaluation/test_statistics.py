"""Statistics against exact enumeration; each with the mistake that must not pass."""

from __future__ import annotations

import math
import random
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import fast

from marlhf.evaluation.statistics import (
    best_of_n,
    best_of_n_kl,
    bootstrap,
    distinct,
    outcome,
    pass_at_k,
    win_rate,
)

SMALL = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=6)


# -- bootstrap -----------------------------------------------------------------------------------


def enumerated_quantile(values: list[float], share: float) -> float:
    """Of the mean of all n^n equally likely resamples."""
    means = sorted(sum(draw) / len(values) for draw in product(values, repeat=len(values)))
    return means[min(len(means) - 1, math.ceil(share * len(means)) - 1)]


def test_the_interval_is_that_of_all_resamples():
    values = [0.0, 1.0, 1.5, 4.0, 9.0, 2.25]
    found = bootstrap(values, resamples=40_000)
    assert found is not None
    assert found.mean == pytest.approx(sum(values) / 6, abs=1e-12)
    assert found.prompts == 6
    for share, bound in ((0.025, found.low), (0.975, found.high)):
        assert bound == pytest.approx(enumerated_quantile(values, share), abs=0.08)
        assert bound != pytest.approx(enumerated_quantile(values, abs(share - 0.025)), abs=0.08)


def test_nothing_is_made_up_from_no_prompt_or_one():
    assert bootstrap([]) is None
    one = bootstrap([3.0])
    assert one is not None
    assert (one.mean, one.low, one.high) == (3.0, None, None)


def test_the_seed_fixes_the_interval():
    values = [0.3, 2.0, -1.0, 4.0, 0.5]
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)
    assert bootstrap(values, seed=-1) is not None


def test_large_samples_are_drawn_in_parts(monkeypatch):
    values = list(np.random.default_rng(0).normal(size=50))
    whole = bootstrap(values, resamples=1000)
    monkeypatch.setattr("marlhf.evaluation.statistics._DRAWS_AT_ONCE", 120)
    assert bootstrap(values, resamples=1000) == whole


def coverage(pooled: bool) -> float:
    """How often the interval holds the true mean 0: 40 prompts, 5 like responses to each."""
    generator, hits, runs = np.random.default_rng(1), 0, 400
    for run in range(runs):
        prompts = generator.normal(size=(40, 1)) + 0.3 * generator.normal(size=(40, 5))
        values = prompts.ravel() if pooled else prompts.mean(1)
        found = bootstrap(values.tolist(), resamples=400, seed=run)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0 <= found.high
    return hits / runs


def test_intervals_cover_the_truth_as_often_as_they_say():
    assert 0.91 <= coverage(pooled=False) <= 0.98


def test_responses_taken_for_prompts_cover_too_little():
    assert coverage(pooled=True) < 0.7


# -- pass@k --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "c", "k"), [(5, 0, 2), (5, 5, 1), (6, 2, 3), (7, 3, 7), (8, 1, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n, c, k):
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def expected(estimator, n: int, p: float, k: int) -> float:
    """Mean of an estimator over binomial(n, p) numbers of passes."""
    return sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * estimator(n, c, k) for c in range(n + 1)
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_pass_at_k_is_unbiased_and_the_plug_in_is_not(p):
    truth = 1 - (1 - p) ** 3
    assert expected(pass_at_k, 5, p, 3) == pytest.approx(truth, abs=1e-12)
    plug_in = expected(lambda n, c, k: 1 - (1 - c / n) ** k, 5, p, 3)
    assert abs(plug_in - truth) > 0.005


def test_pass_at_k_is_exact_for_many_samples():
    assert pass_at_k(2000, 1, 1000) == pytest.approx(0.5, abs=1e-12)


# -- best of n -----------------------------------------------------------------------------------


def enumerated_best(scores: list[float], n: int, values: list[float]) -> float:
    """The mean over all subsets of n; where several score best, the mean of their values."""
    found = []
    for subset in combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        best = [values[i] for i in subset if scores[i] == top]
        found.append(sum(best) / len(best))
    return sum(found) / len(found)


@fast
@given(SMALL, st.data())
def test_best_of_n_is_the_mean_over_subsets(scores, data):
    n = data.draw(st.integers(1, len(scores)))
    size = len(scores)
    values = data.draw(st.lists(st.floats(-5, 5), min_size=size, max_size=size))
    assert best_of_n(scores, n) == pytest.approx(enumerated_best(scores, n, scores), abs=1e-9)
    best = best_of_n(scores, n, values)
    assert best == pytest.approx(enumerated_best(scores, n, values), abs=1e-9)


def test_best_of_n_is_unbiased_and_drawing_with_replacement_is_not():
    """Scores 0 to 3, equally likely: all 4^5 sets of five samples."""
    truth = sum(max(draw) for draw in product(range(4), repeat=3)) / 4**3
    sets = [list(map(float, draw)) for draw in product(range(4), repeat=5)]
    ours = sum(best_of_n(x, 3) for x in sets) / len(sets)
    assert ours == pytest.approx(truth, abs=1e-12)
    again = sum(max(random.Random(i).choices(x, k=3)) for i, x in enumerate(sets)) / len(sets)
    assert abs(again - truth) > 0.05


def test_the_kl_of_best_of_n():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 3 / 4)


# -- win rates and distinct n-grams --------------------------------------------------------------


def test_win_rates_weigh_prompts_alike_and_count_pairs():
    found = win_rate([[1.0, 1.0, 1.0, 0.0], [0.0], [], [0.5]])
    assert found.rate is not None
    assert found.rate.mean == pytest.approx((0.75 + 0 + 0.5) / 3)
    assert found.rate.prompts == 3
    assert (found.wins, found.ties, found.losses) == (3, 1, 2)
    assert win_rate([[], []]).rate is None


def test_outcomes():
    assert [outcome(2, 1), outcome(1, 2), outcome(1, 1)] == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("texts", "n", "share"),
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),
        (["A b.", "a B!"], 1, 4 / 6),
        (["a b", "b a"], 2, 1.0),  # none across texts
        (["a"], 2, None),
        (["", "  "], 1, None),
        (["über Über"], 1, 1 / 2),
    ],
)
def test_distinct(texts, n, share):
    assert distinct(texts, n) == (None if share is None else pytest.approx(share))
