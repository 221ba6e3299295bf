"""Statistics of an audit: against plain loops, and on a process whose truth can be listed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from marlhf.algorithm.experience import TokenData
from marlhf.credit import agreement, results
from marlhf.credit.agreement import Halves
from marlhf.credit.results import Evidence
from marlhf.credit.truth import halves, true_advantages, true_values
from marlhf.evaluation.statistics import bootstrap, bootstrap_statistics
from marlhf.runs.rollouts import KeptRollout
from marlhf.testing.toy import Toy

GENERATOR = np.random.default_rng(0)
COUNTS = np.array([[1.0, 1, 1, 1, 1, 1], [2, 0, 1, 0, 3, 0], [0, 1, 1, 2, 1, 1]])
X = np.array([0.5, -1.0, 2.0, 0.5, 0.0, 0.5])
H1, H2 = np.array([1.0, -2, 3, 0.2, -0.1, 0.7]), np.array([0.8, -1, 2, 0.9, -0.3, 0.7])


def repeated(x: np.ndarray, counts: np.ndarray) -> list[float]:
    return [float(v) for v, n in zip(x, counts, strict=True) for _ in range(int(n))]


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    a, b = sum(x) / len(x), sum(y) / len(y)
    products = sum((u - a) * (v - b) for u, v in zip(x, y, strict=True))
    return products / math.sqrt(sum((u - a) ** 2 for u in x) * sum((v - b) ** 2 for v in y))


def ranked(x: Sequence[float]) -> list[float]:
    return [sum(v < u for v in x) + sum(v == u for v in x) / 2 for u in x]


@pytest.mark.parametrize("row", range(len(COUNTS)))
def test_agreement_is_that_of_lists_with_repetitions(row: int) -> None:
    x, one, other = (repeated(v, COUNTS[row]) for v in (X, H1, H2))
    truth = [(u + v) / 2 for u, v in zip(one, other, strict=True)]
    of_ranks = agreement.rank_agreement(COUNTS, X, Halves(H1, H2))
    measured = correlation(ranked(x), ranked(truth))
    r = correlation(ranked(one), ranked(other))
    wanted = [measured, measured / math.sqrt(2 * r / (1 + r)), 2 * r / (1 + r)]
    assert [float(v[row]) for v in of_ranks] == pytest.approx(wanted)

    def share(y: Sequence[float], z: Sequence[float]) -> float:
        agree = [0.5 if u * v == 0 else float(u * v > 0) for u, v in zip(y, z, strict=True)]
        return sum(agree) / len(agree)

    of_signs = agreement.sign_agreement(COUNTS, X, Halves(H1, H2))
    s = math.sin(math.pi * (share(one, other) - 0.5))
    reliability = 2 * s / (1 + s)
    r = math.sin(math.pi * (share(x, truth) - 0.5)) / math.sqrt(reliability)
    wanted = [share(x, truth), 0.5 + math.asin(min(1, max(-1, r))) / math.pi, reliability]
    assert [float(v[row]) for v in of_signs] == pytest.approx(wanted)


@pytest.mark.parametrize("row", range(len(COUNTS)))
def test_values_are_measured_as_by_loops(row: int) -> None:
    x, one, other = (repeated(v, COUNTS[row]) for v in (X, H1, H2))
    n, truth = len(x), Halves(H1, H2)
    bias = sum(v - (a + b) / 2 for v, a, b in zip(x, one, other, strict=True)) / n
    square = sum((v - a) * (v - b) for v, a, b in zip(x, one, other, strict=True)) / n
    assert float(agreement.bias(COUNTS, X, truth)[row]) == pytest.approx(bias)
    assert float(agreement.error(COUNTS, X, truth)[row]) == pytest.approx(math.sqrt(max(square, 0)))
    rest = [[v - a for v, a in zip(x, h, strict=True)] for h in (one, other)]

    def covariance(y: Sequence[float], z: Sequence[float]) -> float:
        a, b = sum(y) / n, sum(z) / n
        return sum((u - a) * (v - b) for u, v in zip(y, z, strict=True)) / n

    explained = 1 - covariance(rest[0], rest[1]) / covariance(one, other)
    assert float(agreement.explained(COUNTS, X, truth)[row]) == pytest.approx(explained)
    excess = covariance(rest[0], rest[1]) - covariance(one, other)
    assert float(agreement.excess(COUNTS, X, truth)[row]) == pytest.approx(excess)


def judged(values: torch.Tensor, truth: torch.Tensor, noise: float) -> dict[str, Any]:
    """A critic's numbers by two responses to each prompt and four continuations, all [B,T]."""
    returns = truth[:, :, None] + noise * torch.randn(*truth.shape, 4, dtype=torch.float64)
    kept = KeptRollout({"values": values}, {})
    places = torch.ones(truth.shape, dtype=torch.bool)
    numbers = results.of_critic(Evidence(kept, 2, places, returns, 0.0, 1.0))
    assert numbers is not None
    return numbers


