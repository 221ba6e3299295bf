"""Segmenters that count tokens: single tokens, n-grams, and the full response."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.seeds import row_seed
from marlhf.common.types import ResponseBatch
from marlhf.segmenters.base import Segmenter


@dataclass(frozen=True)
class Token(Segmenter):
    """Every token is a macro action: token-level PPO."""

    requires = frozenset()

    def starts(self, batch: ResponseBatch) -> Tensor:
        return batch.response_mask.clone()


@dataclass(frozen=True)
class Sequence(Segmenter):
    """The full response is one macro action: the contextual bandit."""

    requires = frozenset()

    def starts(self, batch: ResponseBatch) -> Tensor:
        return torch.zeros_like(batch.response_mask)


@dataclass(frozen=True)
class NGram(Segmenter):
    """A start every `n` tokens.

    Source: MA-RLHF section 3.2, "fixed n-gram", with n of 3, 5 and 10.
    """

    requires = frozenset()

    n: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise UserError(f"n: given {self.n}, must be at least 1")

    def starts(self, batch: ResponseBatch) -> Tensor:
        positions = torch.arange(batch.response_mask.shape[1], device=batch.response_mask.device)
        return (positions % self.n == 0).expand_as(batch.response_mask)


@dataclass(frozen=True)
class RandomNGram(Segmenter):
    """Lengths drawn uniformly from a list (MA-RLHF section 3.2, "randomized n-gram").

    lengths   the lengths to draw from
    seed      added to the run's seed; a response's draws depend on (seed, step, row id) alone, so
              that they are the same on every rank layout and after a resume
    """

    requires = frozenset()

    lengths: tuple[int, ...] = (2, 3, 5, 10)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if not self.lengths or min(self.lengths) < 1:
            raise UserError(f"lengths: given {list(self.lengths)}, must be lengths of at least 1")

    def starts(self, batch: ResponseBatch) -> Tensor:
        starts = torch.zeros_like(batch.response_mask)
        choices = torch.tensor(self.lengths)
        draws = starts.shape[1] // min(self.lengths) + 1
        for row, row_id in enumerate(batch.rows):
            generator = torch.Generator().manual_seed(
                row_seed(batch.seed + self.seed, batch.step, row_id)
            )
            picks = torch.randint(len(choices), (draws,), generator=generator)
            ends = choices[picks].cumsum(0)
            starts[row, ends[ends < starts.shape[1]].to(starts.device)] = True
        return starts
