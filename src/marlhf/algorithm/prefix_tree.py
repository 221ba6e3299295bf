"""Credit from the prefixes that responses to one prompt share: a critic without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from marlhf.algorithm.estimators import Credit, CreditInputs
from marlhf.algorithm.macro import macro_lengths


@dataclass(frozen=True)
class PrefixTree:
    """Value of the prefix after a macro action, less that of the prefix before it.

    The value of a prefix is the mean return of all responses of the group that begin with it. So a
    macro action gets credit where responses part, and none where all go the same way or one goes
    alone. The advantages of a response sum to its return (the mean of equal responses), less the
    group's mean.
    The values are those of TEMPO (Tran et al. 2025, arXiv 2509.18314), which adds their
    differences to GRPO's advantage; here they are all of it.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"groups"})

    def __call__(self, inputs: CreditInputs) -> Credit:
        assert inputs.token_ids is not None
        K, (B, M) = inputs.group_size, inputs.mask_BM.shape
        shared_GKK = shared_prefixes(inputs.token_ids, inputs.segment_ids >= 0, K)
        returns_GK = inputs.returns_B.reshape(-1, K)
        # M + 1 prefixes of each response: before every macro action, and after the last
        ends_BM = macro_lengths(inputs.segment_ids).cumsum(1)
        prefix_lengths = torch.nn.functional.pad(ends_BM, (1, 0)).reshape(-1, K, M + 1, 1)
        has_prefix = (shared_GKK[:, :, None] >= prefix_lengths).to(returns_GK.dtype)  # [G,K,M+1,K]
        totals = (has_prefix * returns_GK[:, None, None]).sum(-1)
        values = (totals / has_prefix.sum(-1)).reshape(B, M + 1)
        return Credit(values.diff(dim=1))


def shared_prefixes(token_ids: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Tokens that responses of a group have in common from the start, int64 [G,K,K].

    token_ids, mask [B,T] of the responses; a response shares all its tokens with itself. Tokens
    outside the mask, an environment's, do not count, but responses part there too.
    """
    ids_GKT = token_ids.reshape(-1, group_size, token_ids.shape[1])
    mask_GKT = mask.reshape(ids_GKT.shape)
    same = ids_GKT[:, :, None] == ids_GKT[:, None]
    same &= mask_GKT[:, :, None] == mask_GKT[:, None]
    return (same.int().cumprod(-1) * mask_GKT[:, :, None]).sum(-1)