def test_noise_is_worse_than_a_constant_though_the_truth_hardly_varies() -> None:
    torch.manual_seed(0)
    truth, noise = 0.1 + 0.02 * torch.randn(16, 5), torch.randn(16, 5)
    of_noise = judged(noise, truth, noise=0.5)
    assert of_noise["explained"] is None or of_noise["explained"]["low"] is None
    assert of_noise["verdict"] == "worse than a constant"
    cannot = "too few prompts, or too little variance of the truth, to tell"
    assert judged(0.01 * noise, truth, noise=0.5)["verdict"] == cannot
    assert judged(noise[:8], truth[:8], noise=0.5)["verdict"] == cannot
    constant = judged(torch.full_like(truth, 0.1), truth, noise=0.5)
    assert constant["excess"] == {"value": 0, "low": 0, "high": 0}
    assert constant["verdict"] != "worse than a constant"


def test_as_good_as_a_constant_is_seldom_called_worse_or_better() -> None:
    """Whatever the truth's own noise: the variance of these values is twice their covariance."""
    torch.manual_seed(0)
    verdicts = []
    for noise in (0.0, 2.0):
        for _ in range(100):
            truth, other = (torch.randn(12, 1).repeat_interleave(2, 0) for _ in range(2))
            truth, other = (x + torch.randn(24, 5) for x in (truth, other))
            verdicts.append(judged(truth - other, truth, noise)["verdict"])
    for wrong in ("worse", "better"):
        assert sum(verdict.startswith(wrong) for verdict in verdicts) <= 20


def test_signal_to_noise_is_that_of_pairs_of_different_prompts() -> None:
    g = GENERATOR.normal(1, 1, (6, 3))
    found = agreement.signal_to_noise(COUNTS, g @ g.T)
    for row, counts in enumerate(COUNTS):
        drawn = [i for i, n in enumerate(counts) for _ in range(int(n))]
        pairs = [float(g[i] @ g[j]) for i in drawn for j in drawn if i != j]
        squares = [float(g[i] @ g[i]) for i in drawn]
        mean = sum(pairs) / len(pairs)
        assert float(found[row]) == pytest.approx(mean / (sum(squares) / len(squares) - mean))


def test_what_is_undefined_is_said_to_be() -> None:
    ones, zeros = np.ones((1, 6)), np.zeros(6)
    noise = agreement.rank_agreement(ones, X, Halves(H1, -H1))
    assert math.isnan(noise.reliability[0])
    assert math.isnan(noise.corrected[0])
    assert math.isnan(agreement.correlation(ones, X, zeros)[0])
    assert math.isnan(agreement.explained(ones, X, Halves(zeros, zeros))[0])
    estimates = bootstrap_statistics(lambda w: [w[:, 0] * math.nan, w.mean(1)], 6, 6)
    assert estimates[0] is None
    assert estimates[1] is not None


def test_the_bootstrap_of_a_mean_is_the_one_there_was() -> None:
    (found,) = bootstrap_statistics(lambda w: [agreement.mean(w, X)], 6, 10**6, 500, seed=3)
    wanted = bootstrap(X.tolist(), 500, seed=3)
    assert found is not None
    assert wanted is not None
    assert [found.mean, found.low, found.high] == pytest.approx(
        [wanted.mean, wanted.low, wanted.high]
    )


