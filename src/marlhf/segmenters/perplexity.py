"""A segmenter that cuts where per-token perplexity rises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.types import REF_LOGPROBS, ResponseBatch
from marlhf.segmenters.base import Segmenter


@dataclass(frozen=True)
class Perplexity(Segmenter):
    """Runs of tokens of non-rising perplexity (MA-RLHF section 3.2, "perplexity").

    With ppl_t = exp(-logprob_t) of the single token, token t starts a macro action iff
    ppl_t > ppl_(t-1).

    logprobs   the reference policy's (as in the paper) or the policy's at sampling time
    shift      tokens to move every boundary by; -1 is the paper's released code, which cuts one
               token earlier than its text
    """

    logprobs: Literal["ref", "policy"] = "ref"
    shift: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logprobs not in ("ref", "policy"):
            raise UserError(f"logprobs: given {self.logprobs!r}, must be 'ref' or 'policy'")

    @property
    def requires(self) -> frozenset[str]:
        return REF_LOGPROBS if self.logprobs == "ref" else frozenset()

    def starts(self, batch: ResponseBatch) -> Tensor:
        logprobs = batch.ref_logprobs if self.logprobs == "ref" else batch.logprobs
        if logprobs is None:
            owner = "the reference model's" if self.logprobs == "ref" else "the policy's"
            raise UserError(
                f"segmenter perplexity: needs {owner} log-probabilities of the "
                "response tokens, and the ResponseBatch has none (marlhf segment: give --model)"
            )
        # exp is monotone, so log-probabilities compare as perplexities do, without overflow.
        # Masked before the shift: padding must not move a boundary into the response.
        rises = torch.zeros_like(batch.response_mask)
        rises[:, 1:] = (logprobs[:, 1:] < logprobs[:, :-1]) & batch.response_mask[:, 1:]
        return _shifted(rises, self.shift)


def _shifted(flags: Tensor, shift: int) -> Tensor:
    """Shift `[B,T]` flags right by `shift` (left where negative), dropping those that leave."""
    width = flags.shape[1]
    moved = torch.zeros_like(flags)
    if abs(shift) >= width:
        return moved
    source = flags[:, max(-shift, 0) : width - max(shift, 0)]
    moved[:, max(shift, 0) : width - max(-shift, 0)] = source
    return moved
