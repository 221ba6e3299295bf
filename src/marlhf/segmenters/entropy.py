"""A segmenter that cuts where the policy's entropy rises."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.types import ResponseBatch
from marlhf.segmenters.base import Segmenter


@dataclass(frozen=True)
class EntropyJump(Segmenter):
    """A macro action starts where the policy's entropy jumps.

    That is at a token sampled from a distribution with at least `jump` nats more entropy than the
    previous token's. Within a word or a set phrase the next token is nearly certain; where entropy
    rises the policy chooses, so that a macro action is a choice and its consequences.

    jump   nats; 0 cuts wherever entropy does not fall
    """

    requires = frozenset()

    jump: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.jump >= 0:
            raise UserError(f"jump: given {self.jump}, must be at least 0")

    def starts(self, batch: ResponseBatch) -> Tensor:
        if batch.entropy is None:
            raise UserError(
                "segmenter entropy_jump: needs the policy's entropy before the response tokens, "
                "and the ResponseBatch has none (marlhf segment: give --model)"
            )
        starts = torch.zeros_like(batch.response_mask)
        starts[:, 1:] = batch.entropy[:, 1:] - batch.entropy[:, :-1] >= self.jump
        return starts
