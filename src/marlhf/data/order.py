"""The order in which prompts, texts and examples are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from marlhf.common.errors import UserError

Item = TypeVar("Item")

_MOST_PASSES = 100  # over the data, in one batch


class PromptStream(Generic[Item]):
    """Endless stream of prompts or other rows: per pass a permutation fixed by the seed.

    A batch is a pure function of (seed, step, size), so that a resumed run needs no state. It may
    cross the end of a pass; within a pass every prompt occurs once.
    """

    def __init__(self, prompts: Sequence[Item], seed: int = 0, shuffle: bool = True) -> None:
        if not prompts:
            raise UserError("data: there are no prompts to train on")
        self.prompts = prompts
        self.seed = seed
        self.shuffle = shuffle
        self._orders: dict[int, np.ndarray] = {}

    def check_batch(self, size: int, key: str) -> None:
        """Raise UserError, naming `key`, for a batch of more than 100 passes over the data."""
        most = _MOST_PASSES * len(self.prompts)
        if size > most:
            raise UserError(
                f"{key}: given {size}, must be at most {most}, {_MOST_PASSES} times the "
                f"{len(self.prompts)} rows of the data"
            )

    def batch(self, step: int, size: int) -> list[Item]:
        """Prompts `step * size` to `(step + 1) * size` of the stream; steps from 0."""
        count = len(self.prompts)
        positions = (divmod(i, count) for i in range(step * size, (step + 1) * size))
        return [self.prompts[self._order(epoch)[index]] for epoch, index in positions]

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of a pass; the last two are cached."""
        if epoch not in self._orders:
            order = np.arange(len(self.prompts))
            if self.shuffle:
                key = [self.seed & 0xFFFFFFFFFFFFFFFF, epoch]
                order = np.random.default_rng(key).permutation(order)
            kept = [e for e in self._orders if e == epoch - 1]
            self._orders = {e: self._orders[e] for e in kept} | {epoch: order}
        return self._orders[epoch]
