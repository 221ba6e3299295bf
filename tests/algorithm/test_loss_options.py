"""Options of the policy loss, against loops: asymmetric and dual clipping, aggregation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.loss_inputs import logprobs, per_macro_advantages, policy_inputs
from support.strategies import Ragged, differs_scalar, fast, ragged

from marlhf.algorithm.losses import aggregation, entropy_bonus, kl_loss, policy_loss


def looped(
    batch: Ragged, low: float, high: float, dual_clip: float | None = None
) -> list[list[float]]:
    """The loss of each token, by cases."""
    rows = []
    for new, old, advantages in zip(*logprobs(batch), per_macro_advantages(batch), strict=True):
        row = []
        for x, y, a in zip(new, old, advantages, strict=True):
            r = math.exp(x - y)
            if a >= 0:
                row.append(-a * min(r, 1 + high))
            else:
                loss = -a * max(r, 1 - low)
                row.append(loss if dual_clip is None else min(loss, -a * dual_clip))
        rows.append(row)
    return rows


@fast
@given(ragged(), st.sampled_from([(0.1, 0.3), (0.3, 0.1), (0.2, 0.2)]))
def test_two_clip_ranges_are_the_loop(batch: Ragged, clip_range: tuple[float, float]) -> None:
    loss, _ = policy_loss(**policy_inputs(batch), clip_range=list(clip_range))
    total = math.fsum(map(math.fsum, looped(batch, *clip_range)))
    assert not differs_scalar(loss, total / sum(batch.lengths))


@fast
@given(ragged(), st.sampled_from([1.05, 1.2, 3.0]))
def test_dual_clipping_is_the_loop(batch: Ragged, dual_clip: float) -> None:
    loss, _ = policy_loss(**policy_inputs(batch), clip_range=0.2, dual_clip=dual_clip)
    total = math.fsum(map(math.fsum, looped(batch, 0.2, 0.2, dual_clip)))
    assert not differs_scalar(loss, total / sum(batch.lengths))


def test_beyond_the_dual_clip_there_is_no_gradient() -> None:
    new = torch.tensor([[2.0, 2.0, 0.1]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    advantages = torch.tensor([[-1.0, 1.0, -1.0]], dtype=torch.float64)
    loss, _ = policy_loss(new, old, advantages, mask, 0.2, dual_clip=3.0)
    loss.backward()
    assert new.grad is not None
    assert new.grad[0].tolist() == pytest.approx([0.0, 0.0, math.exp(0.1) / 3])


@pytest.mark.parametrize("how", ["token", "response", "constant"])
@fast
@given(ragged(), st.integers(1, 3))
def test_averages_are_the_loop(how: str, batch: Ragged, copies: int) -> None:
    """Of one of `copies` equal shares of an optimiser step."""
    limit, rows = 20, looped(batch, 0.2, 0.2)
    tokens, responses = copies * sum(batch.lengths), copies * len(rows)
    weights, denominator = aggregation(batch.mask, how, tokens, responses, limit)
    settings = {"clip_range": 0.2, "weights_BT": weights, "denominator": denominator}
    loss, _ = policy_loss(**policy_inputs(batch), **settings)
    if how == "token":
        wanted = math.fsum(map(math.fsum, rows)) / sum(batch.lengths)
    elif how == "response":
        wanted = math.fsum(math.fsum(row) / max(len(row), 1) for row in rows) / len(rows)
    else:
        wanted = math.fsum(math.fsum(row) / limit for row in rows) / len(rows)
    assert not differs_scalar(loss * copies, wanted)


def test_the_kl_is_averaged_as_the_loss() -> None:
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    new, ref = torch.randn(2, 2, 4, dtype=torch.float64)
    weights, denominator = aggregation(mask, "response", 5.0, 2.0, 4)
    k3 = torch.expm1(ref - new) - (ref - new)
    wanted = (k3[0].mean() + k3[1, 0]) / 2
    torch.testing.assert_close(kl_loss(new, ref, mask, denominator, weights), wanted)


@fast
@given(ragged())
def test_the_entropy_bonus_is_the_loop(batch: Ragged) -> None:
    rows = [[abs(x) for x in row] for row in batch.noise("entropy")]
    wanted = math.fsum(map(math.fsum, rows)) / sum(batch.lengths)
    assert not differs_scalar(entropy_bonus(batch.pad(rows), batch.mask), wanted)
