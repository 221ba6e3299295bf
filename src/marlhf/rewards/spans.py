"""Rewards inside a response, placed on its tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from marlhf.common.tokenization import Span


def place_spans(
    spans: Sequence[Sequence[tuple[int, float]]],
    offsets: Sequence[Sequence[Span]],
    shape: Sequence[int],
) -> Tensor:
    """Place `(end_char, reward)` pairs on tokens: float32 rewards of shape `[B,T]`.

    offsets: each token's half-open character span, as `ResponseBatch.offsets`. A reward lands on
    the token whose span holds character `end_char - 1`, the last one where several tokens share
    that character; rewards on one token add up. Raises ValueError for a character of no token.
    """
    rewards = torch.zeros(*shape)
    for row, (pairs, row_offsets) in enumerate(zip(spans, offsets, strict=True)):
        starts = [start for start, _ in row_offsets]
        for end_char, reward in pairs:
            # spans never move backwards: the last one that starts before is the only candidate
            token = bisect_right(starts, end_char - 1) - 1
            if end_char < 1 or token < 0 or row_offsets[token][1] < end_char:
                raise ValueError(f"row {row}: no token writes character {end_char - 1}")
            rewards[row, token] += reward
    return rewards
