"""Credit from continuations: the value of a prefix is what follows it, sampled again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from marlhf.algorithm.estimators import Credit, CreditInputs
from marlhf.algorithm.macro import macro_mask


@dataclass(frozen=True)
class MonteCarlo:
    """Reward plus value after a macro action, less the value before it.

    The values are mean returns of continuations, so that no critic is needed, nor its bias had.

    continuations   of each prefix
    max_prefixes    of a response at most, evenly spread over its macro actions; those between two
                    share the advantage of all of them together. None: one for each macro action

    Source: Kazemnejad et al. 2024, VinePPO (arXiv 2410.01679), at the boundaries of macro actions.
    """

    continuations: int = 4
    max_prefixes: int | None = None
    requires: ClassVar[frozenset[str]] = frozenset({"continuations"})

    def __call__(self, inputs: CreditInputs) -> Credit:
        assert inputs.continuation_values_BM is not None
        mask_BM, values_BM = inputs.mask_BM, inputs.continuation_values_BM
        is_valued_BM = mask_BM & ~values_BM.isnan()
        values_BM = values_BM.where(is_valued_BM, 0.0).to(inputs.rewards_BM)
        targets_BM = torch.zeros_like(values_BM)
        after_B = values_BM.new_zeros(len(values_BM))  # of what follows macro action k
        for k in reversed(range(values_BM.shape[1])):
            target_B = inputs.rewards_BM[:, k] + inputs.discounts_BM[:, k] * after_B
            targets_BM[:, k] = torch.where(mask_BM[:, k], target_B, 0.0)
            after_B = torch.where(is_valued_BM[:, k], values_BM[:, k], targets_BM[:, k])
        advantages_BM = targets_BM - values_BM
        places_M = torch.arange(values_BM.shape[1], device=values_BM.device)
        latest_BM = torch.where(is_valued_BM, places_M, 0).cummax(1).values
        return Credit(advantages_BM.gather(1, latest_BM))


def spread_starts(starts: Tensor, segment_ids: Tensor, most: int | None) -> Tensor:
    """At most `most` starts of macro actions per response, [B,T] bool.

    The first, and others evenly spread; None: all.
    """
    starts = starts & (segment_ids >= 0)
    if most is None or starts.numel() == 0:
        return starts
    counts_B1 = macro_mask(segment_ids).sum(1, keepdim=True).clamp(min=1)
    parts_B1 = counts_B1.clamp(max=most)
    part_BT = segment_ids * parts_B1 // counts_B1
    before_BT = (segment_ids - 1) * parts_B1 // counts_B1  # -1 before the first
    return starts & (part_BT != before_BT)
