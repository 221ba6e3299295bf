"""From tokens to macro actions and back, against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracles
from support.strategies import Ragged, differs, example, fast, ragged

from marlhf.algorithm import macro

HOWS = ["equal", "position", "last", "first", "sum"]
unit_interval = st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])


@fast
@given(ragged())
def test_segment_ids_partition_every_response(batch: Ragged):
    ids = batch.ids
    assert ids.dtype == torch.int64
    assert ids.shape == batch.mask.shape
    for b, starts in enumerate(batch.starts):
        row = ids[b].tolist()
        assert row[: len(starts)] == oracles.segment_ids(starts)
        assert set(row[len(starts) :]) <= {-1}
        positions = [t for segment in oracles.segments(starts) for t in segment]
        assert positions == list(range(len(starts)))


@fast
@given(ragged())
def test_starts_on_padding_are_ignored(batch: Ragged):
    assert torch.equal(macro.segment_ids(batch.padded_starts | ~batch.mask, batch.mask), batch.ids)


@fast
@given(ragged())
def test_macro_mask_and_lengths_count_macro_actions_and_tokens(batch: Ragged):
    mask = macro.macro_mask(batch.ids)
    lengths = macro.macro_lengths(batch.ids)
    counts = [sum(row) for row in batch.starts]
    assert mask.dtype == torch.bool
    assert mask.shape == lengths.shape == (len(counts), max(counts))
    for b, starts in enumerate(batch.starts):
        assert mask[b].tolist() == [k < counts[b] for k in range(max(counts))]
        widths = [len(segment) for segment in oracles.segments(starts)]
        assert lengths[b].tolist() == widths + [0] * (max(counts) - len(widths))
    assert lengths.sum(1).tolist() == batch.lengths


@pytest.mark.parametrize("how", HOWS)
@fast
@given(ragged(), unit_interval)
def test_reduce_is_the_loop(how: str, batch: Ragged, discount: float):
    x = batch.noise("x")
    result = macro.reduce(batch.pad(x), batch.ids, how, discount)
    assert result.dtype == batch.dtype
    expected = [
        oracles.reduce(row, starts, how, discount)
        for row, starts in zip(x, batch.starts, strict=True)
    ]
    assert not differs(result, expected)


@pytest.mark.parametrize("how", HOWS)
@fast
@given(ragged())
def test_reduce_undoes_expand(how: str, batch: Ragged):
    per_macro = [
        row[: sum(starts)] for row, starts in zip(batch.noise("m"), batch.starts, strict=True)
    ]
    back = macro.reduce(macro.expand(batch.pad_macro(per_macro), batch.ids), batch.ids, how)
    if how == "sum":
        widths = [[len(s) for s in oracles.segments(starts)] for starts in batch.starts]
        pairs = zip(per_macro, widths, strict=True)
        per_macro = [[x * w for x, w in zip(row, row_w, strict=True)] for row, row_w in pairs]
    assert not differs(back, per_macro)


@fast
@given(ragged())
def test_expand_is_the_loop_and_leaves_padding_zero(batch: Ragged):
    per_macro = [
        row[: sum(starts)] for row, starts in zip(batch.noise("m"), batch.starts, strict=True)
    ]
    result = macro.expand(batch.pad_macro(per_macro), batch.ids)
    assert result.dtype == batch.dtype
    assert result.shape == batch.ids.shape
    pairs = zip(per_macro, batch.starts, strict=True)
    assert not differs(result, [oracles.expand(row, starts) for row, starts in pairs])


@fast
@given(ragged())
def test_sums_are_conserved(batch: Ragged):
    x = batch.noise("x")
    totals = [[math.fsum(row)] for row in x]
    padded = batch.pad(x)
    by_sum = macro.reduce(padded, batch.ids, "sum").sum(1, keepdim=True)
    lengths = macro.macro_lengths(batch.ids)
    by_mean = (macro.reduce(padded, batch.ids, "equal") * lengths).sum(1, keepdim=True)
    assert not differs(by_sum, totals)
    assert not differs(by_mean, totals)


@fast
@given(ragged(), unit_interval)
def test_discounted_sums_chain(batch: Ragged, gamma: float):
    """Discounting inside macro actions and between them is discounting token by token."""
    x = batch.noise("x")
    rewards = macro.reduce(batch.pad(x), batch.ids, "sum", gamma)
    discounts = macro.discounts(batch.ids, gamma, "per_token")
    elapsed = torch.cat([torch.ones_like(discounts[:, :1]), discounts[:, :-1].cumprod(1)], 1)
    total = (rewards * elapsed).to(batch.dtype).sum(1, keepdim=True)
    assert not differs(total, [[math.fsum(gamma**t * r for t, r in enumerate(row))] for row in x])


@pytest.mark.parametrize("how", ["per_token", "per_macro"])
@fast
@given(ragged(), unit_interval)
def test_discounts_are_the_loop(how: str, batch: Ragged, gamma: float):
    result = macro.discounts(batch.ids, gamma, how)
    assert result.shape == macro.macro_mask(batch.ids).shape
    assert not differs(result, [oracles.discounts(starts, gamma, how) for starts in batch.starts])


@fast
@given(ragged())
def test_isolate_last_token(batch: Ragged):
    result = macro.isolate_last_token(batch.padded_starts, batch.mask)
    for b, starts in enumerate(batch.starts):
        expected = [*starts[:-1], True] if starts else []
        assert result[b].tolist() == expected + [False] * (result.shape[1] - len(expected))


@pytest.mark.parametrize("how", HOWS)
def test_gradients_of_reduce_stay_inside_the_mask(how: str):
    batch = example()
    x = batch.pad(batch.noise("x")).requires_grad_()
    macro.expand(macro.reduce(x, batch.ids, how), batch.ids).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad[~batch.mask] == 0).all()
    # Every macro action of w tokens is counted w times, whatever its weights.
    if how != "sum":
        assert torch.allclose(x.grad.sum(1), batch.mask.sum(1).double())


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize("how", HOWS)
def test_nothing_but_empty_responses(rows: int, width: int, how: str):
    mask = torch.zeros(rows, width, dtype=torch.bool)
    ids = macro.segment_ids(mask, mask)
    x = torch.full((rows, width), math.nan)
    reduced = macro.reduce(x, ids, how)
    assert reduced.shape == macro.macro_mask(ids).shape == macro.discounts(ids, 0.9).shape
    assert reduced.shape == (rows, 0)
    assert torch.equal(macro.expand(reduced, ids), torch.zeros(rows, width))
    assert not macro.isolate_last_token(mask, mask).any()


@fast
@given(ragged(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_padding_and_batch_order_do_not_matter(batch: Ragged, extra: int, shuffle):
    order = list(range(len(batch.starts)))
    shuffle.shuffle(order)
    other = Ragged(
        tuple(batch.starts[b] for b in order), batch.padding + extra, batch.seed, batch.dtype
    )
    x = batch.noise("x")
    for how in HOWS:
        result = macro.reduce(batch.pad(x), batch.ids, how, 0.9)
        moved = macro.reduce(other.pad([x[b] for b in order]), other.ids, how, 0.9)
        assert torch.equal(result[order], moved)


def test_unknown_modes_name_themselves():
    batch = example()
    with pytest.raises(ValueError, match="'median'"):
        macro.reduce(batch.pad(batch.noise("x")), batch.ids, "median")
    with pytest.raises(ValueError, match="'per_word'"):
        macro.discounts(batch.ids, 0.9, "per_word")


# Wrong implementations, which the comparisons above must tell from the right one.


def zero_padded_mean(x, ids):
    """The mean over a window as wide as the longest macro action."""
    return macro.reduce(x, ids, "sum") / macro.macro_lengths(ids).max()


def from_row_0(x, ids):
    """Every response cut where the first one is."""
    shared = torch.where(ids >= 0, ids[:1].clamp(min=0), -1)
    return macro.reduce(x.nan_to_num(), shared, "equal")


def shifted(x, ids):
    """Each token's number taken from the token before it."""
    return macro.reduce(x.roll(1, 1).nan_to_num(), ids, "equal")


