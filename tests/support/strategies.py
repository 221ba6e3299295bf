"""Ragged batches of responses for property tests, and the comparison that the tests share."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from marlhf.algorithm import macro

Rows = list[list[float]]

fast = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Ragged:
    """Responses of differing length, cut into macro actions.

    starts   one tuple a response, one entry a token; the first entry is True
    padding  columns beyond the longest response
    seed     of the numbers that `noise` makes
    """

    starts: tuple[tuple[bool, ...], ...]
    padding: int
    seed: int
    dtype: torch.dtype

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.starts]

    @property
    def mask(self) -> Tensor:
        width = max(self.lengths, default=0) + self.padding
        return torch.tensor([[t < n for t in range(width)] for n in self.lengths])

    @property
    def padded_starts(self) -> Tensor:
        return self.pad([[float(s) for s in row] for row in self.starts], fill=0.0).bool()

    @property
    def ids(self) -> Tensor:
        return macro.segment_ids(self.padded_starts, self.mask)

    def noise(self, name: str, scale: float = 1.0) -> Rows:
        """One number a token, exact in float32, so that every dtype sees the same input."""
        draw = random.Random(f"{self.seed} {name}")
        return [[round(draw.gauss(0, scale) * 4096) / 4096 for _ in row] for row in self.starts]

    def scalars(self, name: str, scale: float = 1.0) -> list[float]:
        """One number a response."""
        draw = random.Random(f"{self.seed} {name}")
        return [round(draw.gauss(0, scale) * 4096) / 4096 for _ in self.starts]

    def pad(self, rows: Rows, fill: float = math.nan) -> Tensor:
        """[B,T]; by default NaN wherever there is no token."""
        width = max(self.lengths, default=0) + self.padding
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=self.dtype)

    def pad_macro(self, rows: Rows, fill: float = math.nan) -> Tensor:
        """[B,M]; by default NaN wherever there is no macro action."""
        width = max((len(row) for row in rows), default=0)
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=self.dtype)

    def vector(self, numbers: Sequence[float]) -> Tensor:
        """[B]"""
        return torch.tensor(numbers, dtype=self.dtype)


@st.composite
def ragged(draw, min_length: int = 0, max_length: int = 9, max_rows: int = 5) -> Ragged:
    """Any number of responses of any length and segmentation, empty ones among them."""
    response = st.lists(st.booleans(), min_size=min_length, max_size=max_length)
    responses = draw(st.lists(response, min_size=1, max_size=max_rows))
    if not any(responses):
        responses.append([True])
    return Ragged(
        starts=tuple((True, *row[1:]) if row else () for row in responses),
        padding=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )


def example(dtype: torch.dtype = torch.float64, seed: int = 0) -> Ragged:
    """A fixed batch: lengths 7, 1, 0, 9, 4, macro actions of one to five tokens."""
    lengths = ((3, 1, 2, 1), (1,), (), (5, 1, 3), (4,))
    starts = tuple(tuple(i == 0 for w in row for i in range(w)) for row in lengths)
    return Ragged(starts=starts, padding=2, seed=seed, dtype=dtype)


def differs(actual: Tensor, rows: Rows) -> str:
    """Where a padded [B,N] tensor is not `rows` followed by zeros; empty where it agrees."""
    tolerance = 1e-9 if actual.dtype == torch.float64 else 3e-5
    if actual.shape[0] != len(rows):
        return f"{actual.shape[0]} rows instead of {len(rows)}"
    for b, (given, row) in enumerate(zip(actual.tolist(), rows, strict=True)):
        if len(given) < len(row):
            return f"row {b}: {len(given)} entries, fewer than {len(row)}"
        wanted = row + [0.0] * (len(given) - len(row))
        for x, y in zip(given, wanted, strict=True):
            if not abs(x - y) <= tolerance * (1 + abs(y)):
                return f"row {b}: {given} instead of {wanted}"
    return ""


def differs_scalar(actual: Tensor, expected: float) -> str:
    """The same comparison for a 0-dimensional tensor."""
    return differs(actual.reshape(1, 1), [[expected]])