def test_bins_hold_all_positions_and_about_equally_many() -> None:
    positions = np.array([0.0] * 40 + list(range(1, 41)))
    found = agreement.bins(positions, 4)
    assert found[0] == (0, 0)
    assert [a for a, _ in found[1:]] == [b + 1 for _, b in found[:-1]]
    assert found[-1][1] == 40
    assert len(agreement.bins(np.arange(3.0), 8)) == 3


# --- a process whose truth can be listed


class Sampled:
    """A response of each of many toys, continuations of all its prefixes, and exact values."""

    def __init__(self, prompts: int, count: int, seed: int = 1) -> None:
        self.draw = random.Random(seed)
        T = 4
        self.mask = torch.zeros(prompts, T, dtype=torch.bool)
        zeros = torch.zeros(prompts, T, dtype=torch.float64)
        rewards, self.exact, self.variance = (zeros.clone() for _ in range(3))
        self.returns = torch.full((prompts, T, count), torch.nan, dtype=torch.float64)
        for b in range(prompts):
            toy = Toy(longest=T, seed=1000 * seed + b)
            response = self.rest(toy, ())
            self.mask[b, : len(response)] = True
            rewards[b, : len(response)] = torch.tensor(toy.rewards(response))
            for t in range(len(response)):
                begun = response[:t]
                self.exact[b, t] = toy.value(begun)
                self.variance[b, t] = square(toy, begun) - toy.value(begun) ** 2
                whole = [self.rest(toy, begun) for _ in range(count)]
                self.returns[b, t] = torch.tensor([sum(toy.rewards(r)[t:]) for r in whole])
        self.tokens = TokenData(self.mask, zeros, rewards, None, None, self.mask.any(1))
        self.owners = self.mask.nonzero()[:, 0].numpy()

    def rest(self, toy: Toy, begun: tuple[int, ...]) -> tuple[int, ...]:
        while begun in toy.prefixes:
            chances = toy.logits[toy.prefixes.index(begun)].softmax(0).tolist()
            begun = (*begun, self.draw.choices(range(3), chances)[0])
        return begun

    def intervals(self, *statistics: object) -> list[tuple[float, float, float]]:
        found = bootstrap_statistics(
            lambda w: [f(w[:, self.owners]) for f in statistics],  # pyright: ignore
            len(self.mask),
            len(self.owners),
            300,
        )
        return [(x.mean, x.low, x.high) for x in found]  # pyright: ignore


def square(toy: Toy, begun: tuple[int, ...]) -> float:
    """Expected square of the return from a prefix on."""
    if begun not in toy.prefixes:
        return 0.0
    s = toy.prefixes.index(begun)
    total = 0.0
    for token, p in enumerate(toy.logits[s].softmax(0).tolist()):
        r, after = float(toy.token_rewards[s, token]), (*begun, token)
        total += p * (r**2 + 2 * r * toy.value(after) + square(toy, after))
    return total


@pytest.fixture(scope="module")
def sampled() -> Sampled:
    return Sampled(prompts=200, count=8)


def test_the_truth_of_values_is_the_exact_one(sampled: Sampled) -> None:
    mask, truth = sampled.mask, true_values(sampled.returns, sampled.mask)
    exact = sampled.exact[mask].numpy()
    z = (truth.mean - exact) / np.sqrt(sampled.variance[mask].numpy() / 8)
    assert np.abs(z).max() < 5
    assert np.mean(z**2) == pytest.approx(1, abs=0.2)
    bias, error, explained = sampled.intervals(
        lambda w: agreement.bias(w, exact, truth),
        lambda w: agreement.error(w, exact, truth),
        lambda w: agreement.explained(w, exact, truth),
    )
    assert bias[1] < 0 < bias[2]
    assert error[0] < 0.2 * exact.std()
    assert explained[1] < 1 < explained[2]


def test_a_critic_of_noise_and_one_too_high_are_found_out(sampled: Sampled) -> None:
    truth = true_values(sampled.returns, sampled.mask)
    exact = sampled.exact[sampled.mask].numpy()
    noise = GENERATOR.normal(0, exact.std(), len(exact))
    (of_noise,) = sampled.intervals(lambda w: agreement.explained(w, noise, truth))
    assert of_noise[2] < 0
    high = exact + 0.7
    bias, error, explained = sampled.intervals(
        lambda w: agreement.bias(w, high, truth),
        lambda w: agreement.error(w, high, truth),
        lambda w: agreement.explained(w, high, truth),
    )
    assert bias[1] < 0.7 < bias[2]
    assert error[1] < 0.7 < error[2]
    assert explained[1] < 1 < explained[2]


