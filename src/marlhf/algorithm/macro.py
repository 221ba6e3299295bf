"""From tokens to macro actions and back: pure functions on tensors, without a model.

`starts` say where macro actions begin; `segment_ids` number them. `reduce` aggregates over the
tokens of each macro action, `expand` gives every token its macro action's number.
Shapes are [B,T] over response tokens and [B,M] over macro actions (see `types`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

How = Literal["equal", "position", "last", "first", "sum"]


def segment_ids(starts: Tensor, response_mask: Tensor) -> Tensor:
    """Number the macro action of each token: [B,T] bool twice -> [B,T] int64, -1 where masked."""
    assert starts.shape == response_mask.shape
    assert starts.dtype == response_mask.dtype == torch.bool
    ids = (starts & response_mask).cumsum(1) - 1
    return ids.masked_fill(~response_mask, -1)


def macro_mask(segment_ids: Tensor, M: int | None = None) -> Tensor:
    """[B,M] bool: which macro actions exist; M is the most in any response."""
    if segment_ids.numel() == 0:
        return segment_ids.new_zeros((segment_ids.shape[0], 0), dtype=torch.bool)
    counts = segment_ids.max(1).values + 1
    M = _most(segment_ids) if M is None else M
    return torch.arange(M, device=counts.device) < counts[:, None]


def macro_lengths(segment_ids: Tensor) -> Tensor:
    """[B,M] int64: tokens in each macro action, 0 where there is none."""
    return _scatter_sum(torch.ones_like(segment_ids), segment_ids, _most(segment_ids))


def reduce(
    x_BT: Tensor,
    segment_ids: Tensor,
    how: How = "equal",
    discount: float = 1.0,
    M: int | None = None,
) -> Tensor:
    """One number per macro action of w tokens, from their x_0 .. x_(w-1).

    equal      sum_i x_i / w  (the paper's default for values)
    position   sum_i x_i / (i+1), over sum_i 1 / (i+1)
    last       x_(w-1)
    first      x_0
    sum        sum_i discount^i x_i  (the reward of an option in a semi-Markov decision process:
               Sutton, Precup & Singh 1999; `discount` is used by this one only)

    M   columns of the result, at least the most macro actions of a response; None: that many, to
        be read, for which the host waits for a device

    Entries outside the mask (segment id -1) are ignored, even NaN. Returns [B,M] of x's dtype, 0
    where there is no macro action. Source of the value weights: MA-RLHF (arXiv 2410.02743).
    """
    assert x_BT.shape == segment_ids.shape
    weights_BT = _weights(segment_ids, how, discount).to(x_BT.dtype)
    kept = torch.where(weights_BT != 0, x_BT, torch.zeros_like(x_BT))
    return _scatter_sum(kept * weights_BT, segment_ids, _most(segment_ids) if M is None else M)


def expand(x_BM: Tensor, segment_ids: Tensor) -> Tensor:
    """Give every token its macro action's number: [B,M] -> [B,T], 0 where masked."""
    if x_BM.shape[1] == 0:
        return x_BM.new_zeros(segment_ids.shape)
    x_BT = x_BM.gather(1, segment_ids.clamp(min=0))
    return torch.where(segment_ids >= 0, x_BT, torch.zeros_like(x_BT))


def discounts(
    segment_ids: Tensor, gamma: float, how: Literal["per_token", "per_macro"] = "per_token"
) -> Tensor:
    """Discount [B,M] float64 from the start of a macro action to the next.

    per_token   gamma^w for a macro action of w tokens: time passes by tokens (SMDP)
    per_macro   gamma: time passes by macro actions (the paper's released code)

    0 where there is no macro action.
    """
    if how not in ("per_token", "per_macro"):
        raise ValueError(f"how: given {how!r}, must be 'per_token' or 'per_macro'")
    lengths_BM = macro_lengths(segment_ids)
    exponents_BM = lengths_BM if how == "per_token" else torch.ones_like(lengths_BM)
    powers_BM = (
        torch.full((), gamma, dtype=torch.float64, device=segment_ids.device) ** exponents_BM
    )
    return torch.where(lengths_BM > 0, powers_BM, torch.zeros_like(powers_BM))


def isolate_last_token(starts: Tensor, response_mask: Tensor) -> Tensor:
    """Add a boundary before the last response token, as in the paper's released code."""
    lengths = response_mask.sum(1, keepdim=True)
    positions = torch.arange(starts.shape[1], device=starts.device)
    return starts | (positions == lengths - 1)


def _positions(segment_ids: Tensor) -> Tensor:
    """[B,T] int64: 0, 1, 2, ... inside each macro action."""
    times = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    before = torch.nn.functional.pad(segment_ids, (1, 0), value=-2)[:, :-1]
    first = torch.where(segment_ids != before, times, torch.zeros_like(times)).cummax(1).values
    return times - first


def _weights(segment_ids: Tensor, how: How, discount: float) -> Tensor:
    """[B,T] float64: each token's weight in its macro action; 0 where masked."""
    positions_BT = _positions(segment_ids)
    T = segment_ids.shape[1]  # M is at most T, and only a device knows it
    lengths_BM = _scatter_sum(torch.ones_like(segment_ids), segment_ids, T)
    lengths_BT = expand(lengths_BM, segment_ids)
    ones = torch.ones(segment_ids.shape, dtype=torch.float64, device=segment_ids.device)
    if how == "equal":
        weights = ones / lengths_BT.clamp(min=1)
    elif how == "position":
        weights = 1 / (positions_BT + 1).double()
        total_BM = _scatter_sum(torch.where(segment_ids >= 0, weights, 0 * ones), segment_ids, T)
        weights = weights / expand(total_BM, segment_ids).clamp(min=1)
    elif how == "last":
        weights = (positions_BT == lengths_BT - 1).double()
    elif how == "first":
        weights = (positions_BT == 0).double()
    elif how == "sum":
        weights = torch.full((), discount, dtype=torch.float64, device=ones.device) ** positions_BT
    else:
        raise ValueError(
            f"how: given {how!r}, must be 'equal', 'position', 'last', 'first' or 'sum'"
        )
    return torch.where(segment_ids >= 0, weights, 0 * ones)


def _most(segment_ids: Tensor) -> int:
    """The most macro actions of a response."""
    return int(segment_ids.max()) + 1 if segment_ids.numel() else 0


def _scatter_sum(x_BT: Tensor, segment_ids: Tensor, M: int) -> Tensor:
    """Sum over the tokens of each macro action, [B,M]; masked tokens are left out."""
    index = torch.where(segment_ids >= 0, segment_ids, M)
    total = x_BT.new_zeros((x_BT.shape[0], M + 1))
    return total.scatter_add(1, index, x_BT)[:, :M]
