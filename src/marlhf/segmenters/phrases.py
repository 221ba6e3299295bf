"""A segmenter that learns its macro actions from the policy's responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.types import ResponseBatch
from marlhf.segmenters.base import Segmenter
from marlhf.segmenters.offsets import starts_tensor

Phrase = tuple[int, ...]


@dataclass(frozen=True)
class Phrases(Segmenter):
    """Frequent phrases of the policy, merged as in byte-pair encoding (Sennrich et al. 2016).

    The units are tokens instead of characters; a token in no phrase is a macro action by itself.
    After every update the most frequent pairs of adjacent macro actions in its responses become
    phrases, so that training begins as token-level PPO. A response is segmented greedily from its
    start, by the longest known phrase. The least used phrases are dropped, so that the
    segmentation follows the policy.

    size       maximum number of known phrases
    new        maximum number of phrases learned per update
    min_count  occurrences of a pair in an update's responses that make it a phrase
    longest    maximum tokens per phrase
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
        ends = (accumulate(map(len, _cut(ids, self._use, lengths)[:-1])) for ids in batch.unpadded)
        return starts_tensor(batch, ends)

    def learn(self, responses: Sequence[Sequence[int]]) -> None:
        """Add the frequent pairs of an update's responses; drop the least used phrases."""
        lengths = _lengths_by_first(self._use)
        cut = [_cut(ids, self._use, lengths) for ids in responses]
        used: Counter[Phrase] = Counter(part for parts in cut for part in parts if len(part) > 1)
        for phrase in self._use:
            self._use[phrase] = 0.9 * self._use[phrase] + used[phrase]
        pairs = Counter(a + b for parts in cut for a, b in pairwise(parts))
        frequent = [
            (-count, phrase)
            for phrase, count in pairs.items()
            if count >= self.min_count and len(phrase) <= self.longest
        ]
        for count, phrase in sorted(frequent)[: self.new]:
            self._use.setdefault(phrase, float(-count))
        least_used_first = sorted(self._use, key=lambda phrase: (self._use[phrase], phrase))
        for phrase in least_used_first[: max(0, len(self._use) - self.size)]:
            del self._use[phrase]

    def metrics(self) -> dict[str, float]:
        """`phrases_known`: number of known phrases."""
        return {"phrases_known": float(len(self._use))}

    def state_dict(self) -> dict[str, Any]:
        """Phrases and their use counts, for checkpoints."""
        return {"phrases": [list(phrase) for phrase in self._use], "use": list(self._use.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from `state_dict()`. Raises TypeError and ValueError."""
        phrases = [tuple(map(int, phrase)) for phrase in state["phrases"]]
        use = dict(zip(phrases, map(float, state["use"]), strict=True))
        self._use.clear()
        self._use.update(use)


def _lengths_by_first(phrases: Iterable[Phrase]) -> dict[int, list[int]]:
    """Lengths of the phrases by their first token, the longest first."""
    lengths_by_first: dict[int, set[int]] = {}
    for phrase in phrases:
        lengths_by_first.setdefault(phrase[0], set()).add(len(phrase))
    return {first: sorted(lengths, reverse=True) for first, lengths in lengths_by_first.items()}


def _cut(
    ids: Sequence[int], phrases: Mapping[Phrase, float], lengths: Mapping[int, Sequence[int]]
) -> list[Phrase]:
    """Split tokens greedily into the longest known phrases; other tokens stay single."""
    parts: list[Phrase] = []
    position = 0
    while position < len(ids):
        first = ids[position]
        candidates = (tuple(ids[position : position + n]) for n in lengths.get(first, ()))
        part = next((phrase for phrase in candidates if phrase in phrases), (first,))
        parts.append(part)
        position += len(part)
    return parts
