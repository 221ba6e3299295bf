"""Rewards that depend on the completion alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from marlhf.common.errors import UserError
from marlhf.common.extras import require
from marlhf.rewards.calls import PlacedRewards


@dataclass(frozen=True)
class Sentiment:
    """VADER's compound sentiment of the completion, -1 (negative) to 1 (positive); 0 if empty.

    Hutto & Gilbert, 2014, by their own package. It saturates on long texts.
    """

    def __post_init__(self) -> None:
        require("vaderSentiment", "demo")

    @cached_property
    def _analyzer(self) -> Any:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        return SentimentIntensityAnalyzer()

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        return [self._analyzer.polarity_scores(text)["compound"] for text in completions]


@dataclass(frozen=True)
class Length:
    """`-abs(length - target) / scale`: 0 at the target length, -1 at a distance of `scale`.

    target: words or characters, at least 0
    scale: in the same unit, above 0; default: the target
    """

    target: int
    unit: Literal["words", "characters"] = "words"
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.target < 0:
            raise UserError(f"target: given {self.target}, must be at least 0")
        if self.unit not in ("words", "characters"):
            raise UserError(f"unit: given {self.unit!r}, must be words or characters")
        if self.scale is None and self.target == 0:
            raise UserError("scale: must be given for a target of 0")
        if self.scale is not None and not self.scale > 0:
            raise UserError(f"scale: given {self.scale}, must be above 0")

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        scale = self.target if self.scale is None else self.scale
        lengths = [len(c.split() if self.unit == "words" else c) for c in completions]
        return [-abs(length - self.target) / scale for length in lengths]


@dataclass(frozen=True)
class Regex:
    """A reward for matches of a regular expression (Python's `re`) in the completion.

    mode: `present`: `reward` if there is any match, else `absent`; `count`: `reward` per match,
        summed over the response; `inside`: `reward` per match, each on the token that ends it
        (empty matches are left out)
    absent: used by `present` only
    """

    pattern: str
    reward: float = 1.0
    absent: float = 0.0
    mode: Literal["present", "count", "inside"] = "present"

    def __post_init__(self) -> None:
        if self.mode not in ("present", "count", "inside"):
            raise UserError(f"mode: given {self.mode!r}, must be present, count or inside")
        if self.absent and self.mode != "present":
            raise UserError(f"absent: given {self.absent}, but has no meaning for mode {self.mode}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"pattern: given {self.pattern!r}, not a valid regex: {error}"
            ) from None

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float | PlacedRewards]:
        return [self._score(text) for text in completions]

    def _score(self, text: str) -> float | PlacedRewards:
        if self.mode == "present":
            return self.reward if re.search(self.pattern, text) else self.absent
        matches = list(re.finditer(self.pattern, text))
        if self.mode == "count":
            return self.reward * len(matches)
        return [(m.end(), self.reward) for m in matches if m.end() > m.start()]


@dataclass(frozen=True)
class Keyword:
    """A reward for words or phrases in the completion, matched at word boundaries.

    mode: `fraction`: the share of the words that occur, 0 to 1; `any`: 1 if one of them occurs,
        else 0; `count`: total number of occurrences. A negative weight makes it a penalty.
    """

    words: tuple[str, ...]
    mode: Literal["fraction", "any", "count"] = "fraction"
    case_sensitive: bool = False

    def __post_init__(self) -> None:
        words = self.words
        if isinstance(words, str) or not words or not all(isinstance(w, str) for w in words):
            raise UserError(f"words: given {list(words)!r}, must be a list of words")
        if not all(word.strip() for word in words):
            raise UserError("words: one of them is empty")
        if self.mode not in ("fraction", "any", "count"):
            raise UserError(f"mode: given {self.mode!r}, must be fraction, any or count")
        object.__setattr__(self, "words", tuple(words))

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        flags = 0 if self.case_sensitive else re.IGNORECASE
        # not \b, which would not match at the end of a word such as "C++"
        return [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", flags) for word in self.words]

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float]:
        return [self._score([len(p.findall(text)) for p in self._patterns]) for text in completions]

    def _score(self, counts: Sequence[int]) -> float:
        if self.mode == "count":
            return float(sum(counts))
        matched = sum(count > 0 for count in counts)
        return float(matched > 0) if self.mode == "any" else matched / len(counts)
