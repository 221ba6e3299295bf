"""Minibatches (one optimiser step each) and micro-batches (one pass of a model each)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.seeds import row_seed
from marlhf.data.prompts import Prompt

# In tokens, measured with SmolLM2-135M on two cores: fixed cost of a forward and backward pass, and
# size beyond which a longer pass needs more memory and saves little time per token.
CPU_PASS_COST = 24
CPU_PASS_LIMIT = 512


def minibatches(responses: int, group_size: int, count: int) -> list[Tensor]:
    """Indices of each of `count` minibatches: every count-th group of `group_size` responses.

    Prompts come shuffled, so the split is random. It never cuts a group, and the minibatches over
    all ranks are the same for any number of ranks.
    """
    minibatch_of = torch.arange(responses) // group_size % count
    return [(minibatch_of == i).nonzero().squeeze(1) for i in range(count)]


def check_minibatches(prompts: int, ranks: int, count: int) -> None:
    """Check that all ranks get equally many prompts per minibatch. Raises UserError."""
    if prompts % (ranks * count):
        raise UserError(
            f"rollout.batch_size: given {prompts} prompts, must be a multiple of "
            f"{ranks * count} ({ranks} ranks x ppo.minibatches={count})"
        )


def redrawn_minibatches(
    responses: int, group_size: int, count: int, seed: int, epoch: int, rank: int = 0
) -> list[Tensor]:
    """Indices of each minibatch of one epoch, drawn anew.

    Each minibatch gets one of every `count` groups in a row. So every minibatch is as large on
    every rank, and over all ranks the same for any number of them. Needs a multiple of `count`
    groups on each rank.

    seed    of the update
    rank    whose responses these are, each rank having as many
    """
    blocks = responses // group_size // count
    draws = []
    for block in range(rank * blocks, (rank + 1) * blocks):
        generator = torch.Generator().manual_seed(row_seed(seed, epoch, block))
        draws.append(torch.randperm(count, generator=generator))
    minibatch_of = torch.cat(draws).repeat_interleave(group_size)
    return [(minibatch_of == i).nonzero().squeeze(1) for i in range(count)]


def micro_batches(attention_mask: Tensor, size: int, same_count: bool = False) -> list[Tensor]:
    """Indices 0..B-1, shortest sequence first, in parts of at most `size`, to limit padding.

    attention_mask [B,L] bool; the indices are on its device. Losses are divided by the counts of
    the full optimiser step, so neither order nor split changes a gradient.

    A CPU is as efficient with a few sequences as with many: parts there minimise padding, and are
    no larger than efficiency needs. With `same_count` the number of parts depends on B and `size`
    alone, so that ranks that share weights run the same number of passes.
    """
    order = attention_mask.sum(1).argsort(stable=True)
    if same_count or attention_mask.device.type != "cpu" or len(order) == 0:
        return list(order.split(size))
    L, mask = attention_mask.shape[1], attention_mask[order].long()
    firsts, ends = mask.argmax(1).tolist(), (L - mask.flip(1).argmax(1)).tolist()
    # per prefix of `order`: its lowest cost, and where its last part begins
    best = [(0, 0)]
    for stop in range(1, len(order) + 1):
        first, end, choices = L, 0, []
        for begin in range(stop - 1, max(0, stop - size) - 1, -1):
            first, end = min(first, firsts[begin]), max(end, ends[begin])
            tokens = (stop - begin) * (end - first)
            if choices and tokens > CPU_PASS_LIMIT:
                break
            choices.append((best[begin][0] + tokens + CPU_PASS_COST, begin))
        best.append(min(choices))
    sizes, stop = [], len(order)
    while stop:
        sizes.append(stop - best[stop][1])
        stop = best[stop][1]
    return list(order.split(sizes[::-1]))


def held_out_share(count: int, rank: int, ranks: int) -> tuple[list[int], int]:
    """Indices of the held-out prompts that a rank samples, and how many of them count.

    Those come first. A rank with one fewer repeats another's: under ZeRO-3 all ranks participate
    in a forward pass.
    """
    indices = list(range(rank, count, ranks))
    missing = -(-count // ranks) - len(indices)
    return indices + list(range(missing)), len(indices)


def rank_share(
    prompts: Sequence[Prompt], copies: int, rank: int, ranks: int
) -> tuple[list[Prompt], list[int]]:
    """A rank's prompts, repeated per response, and the responses' indices in the batch."""
    share = len(prompts) // ranks
    first = rank * share
    mine = [prompt for prompt in prompts[first : first + share] for _ in range(copies)]
    return mine, list(range(first * copies, first * copies + len(mine)))
