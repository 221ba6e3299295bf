"""Segmenters that read text, and the two helpers that make one from a plain function.

    @from_text
    def clauses(text):  # characters at which macro actions start; 0 is implied
        return [match.end() for match in re.finditer(r"[,;:] ", text)]

    @from_lengths
    def pairs(tokens):  # the text of each token -> lengths of macro actions, in tokens
        return [2] * (len(tokens) // 2) + [1] * (len(tokens) % 2)

`offsets` states how a character boundary becomes a token.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import regex
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.tokenization import Span
from marlhf.common.types import ResponseBatch
from marlhf.segmenters.base import Segmenter, SegmenterFn, close
from marlhf.segmenters.offsets import starts_tensor, token_starts


@dataclass(frozen=True)
class TextSegmenter(Segmenter):
    """Base of the segmenters that depend on the text alone."""

    requires = frozenset()

    @abc.abstractmethod
    def boundaries(self, text: str) -> list[int]:
        """Characters at which macro actions start, in order; 0 is implied."""

    def starts(self, batch: ResponseBatch) -> Tensor:
        return _starts_at_characters(batch, self.boundaries)


@dataclass(frozen=True)
class Word(TextSegmenter):
    """Every word.

    Punctuation joins the word before it; opening brackets, quotes and symbols after white space
    join the word after. Each Chinese character is a word, and each run of hiragana or katakana.

    language   a spaCy language code ("en", "th", "ja"): the words of its tokenizer instead, which
               separates punctuation and may need an extra package; None for the rule above
    """

    language: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.language is not None:
            _spacy_tokenizer(self.language)  # an unknown language is an error now, not in training

    def boundaries(self, text: str) -> list[int]:
        if self.language is None:
            return word_boundaries(text)
        tokenizer, cuts = _spacy_tokenizer(self.language), [0, *run_cuts(text), len(text)]
        return [
            start + token.idx
            for start, end in pairwise(cuts)
            for token in tokenizer(text[start:end])
            if not token.is_space
        ]


@dataclass(frozen=True)
class Sentence(TextSegmenter):
    """Every sentence, up to a full stop in any script or a line break.

    Line breaks count as in the paper's released code: lists, headings and code have no full stops.
    """

    def boundaries(self, text: str) -> list[int]:
        return sentence_boundaries(text)


@dataclass(frozen=True)
class Line(TextSegmenter):
    """Every non-blank line; suits code.

    A line's break and the blank lines after it belong to it; its indentation too where tokens
    allow.
    """

    def boundaries(self, text: str) -> list[int]:
        return line_boundaries(text)


def from_text(
    function: Callable[[str], Iterable[int]], max_length: int | None = None
) -> SegmenterFn:
    """Make a segmenter from a function of one response's text.

    The function returns the characters at which macro actions *start*, in any order; 0 is implied
    and `len(text)` starts nothing. Raises UserError, when called, if it returns anything else.
    """

    def checked(text: str) -> list[int]:
        boundaries = _integers(function(text), function, "characters where macro actions start")
        for char in boundaries:
            if not 0 <= char <= len(text):
                raise UserError(
                    f"segmenter {_name(function)}: returned character {char} for a "
                    f"text of {len(text)} characters"
                )
        return boundaries

    @functools.wraps(function)
    def segmenter(batch: ResponseBatch) -> Tensor:
        return close(_starts_at_characters(batch, checked), batch.response_mask, max_length)

    vars(segmenter)["requires"] = frozenset()
    return segmenter


def from_lengths(
    function: Callable[[list[str]], Iterable[int]], max_length: int | None = None
) -> SegmenterFn:
    """Make a segmenter from a function of one response's tokens.

    The function receives the text of each token (they join to the response; a token that writes
    nothing, or completes a character that an earlier token began, is "") and returns the lengths
    of the macro actions, in tokens. It is not called for an empty response. Raises UserError, when
    called, if the lengths are not positive or do not add up to the number of tokens.
    """

    @functools.wraps(function)
    def segmenter(batch: ResponseBatch) -> Tensor:
        starts = []
        for text, spans in zip(batch.texts, batch.offsets, strict=True):
            lengths: list[int] = []
            if spans:
                returned = function(_token_texts(text, spans))
                lengths = _integers(returned, function, "lengths of macro actions")
            if sum(lengths) != len(spans) or min(lengths, default=1) < 1:
                raise UserError(
                    f"segmenter {_name(function)}: returned lengths {lengths}, which "
                    f"must be at least 1 and add up to the {len(spans)} tokens"
                )
            starts.append(list(accumulate(lengths, initial=0))[:-1])
        return close(starts_tensor(batch, starts), batch.response_mask, max_length)

    vars(segmenter)["requires"] = frozenset()
    return segmenter


def line_boundaries(text: str) -> list[int]:
    """Characters at which lines with a visible character start."""
    boundaries, position = [], 0
    for line in text.splitlines(keepends=True):
        if not line.isspace():
            boundaries.append(position)
        position += len(line)
    return boundaries


# Scripts written without spaces cannot be split into words by rule: a Han character is a word by
# itself, kana change script at most word ends. Marks (\p{M}) and joiners belong to the character
# before: they carry the vowels of Indic scripts, and build one emoji out of several.
_JOINED = r"\p{M}\u200c\u200d"
_LETTER = rf"[\w--[{_JOINED}\p{{Han}}\p{{Hiragana}}\p{{Katakana}}ー]]"
_LETTERS = rf"{_LETTER} [{_LETTER}{_JOINED}]*"
_SYMBOL = rf"[[^\s\w]{_JOINED}]"
_LEAD = rf"(?: (?<!\S) {_SYMBOL}+ | [\p{{Ps}}\p{{Pi}}] {_SYMBOL}* )"
_WORD = regex.compile(
    rf"""
    {_LEAD}?+                                            # punctuation leads the word ...
    (?: \p{{Han}} [{_JOINED}]*
      | [\p{{Hiragana}}ー] [\p{{Hiragana}}ー{_JOINED}]*
      | [\p{{Katakana}}ー] [\p{{Katakana}}ー{_JOINED}]*
      | {_LETTERS} (?: (?: ['’\-‐] | (?<=\d)[.,:](?=\d) ) {_LETTERS} )*   # don't, 3.14
    )
    | {_LEAD}                                            # ... or is one: " - "
    """,
    regex.VERBOSE | regex.V1,
)


def word_boundaries(text: str) -> list[int]:
    """Characters at which words start, by the rule of `Word`."""
    return [match.start() for match in _WORD.finditer(text)]


_MARK, _CLOSE = "[.!?…‽؟۔։።፧፨]", r"""["'*_\p{Pe}\p{Pf}]"""
_TERMINAL = regex.compile(  # never tried inside a run of marks: runs of any length take linear time
    rf"""
    (?<! {_MARK} ) (?P<mark> {_MARK}++ ) (?P<close> {_CLOSE}*+ ) \s++      # a space must follow
    | (?: [。｡！？।॥] | ．(?!\p{{Nd}}) )++ {_CLOSE}*+ \s*+                   # none need
    """,
    regex.VERBOSE,
)
_BEFORE_NAMES = regex.compile(  # never the end of a sentence
    r"""mrs? | ms | dr | prof | st | rev | hon | gen | col | capt | lt | sgt | gov | sen | rep | mt
    | ft | vs | cf | viz | approx | figs? | eqs? | sec | e\.g | i\.e""",
    regex.VERBOSE | regex.IGNORECASE,
)
_MID_SENTENCE = regex.compile(  # not the end of one where the next word has no capital
    r".*\..* | etc | al | inc | ltd | co | corp | jr | sr | dept | est | no | vol | eds? | ca | op",
    regex.VERBOSE | regex.IGNORECASE,
)
_LAST_WORD = regex.compile(r"[\p{L}\p{M}.]*\p{L}\p{M}*\Z")
_LIST_NUMBER = regex.compile(r"(?:^|[\n\r])[^\S\n\r]*[(\[]?(?:\p{Nd}{1,3}|\p{L})\Z")
_LOOK_BACK = 40  # characters: no abbreviation is longer


def sentence_boundaries(text: str) -> list[int]:
    """Characters at which sentences start, by the rule of `Sentence`."""
    boundaries = set(line_boundaries(text))
    for match in _TERMINAL.finditer(text):
        if match.end() < len(text) and (match["mark"] is None or _ends_sentence(text, match)):
            boundaries.add(match.end())
    return sorted(boundaries)


def sentence_spans(text: str) -> list[Span]:
    """Half-open span of each sentence, without the white space around it."""
    boundaries = sorted({0, *sentence_boundaries(text)})
    spans = []
    for start, end in zip(boundaries, [*boundaries[1:], len(text)], strict=True):
        sentence = text[start:end]
        if stripped := sentence.strip():
            start += len(sentence) - len(sentence.lstrip())
            spans.append((start, start + len(stripped)))
    return spans


def _ends_sentence(text: str, match: Any) -> bool:
    """Whether a mark with white space after it ends a sentence: not in "Dr. No", "etc. and",
    "J. Doe", "wait... what", '"Stop!" he said' or "1. First"."""
    mark, lower = match["mark"], text[match.end()].islower()
    if mark != ".":
        return not (lower and (match["close"] or set(mark) <= {".", "…"}))
    before = text[max(match.start() - _LOOK_BACK, 0) : match.start()]
    if _LIST_NUMBER.search(before) or (match.start() <= 3 and before.isdecimal()):
        return False
    last_word = _LAST_WORD.search(before)
    word = "" if last_word is None else last_word[0]
    if (len(word) == 1 and word.isupper() and word != "I") or _BEFORE_NAMES.fullmatch(word):
        return False
    return not (lower and _MID_SENTENCE.fullmatch(word))


_LONG_RUN = regex.compile(r"[^\w\s]{64}(?=[^\w\s])")


def run_cuts(text: str) -> list[int]:
    """Cuts every 64 characters in long runs of symbols.

    spaCy's tokenizers take quadratic time on them, and make each symbol a word.
    """
    return [match.end() for match in _LONG_RUN.finditer(text)]


@functools.lru_cache(maxsize=8)
def _spacy_tokenizer(language: str) -> Callable[[str], Any]:
    import spacy  # takes seconds to import

    try:
        return spacy.blank(language).tokenizer
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"language: cannot use spaCy's {language!r}: {reason}") from error


def _starts_at_characters(
    batch: ResponseBatch, boundaries: Callable[[str], Iterable[int]]
) -> Tensor:
    responses = zip(batch.texts, batch.offsets, strict=True)
    return starts_tensor(batch, (token_starts(t, spans, boundaries(t)) for t, spans in responses))


def _token_texts(text: str, spans: list[Span]) -> list[str]:
    """Characters that each token adds; they join to `text`."""
    texts, position = [], 0
    for start, end in spans:
        texts.append(text[max(start, position) : end])
        position = max(position, end)
    return texts


def _integers(returned: Any, function: Callable[..., Any], meaning: str) -> list[int]:
    values = list(returned) if isinstance(returned, Iterable) else [returned]
    if not all(isinstance(value, int) for value in values) or not isinstance(returned, Iterable):
        raise UserError(
            f"segmenter {_name(function)}: returned {returned!r}, must be a list of "
            f"integers, the {meaning}"
        )
    return values


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", None) or repr(function)
