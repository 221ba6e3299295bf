"""Minibatches (one optimiser step each) and micro-batches (one pass of a model each)."""

from __future__ import annotations

import torch
from torch import Tensor

# In tokens, measured with SmolLM2-135M on two cores: fixed cost of a forward and backward pass, and
# size beyond which a longer pass takes memory and saves little time per token.
_CPU_PASS_COST = 24
_CPU_PASS_LIMIT = 512


def minibatches(rows: int, group_size: int, count: int) -> list[Tensor]:
    """Indices of each of `count` minibatches: every count-th group of `group_size` responses.

    Prompts come shuffled, so the split is random. It never cuts a group, and splits the full batch
    alike for any number of ranks.
    """
    of_row = torch.arange(rows) // group_size % count
    return [(of_row == i).nonzero().squeeze(1) for i in range(count)]


def micro_batches(attention_mask: Tensor, size: int, alike: bool = False) -> list[Tensor]:
    """Indices 0..B-1, shortest sequence first, in parts of at most `size`, to limit padding.

    attention_mask [B,L] bool. Losses are divided by the counts of the full optimiser step, so
    neither order nor split changes a gradient.

    A CPU is as efficient with a few sequences as with many: parts there minimise padding, and are
    no larger than efficiency needs. With `alike` the number of parts depends on B and `size` alone,
    so that ranks that share weights run the same number of passes.
    """
    order = attention_mask.sum(1).argsort(stable=True).cpu()
    if alike or attention_mask.device.type != "cpu" or len(order) == 0:
        return list(order.split(size))
    L, mask = attention_mask.shape[1], attention_mask[order].long()
    firsts, ends = mask.argmax(1).tolist(), (L - mask.flip(1).argmax(1)).tolist()
    # per prefix of `order`: its least cost, and where its last part begins
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
    """Indices of the held-out prompts that a rank samples, and how many are its own.

    Its own come first. A rank with one fewer repeats another's: under ZeRO-3 all ranks take part in
    a forward pass.
    """
    own = list(range(rank, count, ranks))
    missing = -(-count // ranks) - len(own)
    return own + list(range(missing)), len(own)
