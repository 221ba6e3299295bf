"""Which rows go together: a minibatch is one optimiser step, a micro-batch one pass of a model."""

from __future__ import annotations

import torch
from torch import Tensor

# In tokens, measured with SmolLM2-135M on two cores: what a forward and backward pass costs beside
# its tokens, and how many a pass needs no more than: longer ones take memory and save little time.
_CPU_PASS_COST = 24
_CPU_PASS_LIMIT = 512


def minibatches(rows: int, group_size: int, count: int) -> list[Tensor]:
    """The rows of each of `count` minibatches: every count-th group of `group_size` responses.

    Prompts come shuffled, so that this is a random split; it never cuts a group, and the whole
    batch is split alike whatever the number of ranks.
    """
    of_row = torch.arange(rows) // group_size % count
    return [(of_row == i).nonzero().squeeze(1) for i in range(count)]


def micro_batches(attention_mask: Tensor, size: int, alike: bool = False) -> list[Tensor]:
    """Rows 0..B-1, the shortest first, in parts of at most `size`, so that little is padding.

    attention_mask [B,L] bool. Losses are divided by the counts of a whole optimiser step, so that
    neither order nor split changes a gradient.

    A CPU computes a few rows as efficiently as many, so that there the parts are those with the
    fewest columns of padding, and no longer than they must be to use it well. With `alike` the
    number of parts depends on B and `size` alone: ranks that share weights pass through together.
    """
    order = attention_mask.sum(1).argsort(stable=True).cpu()
    if alike or attention_mask.device.type != "cpu" or len(order) == 0:
        return list(order.split(size))
    L, mask = attention_mask.shape[1], attention_mask[order].long()
    firsts, ends = mask.argmax(1).tolist(), (L - mask.flip(1).argmax(1)).tolist()
    # the least cost of the rows before each, and where the last part of these begins
    best = [(0, 0)]
    for stop in range(1, len(order) + 1):
        first, end, choices = L, 0, []
        for begin in range(stop - 1, max(0, stop - size) - 1, -1):
            first, end = min(first, firsts[begin]), max(end, ends[begin])
            tokens = (stop - begin) * (end - first)
            if choices and tokens > _CPU_PASS_LIMIT:
                break
            choices.append((best[begin][0] + tokens + _CPU_PASS_COST, begin))
        best.append(min(choices))
    sizes, stop = [], len(order)
    while stop:
        sizes.append(stop - best[stop][1])
        stop = best[stop][1]
    return list(order.split(sizes[::-1]))


def held_out_share(count: int, rank: int, ranks: int) -> tuple[list[int], int]:
    """Which of `count` held-out rows a rank samples, and how many of them, the first, are its own.

    A rank with a row less does another's again: under ZeRO-3 all ranks take part in a forward pass.
    """
    own = list(range(rank, count, ranks))
    missing = -(-count // ranks) - len(own)
    return own + list(range(missing)), len(own)
