"""Importance weights against loops, and the expected gradient where all responses can be listed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracles
from support.loss_inputs import logprobs, per_macro_advantages, policy_inputs
from support.strategies import Ragged, differs, differs_scalar, fast, ragged
from torch import Tensor

from marlhf.algorithm.importance import importance_weights
from marlhf.algorithm.losses import policy_loss

RATIOS = ["token", "macro_mean", "macro_product"]


def looped_weights(batch: Ragged, cap: float, ratio: str) -> list[list[float]]:
    """Per token, by loops."""
    rows = []
    for pi, mu, starts in zip(*logprobs(batch), batch.starts, strict=True):
        row: list[float] = []
        for i, start in enumerate(starts):
            if ratio == "macro_product":
                if start:
                    stop = next((j for j in range(i + 1, len(pi)) if starts[j]), len(pi))
                    log_weight = math.fsum(pi[j] - mu[j] for j in range(i, stop))
            else:
                log_weight = pi[i] - mu[i]
            row.append(min(math.exp(log_weight), cap))
        rows.append(row)
    return rows


@pytest.mark.parametrize("ratio", RATIOS)
@fast
@given(ragged(), st.sampled_from([1.0, 1.1, 2.0]))
def test_weights_are_the_loop(ratio: str, batch: Ragged, cap: float) -> None:
    pi, mu = map(batch.pad, logprobs(batch))
    weights = importance_weights(pi, mu, batch.mask, cap, ratio, batch.ids)
    assert not differs(weights, looped_weights(batch, cap, ratio))
    assert bool((weights[~batch.mask] == 0).all())


@pytest.mark.parametrize("ratio", RATIOS)
@fast
@given(ragged(), st.sampled_from([0.05, 0.5]))
def test_the_loss_weighs_its_terms(ratio: str, batch: Ragged, clip_range: float) -> None:
    """Each token's, or with `macro_product` each macro action's."""
    weights = looped_weights(batch, 1.2, ratio)
    settings = {"clip_range": clip_range, "ratio": ratio, "segment_ids": batch.ids}
    loss, _ = policy_loss(**policy_inputs(batch), **settings, weights_BT=batch.pad(weights))
    terms = []
    rows = zip(*logprobs(batch), per_macro_advantages(batch), batch.starts, weights, strict=True)
    for new, old, advantages, starts, row in rows:
        if ratio == "macro_product":
            advantages, row = (oracles.reduce(x, starts, "first") for x in (advantages, row))
        ratios = oracles.ratios(new, old, starts, ratio)
        terms += [
            w * oracles.clipped(r, a, clip_range)
            for w, r, a in zip(row, ratios, advantages, strict=True)
        ]
    assert not differs_scalar(loss, math.fsum(terms) / sum(batch.lengths))


# a policy over two tokens of three kinds, all of whose responses can be listed

RESPONSES = torch.tensor(list(itertools.product(range(3), repeat=2)))


def response_logprobs(theta: Tensor) -> Tensor:
    """Log-probabilities [9,2] of the tokens; `theta` [4,3] has the logits after each prefix."""
    first = theta[0].log_softmax(0)[RESPONSES[:, 0]]
    second = theta[1:].log_softmax(1)[RESPONSES[:, 0], RESPONSES[:, 1]]
    return torch.stack([first, second], 1)


def top_p(theta: Tensor, p: float) -> Tensor:
    """The logits that top-p sampling leaves."""
    ordered = theta.softmax(1).sort(1, descending=True)
    kept = torch.zeros_like(theta, dtype=torch.bool)
    kept.scatter_(1, ordered.indices, ordered.values.cumsum(1) - ordered.values < p)
    return theta.masked_fill(~kept, -torch.inf)


def expected_gradient(theta: Tensor, mu: Tensor, rewards: Tensor, *, weighted: bool) -> Tensor:
    """Of the policy loss over responses drawn from `mu`, times -2 tokens per response."""
    theta = theta.clone().requires_grad_()
    pi, drawn_with = response_logprobs(theta), response_logprobs(mu)
    gradient = torch.zeros_like(theta)
    for i in range(len(RESPONSES)):
        probability = drawn_with[i].sum().exp()
        if probability == 0:
            continue
        row, mask = pi[i : i + 1], torch.ones(1, 2, dtype=torch.bool)
        ids = torch.zeros(1, 2, dtype=torch.int64)
        weights = None
        if weighted:
            sampled = drawn_with[i : i + 1].detach()
            weights = importance_weights(row.detach(), sampled, mask, 1e9, "macro_product", ids)
        advantages = rewards[i].expand(1, 2)
        old = row.detach()
        loss, _ = policy_loss(
            row, old, advantages, mask, 0.2, "macro_product", ids, weights_BT=weights
        )
        (part,) = torch.autograd.grad(loss, theta, retain_graph=True)
        gradient += -2 * probability * part
    return gradient


def true_gradient(theta: Tensor, rewards: Tensor, among: Tensor) -> Tensor:
    """Of the expected reward, as far as it comes from the responses of a mask [9]."""
    theta = theta.clone().requires_grad_()
    (response_logprobs(theta).sum(1).exp() * rewards)[among].sum().backward()
    assert theta.grad is not None
    return theta.grad


@fast
@given(st.integers(0, 2**31), st.sampled_from(["rounded", "another temperature", "top-p"]))
def test_the_expected_gradient_is_the_true_one(seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    rewards = torch.randn(9, generator=generator, dtype=torch.float64)
    mu = {
        "rounded": theta + 0.1 * torch.randn(4, 3, generator=generator, dtype=torch.float64),
        "another temperature": theta / 1.3,
        "top-p": top_p(theta, 0.8),
    }[kind]
    drawn = response_logprobs(mu).sum(1).exp() > 0
    wanted = true_gradient(theta, rewards, drawn)
    found = expected_gradient(theta, mu, rewards, weighted=True)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    if kind == "another temperature":
        biased = expected_gradient(theta, mu, rewards, weighted=False)
        assert float((biased - wanted).abs().max()) > 1e-4
