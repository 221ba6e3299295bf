"""Which rows go together, and how little of that is padding."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf.rollout import batching
from marlhf.rollout.batching import micro_batches, redrawn_minibatches

spans = st.tuples(st.integers(0, 5), st.integers(1, 6))  # padding on the left, tokens


def masks(rows: list[tuple[int, int]]) -> torch.Tensor:
    columns = torch.arange(12)
    return torch.stack([(columns >= left) & (columns < left + tokens) for left, tokens in rows])


def cost(mask: torch.Tensor, parts: list[torch.Tensor], pass_cost: int) -> int:
    total = 0
    for part in parts:
        kept = mask[part].any(0).nonzero()
        total += len(part) * int(kept.max() - kept.min() + 1) + pass_cost
    return total


@given(st.lists(spans, min_size=1, max_size=6), st.integers(1, 4), st.sampled_from([0, 3, 100]))
def test_no_other_split_of_the_sorted_rows_costs_less(rows, size: int, pass_cost: int) -> None:
    mask = masks(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "CPU_PASS_COST", pass_cost)
        parts = micro_batches(mask, size)
    order = mask.sum(1).argsort(stable=True)
    assert torch.equal(torch.cat(parts), order)
    every = (
        list(order.split([b - a for a, b in itertools.pairwise((0, *cuts, len(order)))]))
        for n in range(len(order))
        for cuts in itertools.combinations(range(1, len(order)), n)
    )
    allowed = [split for split in every if max(map(len, split)) <= size]
    assert cost(mask, parts, pass_cost) == min(cost(mask, split, pass_cost) for split in allowed)


@given(st.lists(spans, min_size=1, max_size=6), st.integers(1, 4))
def test_parts_of_ranks_are_as_many_whatever_the_rows(rows, size: int) -> None:
    parts = micro_batches(masks(rows), size, same_count=True)
    assert len(parts) == -(-len(rows) // size)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(rows)))


def test_a_long_pass_is_cut_where_rows_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "CPU_PASS_LIMIT", 20)
    monkeypatch.setattr(batching, "CPU_PASS_COST", 1)
    rows = torch.ones(5, 8, dtype=torch.bool)
    assert sorted(len(part) for part in micro_batches(rows, 5)) == [1, 2, 2]
    longer = torch.ones(2, 30, dtype=torch.bool)  # a row too long for a pass is one by itself
    assert [len(part) for part in micro_batches(longer, 5)] == [1, 1]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_redrawn_minibatches_are_a_split_whatever_the_ranks(ranks: int) -> None:
    """Of 16 prompts with 3 responses each, in 4 minibatches."""
    alone = [set(part.tolist()) for part in redrawn_minibatches(48, 3, 4, seed=5, epoch=1)]
    share = 48 // ranks
    together: list[set[int]] = [set() for _ in range(4)]
    for rank in range(ranks):
        parts = redrawn_minibatches(share, 3, 4, seed=5, epoch=1, rank=rank)
        assert {len(part) for part in parts} == {share // 4}
        for found, part in zip(together, parts, strict=True):
            found |= {rank * share + i for i in part.tolist()}
    assert together == alone
    assert set().union(*alone) == set(range(48))
    for part in alone:
        assert {i // 3 * 3 + k for i in part for k in range(3)} == part  # no prompt is cut


def test_every_epoch_and_update_draws_other_minibatches_evenly() -> None:
    def first(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(redrawn_minibatches(8, 1, 2, seed, epoch)[0].tolist())

    draws = [first(seed, epoch) for seed in range(100) for epoch in (1, 2)]
    assert len(set(draws)) == 16  # 2 choices in each of 4 pairs
    for prompt in range(8):
        assert 70 < sum(prompt in draw for draw in draws) < 130
