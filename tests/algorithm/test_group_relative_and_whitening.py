"""Estimators that compare responses, and whitening, against loops; ranks do not matter."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracles
from support.strategies import Ragged, Rows, differs, example, fast, ragged
from torch import Tensor

from marlhf.algorithm import macro
from marlhf.algorithm.advantages import group_relative, whiten

# Advantages from comparing responses


numbers = st.integers(-4096, 4096).map(lambda n: n / 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce"])
@fast
@given(st.integers(2, 5), st.data())
def test_group_relative_is_the_loop(dtype, estimator, size, data):
    group = st.one_of(
        st.lists(numbers, min_size=size, max_size=size),
        numbers.map(lambda x: [x] * size),
    )
    groups = data.draw(st.lists(group, min_size=1, max_size=4))
    flat = [x for g in groups for x in g]
    result = group_relative(torch.tensor(flat, dtype=dtype), size, estimator)
    assert result.dtype == dtype
    if estimator == "reinforce":
        truth = oracles.reinforce(flat)
    else:
        truth = [a for g in groups for a in getattr(oracles, estimator)(g)]
    assert not differs(result[None], [truth])


@pytest.mark.parametrize("offset", [0.1, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_a_group_without_variance_has_no_advantage(offset, dtype, estimator):
    returns = torch.tensor([offset] * 3 + [0.0, 1.0, 2.0], dtype=dtype)
    result = group_relative(returns, 3, estimator)
    assert result.isfinite().all()
    assert (result[:3].abs() <= 1e-6 * offset).all()
    if estimator == "grpo":
        assert (result[:3] == 0).all()
    assert result[3] < -0.9


@fast
@given(st.lists(numbers, min_size=6, max_size=6), st.sampled_from(["rloo", "grpo"]))
def test_group_relative_sums_to_zero_and_follows_its_group(returns, estimator):
    x = torch.tensor(returns, dtype=torch.float64)
    result = group_relative(x, 3, estimator).reshape(2, 3)
    assert torch.allclose(result.sum(1), torch.zeros(2, dtype=torch.float64), atol=1e-9)
    swapped = group_relative(x.reshape(2, 3).flip(0).flip(1).reshape(-1), 3, estimator)
    assert torch.allclose(swapped.reshape(2, 3).flip(0).flip(1), result, atol=1e-9)
    alone = torch.cat([group_relative(part, 3, estimator) for part in x.split(3)])
    assert torch.allclose(alone.reshape(2, 3), result, atol=1e-12)


def test_group_relative_rejects_groups_that_do_not_fit():
    x = torch.arange(6.0)
    for size in (1, 4):
        with pytest.raises(ValueError, match=f"group_size: given {size}"):
            group_relative(x, size, "rloo")
    with pytest.raises(ValueError, match="'median'"):
        group_relative(x, 2, "median")


@pytest.mark.parametrize(
    ("estimator", "wrong"),
    [
        ("rloo", lambda g: g - g.mean(1, keepdim=True)),  # the response itself in its baseline
        ("rloo", lambda g: (g.sum(1, keepdim=True) - g) / 3),  # the baseline alone
        ("grpo", lambda g: (g - g.mean(1, keepdim=True)) / g.std(1, keepdim=True, correction=0)),
        ("grpo", lambda g: (g - g.mean()) / g.std()),  # over the batch
        ("reinforce", lambda g: g - g.mean(1, keepdim=True)),  # over the group
    ],
)
def test_wrong_group_estimators_are_told_apart(estimator, wrong):
    groups = [[0.0, 1.0, 3.0, 2.5], [-1.0, 4.0, 0.5, 0.25]]
    x = torch.tensor(groups, dtype=torch.float64)
    if estimator == "reinforce":
        truth = oracles.reinforce(groups[0] + groups[1])
    else:
        truth = [a for g in groups for a in getattr(oracles, estimator)(g)]
    assert not differs(group_relative(x.reshape(-1), 4, estimator)[None], [truth])
    assert differs(wrong(x).reshape(1, -1), [truth])


# Whitening


def token_counts(batch: Ragged) -> Rows:
    return [[float(len(s)) for s in oracles.segments(starts)] for starts in batch.starts]


def per_macro(batch: Ragged, name: str) -> Rows:
    rows = zip(batch.noise(name), batch.starts, strict=True)
    return [row[: sum(starts)] for row, starts in rows]


@pytest.mark.parametrize("count", ["macro", "token"])
@fast
@given(ragged())
def test_whiten_is_the_loop(count: str, batch: Ragged):
    rows, tokens = per_macro(batch, "x"), token_counts(batch)
    weights = tokens if count == "token" else [[1.0] * len(row) for row in rows]
    result = whiten(batch.pad_macro(rows), batch.pad_macro(weights, fill=0.0))
    assert result.dtype == batch.dtype
    assert not differs(result, oracles.whiten(rows, weights))
    if count == "token":
        expanded = whiten(macro.expand(batch.pad_macro(rows), batch.ids), batch.mask)
        assert not differs(macro.expand(result, batch.ids), expanded.double().tolist())


def test_whiten_has_mean_0_and_variance_1():
    batch = example()
    rows = [[3 + 2 * x for x in row] for row in per_macro(batch, "x")]
    mask = macro.macro_mask(batch.ids)
    white = whiten(batch.pad_macro(rows), mask)
    assert white[mask].mean().abs() < 1e-12
    assert abs(white[mask].var(correction=0) - 1) < 1e-6
    assert (white[~mask] == 0).all()


@pytest.mark.parametrize("x", [[0.1] * 3, [5.0], []])
def test_whiten_without_spread_is_zero(x):
    result = whiten(torch.tensor([x]), torch.ones(1, len(x)))
    assert (result.abs() < 1e-6).all()
    assert (whiten(torch.tensor([x]), torch.zeros(1, len(x))) == 0).all()


def test_wrong_whitening_is_told_apart():
    batch = example()
    rows, tokens = per_macro(batch, "x"), token_counts(batch)
    once = [[1.0] * len(row) for row in rows]
    x, mask = batch.pad_macro(rows), macro.macro_mask(batch.ids)
    truth = oracles.whiten(rows, once)
    assert not differs(whiten(x, mask), truth)
    assert differs(whiten(x, batch.pad_macro(tokens, fill=0.0)), truth)  # counted by tokens
    assert differs(whiten(x.nan_to_num(), torch.ones_like(x)) * mask, truth)  # padding counted
    by_row = torch.cat([whiten(x[b : b + 1], mask[b : b + 1]) for b in range(len(rows))])
    assert differs(by_row, truth)
    scaled_only = torch.where(mask, x / x[mask].std(correction=0), 0.0)
    assert differs(scaled_only, truth)


class Ranks:
    """Runs a function once a rank, in threads, with an all-reduce between them."""

    def __init__(self, count: int):
        self.count, self.barrier, self.parts = count, threading.Barrier(count), {}

    def run(self, function) -> list:
        results = [None] * self.count

        def work(rank: int) -> None:
            def all_reduce(x: Tensor) -> Tensor:
                self.parts[rank] = x.clone()
                self.barrier.wait(timeout=10)
                total = sum(self.parts[r] for r in range(self.count))
                self.barrier.wait(timeout=10)
                return total

            results[rank] = function(rank, all_reduce)

        threads = [threading.Thread(target=work, args=(r,)) for r in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_the_split_over_ranks_does_not_matter():
    batch = example()
    x, mask = batch.pad_macro(per_macro(batch, "x")), macro.macro_mask(batch.ids)
    cuts = [slice(0, 2), slice(2, 3), slice(3, 5)]  # the second rank has only an empty response
    parts = Ranks(3).run(lambda r, reduce: whiten(x[cuts[r]], mask[cuts[r]], reduce))
    assert torch.allclose(torch.cat(parts), whiten(x, mask), atol=1e-12)
    local = torch.cat([whiten(x[cut], mask[cut]) for cut in cuts])
    assert not torch.allclose(local, whiten(x, mask), atol=1e-3)

    returns = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    parts = Ranks(3).run(lambda r, reduce: group_relative(returns[cuts[r]], 1, "reinforce", reduce))
    assert torch.allclose(torch.cat(parts), returns - 6.2)