def unnormalised_position(x, ids):
    """Weights 1/(i+1) that do not sum to 1."""
    within = torch.arange(ids.shape[1]) - macro.expand(first_times(ids), ids)
    return macro.reduce(x.nan_to_num() / (within + 1), ids, "sum")


def first_times(ids):
    return macro.reduce(torch.arange(ids.shape[1]).double().expand(ids.shape), ids, "first")


WRONG_REDUCE = {
    "equal": [zero_padded_mean, from_row_0, shifted],
    "position": [unnormalised_position, lambda x, ids: macro.reduce(x, ids, "equal")],
    "last": [lambda x, ids: macro.reduce(x, ids, "first")],
    "sum": [
        lambda x, ids: macro.reduce(x, ids, "sum", 1.0),
        lambda x, ids: 0.9 * macro.reduce(x, ids, "sum", 0.9),
    ],
}


@pytest.mark.parametrize(("how", "wrong"), [(h, w) for h, ws in WRONG_REDUCE.items() for w in ws])
def test_wrong_reductions_are_told_apart(how: str, wrong):
    batch = example()
    x = batch.noise("x")
    expected = [
        oracles.reduce(row, starts, how, 0.9) for row, starts in zip(x, batch.starts, strict=True)
    ]
    assert not differs(macro.reduce(batch.pad(x), batch.ids, how, 0.9), expected)
    assert differs(wrong(batch.pad(x), batch.ids), expected)
