"""Which rows go together: a minibatch is one optimiser step, a micro-batch one pass of a model."""

from __future__ import annotations

import torch
from torch import Tensor


def minibatches(rows: int, group_size: int, count: int) -> list[Tensor]:
    """The rows of each of `count` minibatches: every count-th group of `group_size` responses.

    Prompts come shuffled, so that this is a random split; it never cuts a group, and the whole
    batch is split alike whatever the number of ranks.
    """
    of_row = torch.arange(rows) // group_size % count
    return [(of_row == i).nonzero().squeeze(1) for i in range(count)]


def micro_batches(attention_mask: Tensor, size: int) -> list[Tensor]:
    """Rows 0..B-1, the shortest first, in parts of at most `size`, so that little is padding.

    attention_mask [B,L] bool. Losses are divided by the counts of a whole optimiser step, so that
    the order changes no gradient.
    """
    return list(attention_mask.sum(1).argsort(stable=True).cpu().split(size))


def held_out_share(count: int, rank: int, ranks: int) -> tuple[list[int], int]:
    """Which of `count` held-out rows a rank samples, and how many of them, the first, are its own.

    A rank with a row less does another's again: under ZeRO-3 all ranks take part in a forward pass.
    """
    own = list(range(rank, count, ranks))
    missing = -(-count // ranks) - len(own)
    return own + list(range(missing)), len(own)
