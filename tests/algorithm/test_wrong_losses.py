"""Negative controls: plausible mistakes in the losses must be told apart from the loops."""

from __future__ import annotations

import math

import pytest
import torch
from support import oracles
from support.loss_inputs import expected_policy_sum, policy_inputs
from support.strategies import Ragged, differs_scalar, example
from torch import Tensor

from marlhf.algorithm import macro
from marlhf.algorithm.losses import policy_loss, value_loss

# Wrong implementations, which the comparison with the loop must tell from the right one.


def policy_parts(batch: Ragged) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = policy_inputs(batch)
    log_ratio = (inputs["logprobs_BT"] - inputs["old_logprobs_BT"]).nan_to_num()
    return log_ratio, inputs["advantages_BT"].nan_to_num(), batch.mask, batch.ids


def surrogate(r: Tensor, a: Tensor, mask: Tensor, pick=torch.maximum) -> Tensor:
    return (pick(-a * r, -a * r.clamp(0.8, 1.2)) * mask).sum() / mask.sum()


def optimistic(batch: Ragged) -> Tensor:
    """The larger gain instead of the smaller."""
    x, a, mask, _ = policy_parts(batch)
    return surrogate(x.exp(), a, mask, torch.minimum)


def unclipped(batch: Ragged) -> Tensor:
    x, a, mask, _ = policy_parts(batch)
    return (-a * x.exp() * mask).sum() / mask.sum()


def inverted(batch: Ragged) -> Tensor:
    """Old over new."""
    x, a, mask, _ = policy_parts(batch)
    return surrogate((-x).exp(), a, mask)


def padding_in_denominator(batch: Ragged) -> Tensor:
    x, a, mask, _ = policy_parts(batch)
    return surrogate(x.exp(), a, mask) * mask.sum() / mask.numel()


def mean_of_row_means(batch: Ragged) -> Tensor:
    x, a, mask, _ = policy_parts(batch)
    rows = [surrogate(x[b].exp(), a[b], mask[b]) for b in range(len(x)) if mask[b].any()]
    return torch.stack(rows).mean()


def shifted_advantages(batch: Ragged) -> Tensor:
    x, a, mask, _ = policy_parts(batch)
    return surrogate(x.exp(), a.roll(1, 1), mask)


def arithmetic_mean(batch: Ragged) -> Tensor:
    x, a, mask, ids = policy_parts(batch)
    return surrogate(macro.expand(macro.reduce(x.exp(), ids, "equal"), ids), a, mask)


def mean_over_the_row(batch: Ragged) -> Tensor:
    """One ratio a response, whatever its macro actions."""
    x, a, mask, ids = policy_parts(batch)
    whole = ids.clamp(max=0)
    return surrogate(macro.expand(macro.reduce(x, whole, "equal"), whole), a, mask)


def product_for_each_token(batch: Ragged) -> Tensor:
    """The product's ratio counted once a token."""
    x, a, mask, ids = policy_parts(batch)
    return surrogate(macro.expand(macro.reduce(x, ids, "sum"), ids), a, mask)


def product_of_clipped(batch: Ragged) -> Tensor:
    """Tokens clipped one by one, then multiplied."""
    x, a, mask, ids = policy_parts(batch)
    r = macro.reduce(x.exp().clamp(0.8, 1.2).log(), ids, "sum").exp()
    a = macro.reduce(a, ids, "first")
    return (-a * r * macro.macro_mask(ids)).sum() / mask.sum()


def product_over_macro_count(batch: Ragged) -> Tensor:
    x, a, _, ids = policy_parts(batch)
    r, a = macro.reduce(x, ids, "sum").exp(), macro.reduce(a, ids, "first")
    return surrogate(r, a, macro.macro_mask(ids))


WRONG_POLICY = {
    "token": [
        optimistic,
        unclipped,
        inverted,
        padding_in_denominator,
        mean_of_row_means,
        shifted_advantages,
    ],
    "macro_mean": [arithmetic_mean, mean_over_the_row, product_for_each_token],
    "macro_product": [product_for_each_token, product_of_clipped, product_over_macro_count],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ratio", "wrong"), [(r, w) for r, ws in WRONG_POLICY.items() for w in ws])
def test_wrong_policy_losses_are_told_apart(ratio: str, wrong, dtype: torch.dtype):
    batch = example(dtype)
    truth = expected_policy_sum(batch, 0.2, ratio) / sum(batch.lengths)
    right, _ = policy_loss(
        **policy_inputs(batch), clip_range=0.2, ratio=ratio, segment_ids=batch.ids
    )
    assert not differs_scalar(right, truth)
    assert wrong(batch).isfinite()
    assert differs_scalar(wrong(batch), truth)


WRONG_VALUE = {
    "smaller of the two": lambda v, old, g: torch.minimum(
        (v - g) ** 2, (old + (v - old).clamp(-0.2, 0.2) - g) ** 2
    ),
    "clipped only": lambda v, old, g: (old + (v - old).clamp(-0.2, 0.2) - g) ** 2,
    "unclipped": lambda v, old, g: (v - g) ** 2,
    "clipped around the return": lambda v, old, g: torch.maximum(
        (v - g) ** 2, (v - g).clamp(-0.2, 0.2) ** 2
    ),
    "without the half": lambda v, old, g: (
        2 * torch.maximum((v - g) ** 2, (old + (v - old).clamp(-0.2, 0.2) - g) ** 2)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRONG_VALUE)
def test_wrong_value_losses_are_told_apart(name: str, dtype: torch.dtype):
    batch = example(dtype)
    rows = [batch.noise(n) for n in ("values", "old values", "returns")]
    tokens = sum(batch.lengths)
    truth = math.fsum(oracles.value_loss_sum(*r, 0.2) for r in zip(*rows, strict=True)) / tokens
    tensors = [batch.pad(r) for r in rows]
    assert not differs_scalar(value_loss(*tensors, batch.mask, 0.2)[0], truth)
    wrong = 0.5 * WRONG_VALUE[name](*tensors).nan_to_num().sum() / tokens
    assert differs_scalar(wrong, truth)
