"""A segmenter that learns its macro actions from what the policy writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.types import ResponseBatch
from marlhf.segmenters.base import Segmenter

Phrase = tuple[int, ...]


@dataclass(frozen=True)
class Phrases(Segmenter):
    """Phrases that the policy uses often, found as byte-pair encoding finds words (Sennrich et al.
    2016), over tokens instead of characters; a token in no phrase is a macro action by itself.

    After every update the two neighbouring macro actions that came together most often in its
    responses are joined to one phrase, then the next such two. At first this is token-level PPO.
    A response is cut from its beginning, always taking the longest phrase that is known. Phrases
    that are used no more are forgotten, so that the segmentation follows the policy.

    size       phrases known at a time
    new        phrases learned from the responses of an update, at most
    min_count  times that two macro actions must have met in an update to become one
    longest    tokens in a phrase, at most
    """

    requires = frozenset()

    size: int = 500
    new: int = 20
    min_count: int = 4
    longest: int = 10
    _use: dict[Phrase, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("size", "new", "min_count", "longest"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: given {getattr(self, name)}, must be at least 1")

    def starts(self, batch: ResponseBatch) -> Tensor:
        lengths = _lengths_by_first(self._use)
        found = [
            [[row, end] for end in accumulate(map(len, _cut(ids, self._use, lengths)))]
            for row, ids in enumerate(batch.unpadded)
        ]
        ends = torch.tensor([end for row in found for end in row[:-1]], dtype=torch.int64)
        starts = torch.zeros_like(batch.response_mask)
        starts[tuple(ends.view(-1, 2).T)] = True
        return starts

    def learn(self, responses: Sequence[Sequence[int]]) -> None:
        """Take up what is frequent in the responses of an update, and forget what is not."""
        lengths = _lengths_by_first(self._use)
        cut = [_cut(ids, self._use, lengths) for ids in responses]
        used: Counter[Phrase] = Counter(part for parts in cut for part in parts if len(part) > 1)
        for phrase in self._use:
            self._use[phrase] = 0.9 * self._use[phrase] + used[phrase]
        met = Counter(a + b for parts in cut for a, b in pairwise(parts))
        frequent = [
            (-count, phrase)
            for phrase, count in met.items()
            if count >= self.min_count and len(phrase) <= self.longest
        ]
        for count, phrase in sorted(frequent)[: self.new]:
            self._use.setdefault(phrase, float(-count))
        least_used_first = sorted(self._use, key=lambda phrase: (self._use[phrase], phrase))
        for phrase in least_used_first[: max(0, len(self._use) - self.size)]:
            del self._use[phrase]

    def metrics(self) -> dict[str, float]:
        """How many phrases are known."""
        return {"phrases_known": float(len(self._use))}

    def state_dict(self) -> dict[str, Any]:
        """The phrases and how much they are used, for checkpoints."""
        return {"phrases": [list(phrase) for phrase in self._use], "use": list(self._use.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. Raises TypeError and ValueError."""
        phrases = [tuple(map(int, phrase)) for phrase in state["phrases"]]
        use = dict(zip(phrases, map(float, state["use"]), strict=True))
        self._use.clear()
        self._use.update(use)


def _lengths_by_first(phrases: Iterable[Phrase]) -> dict[int, list[int]]:
    """The lengths of the phrases that begin with a token, the longest first."""
    found: dict[int, set[int]] = {}
    for phrase in phrases:
        found.setdefault(phrase[0], set()).add(len(phrase))
    return {first: sorted(lengths, reverse=True) for first, lengths in found.items()}


def _cut(
    ids: Sequence[int], phrases: Mapping[Phrase, float], lengths: Mapping[int, Sequence[int]]
) -> list[Phrase]:
    """Tokens in phrases, the longest that fits at each place, or by themselves."""
    parts: list[Phrase] = []
    at = 0
    while at < len(ids):
        candidates = (tuple(ids[at : at + length]) for length in lengths.get(ids[at], ()))
        part = next((one for one in candidates if one in phrases), (ids[at],))
        parts.append(part)
        at += len(part)
    return parts
