"""Applies any reward to every segment of a response."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from marlhf.common.errors import UserError
from marlhf.common.registry import Spec
from marlhf.rewards.base import CombinedReward
from marlhf.rewards.building import build_rewards
from marlhf.rewards.calls import PlacedRewards, needed_columns
from marlhf.rewards.learned import RewardModel


@dataclass(frozen=True)
class PerSegment:
    """Rewards of a response's segments, each on the last token of its segment.

    Fine-Grained RLHF (Wu et al. 2023, arXiv 2306.01693) is a weighted list of these, each with its
    own density.

    reward     any other reward, as in `reward.models`
    boundary   a regex for the text between segments; by default they are sentences and lines
    read       the reward's input: the `segment` alone, or the `response` up to the segment's end,
               for a reward model trained on full responses
    """

    reward: Spec | list[Spec]
    boundary: str = r"(?<=[.!?])\s+|\n+"
    read: Literal["segment", "response"] = "segment"

    def __post_init__(self) -> None:
        if self.read not in ("segment", "response"):
            raise UserError(f"read: given {self.read!r}, must be segment or response")
        try:
            re.compile(self.boundary)
        except re.error as error:
            raise UserError(
                f"boundary: given {self.boundary!r}, not a valid regex: {error}"
            ) from None
        assert self.inner

    @cached_property
    def inner(self) -> CombinedReward:
        """The reward, built."""
        return build_rewards(self.reward)

    @property
    def needed_columns(self) -> list[str]:
        """Columns that the reward requires."""
        return [name for r in self.inner.rewards for name in needed_columns(r.function)]

    def check_values(self, **columns: Sequence[Any]) -> None:
        """Raise UserError where the reward cannot read a column."""
        for reward in self.inner.rewards:
            if callable(check := getattr(reward.function, "check_values", None)):
                check(**columns)

    def load(self) -> None:
        """Load the reward's models."""
        self.inner.load()

    def to(self, device: Any) -> None:
        """Run the reward's models on a device."""
        self.inner.to(device)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[PlacedRewards | None]:
        spans = [(row, *s) for row, text in enumerate(completions) for s in self.segments(text)]
        with_prefix = self.read == "response"
        texts = [completions[row][0 if with_prefix else start : end] for row, start, end in spans]
        result = self.inner(
            [prompts[row] for row, _, _ in spans],
            texts,
            {name: [values[row] for row, _, _ in spans] for name, values in columns.items()},
        )
        if any(result.spans):
            raise UserError("reward: gives rewards inside a text itself, must give one number")
        pairs: list[PlacedRewards] = [[] for _ in completions]
        unscored = set(result.unscored)
        for i, (row, _, end) in enumerate(spans):
            if i not in unscored:
                pairs[row].append((end, result.scores[i]))
        return [of_row or None for of_row in pairs]

    def segments(self, text: str) -> list[tuple[int, int]]:
        """Half-open character spans of the non-blank segments."""
        spans, start = [], 0
        for match in [*re.finditer(self.boundary, text), None]:
            end = len(text) if match is None else match.start()
            if text[start:end].strip():
                spans.append((start, end))
            start = end if match is None else match.end()
        return spans


def models_inside(reward: CombinedReward) -> Iterator[tuple[str, RewardModel]]:
    """Name and model of every reward model in a sum, those inside `per_segment` included."""
    for part in reward.rewards:
        if isinstance(part.function, RewardModel):
            yield part.name, part.function
        elif isinstance(part.function, PerSegment):
            yield from models_inside(part.function.inner)