@pytest.mark.parametrize("n", [1, 2])
def test_advantages_and_their_agreement_are_the_exact_ones(sampled: Sampled, n: int) -> None:
    starts = (torch.arange(sampled.mask.shape[1]) % n == 0) & sampled.mask
    truth = true_advantages(sampled.returns, starts, sampled.tokens, 1.0)
    doubled = sampled.exact[:, :, None].expand(-1, -1, 2)
    exact = true_advantages(doubled, starts, sampled.tokens, 1.0).mean
    rewards, wanted = sampled.tokens.task_rewards, []
    for b, row in enumerate(starts.tolist()):
        begins = [t for t, is_start in enumerate(row) if is_start]
        for t, end in zip(begins, [*begins[1:], len(row)], strict=True):
            after = float(sampled.exact[b, end]) if end < len(row) else 0.0
            wanted.append(float(rewards[b, t:end].sum()) + after - float(sampled.exact[b, t]))
    assert exact.tolist() == pytest.approx(wanted)
    sampled.owners = starts.nonzero()[:, 0].numpy()
    measured, corrected, reliability, signs = sampled.intervals(
        lambda w: agreement.rank_agreement(w, exact, truth).measured,
        lambda w: agreement.rank_agreement(w, exact, truth).corrected,
        lambda w: agreement.rank_agreement(w, exact, truth).reliability,
        lambda w: agreement.sign_agreement(w, exact, truth).corrected,
    )
    assert measured[2] < 1  # the truth's noise
    assert corrected[1] < 1 < corrected[2] + 0.02
    assert measured[0] ** 2 == pytest.approx(reliability[0], abs=0.07)
    assert signs[0] > 0.9
    half = GENERATOR.permutation(exact)
    (of_noise,) = sampled.intervals(lambda w: agreement.rank_agreement(w, half, truth).corrected)
    assert of_noise[1] < 0.15
    sampled.owners = sampled.mask.nonzero()[:, 0].numpy()


def test_halves_share_no_continuation(sampled: Sampled) -> None:
    one, other = halves(sampled.returns)
    mask = sampled.mask
    assert torch.equal(one[mask], sampled.returns[mask][:, :4].mean(1))
    assert torch.equal(other[mask], sampled.returns[mask][:, 4:].mean(1))


def test_the_noise_of_a_gradient_is_that_of_an_enumeration() -> None:
    """Of the exact advantage, and of the whole return, whose noise is larger."""
    toy = Toy(longest=4, seed=11)
    logits = toy.logits.clone().requires_grad_()
    chances, gradients = [], {"exact": [], "return": []}
    for response in toy.responses:
        logprobs = toy.logprobs(response, logits)
        chances.append(float(logprobs.sum().exp()))
        after = [toy.value(response[: t + 1]) for t in range(len(response))]
        before = [toy.value(response[:t]) for t in range(len(response))]
        rewards = toy.rewards(response)
        terms = zip(rewards, after, before, strict=True)
        credits = {
            "exact": torch.tensor([r + v - u for r, v, u in terms]),
            "return": torch.full((len(response),), sum(rewards)),
        }
        for name, credit in credits.items():
            (g,) = torch.autograd.grad((logprobs * credit).sum(), logits, retain_graph=True)
            gradients[name].append(g.reshape(-1).numpy())
    p = np.array(chances)
    drawn = GENERATOR.choice(len(p), 1500, p=p)
    exact = {}
    for name, rows in gradients.items():
        g = np.array(rows)
        mean = p @ g
        assert mean == pytest.approx(toy.gradient(range(toy.longest)).reshape(-1).numpy(), abs=1e-6)
        signal = float(mean @ mean)
        exact[name] = signal / float(p @ (g * g).sum(1) - signal)
        products = g[drawn] @ g[drawn].T
        (found,) = bootstrap_statistics(
            lambda w, products=products: [agreement.signal_to_noise(w, products)], 1500, 1500, 200
        )
        assert found is not None
        assert found.low < exact[name] < found.high  # pyright: ignore
    assert exact["exact"] > 1.2 * exact["return"]
