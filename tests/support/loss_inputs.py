"""Inputs of the losses from a ragged batch, and the oracle's sum over them."""

from __future__ import annotations

import math

from support import oracles
from support.strategies import Ragged, Rows


def per_macro_advantages(batch: Ragged) -> Rows:
    """One number a token, the same within a macro action."""
    rows = zip(batch.noise("advantages"), batch.starts, strict=True)
    return [oracles.expand(oracles.reduce(row, starts, "first"), starts) for row, starts in rows]


def logprobs(batch: Ragged) -> tuple[Rows, Rows]:
    """Under the new and the old policy."""
    old = [[-abs(x) for x in row] for row in batch.noise("old")]
    steps = batch.noise("step", 0.3)
    return [
        [a + b for a, b in zip(*rows, strict=True)] for rows in zip(old, steps, strict=True)
    ], old


def policy_inputs(batch: Ragged) -> dict:
    new, old = logprobs(batch)
    return {
        "logprobs_BT": batch.pad(new),
        "old_logprobs_BT": batch.pad(old),
        "advantages_BT": batch.pad(per_macro_advantages(batch)),
        "mask_BT": batch.mask,
    }


def expected_policy_sum(batch: Ragged, clip_range: float, ratio: str) -> float:
    new, old = logprobs(batch)
    rows = zip(new, old, per_macro_advantages(batch), batch.starts, strict=True)
    return math.fsum(oracles.policy_loss_sum(*row, clip_range, ratio) for row in rows)
