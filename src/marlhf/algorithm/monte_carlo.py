"""Credit from continuations: the value of a prefix is what follows it, sampled again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from marlhf.algorithm.estimators import Credit, CreditInputs


@dataclass(frozen=True)
class MonteCarlo:
    """Reward plus value after a macro action, less the value before it.

    The values are mean returns of continuations, so that no critic is needed, nor its bias had.

    continuations   of each prefix
    max_prefixes    of a response at most: the first macro action in each of so many equal parts of
                    `max_new_tokens`; macro actions from one to the next share the advantage of all
                    of them together. None: one for each macro action

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


def spread_starts(starts: Tensor, most: int | None, limit: int) -> Tensor:
    """At most `most` starts of macro actions per response, [B,T] bool; None: all.

    The first in each of `most` equal parts of the `limit` tokens that a response may have. So they
    depend on nothing that comes after them; if they did, as on the response's length, credit would
    be biased. `starts` has none at padding.
    """
    if most is None or starts.numel() == 0:
        return starts
    part_T = torch.arange(starts.shape[1], device=starts.device) * most // limit
    part_BT = torch.where(starts, part_T, -1)
    latest_BT = part_BT.cummax(1).values
    return part_BT > torch.nn.functional.pad(latest_BT[:, :-1], (1, 0), value=-1)
