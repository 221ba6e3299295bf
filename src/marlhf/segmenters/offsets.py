"""Character boundaries -> token boundaries, by one rule for every segmenter that reads text.

A boundary at character `c` says "a macro action starts with the character at `c`".

1.  The boundary moves back over the spaces and tabs before it, not over line breaks: leading white
    space belongs to what follows it, a line break to what precedes it.
2.  A token's anchor is its first visible character, or its first character if it writes white
    space only. The first token whose anchor is at or after the boundary starts the macro action.
    So " word" and "▁word" start at the boundary before "word", "##ing" does not, and a token with
    the end of one unit and the beginning of the next stays with the unit that it begins in.
3.  Of several tokens that write one character (bytes of an emoji) only the first can start.
4.  A token that writes nothing (a special token) never starts: it joins the macro action before.
5.  A boundary with only white space before it is the start of the response.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from marlhf.common.tokenization import Span
from marlhf.common.types import ResponseBatch

_BLANKS = re.compile("[^\\S\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]+")  # but line breaks


class TokenIndex:
    """Index of one response's tokens by the characters that they write.

    text    the decoded response
    spans   the half-open character span of each of its tokens
    """

    def __init__(self, text: str, spans: Sequence[Span]) -> None:
        self._leading = len(text) - len(text.lstrip())
        self._tokens = [token for token, (start, end) in enumerate(spans) if end > start]
        self._anchors = [_anchor(text, spans[token]) for token in self._tokens]
        blanks = [match.span() for match in _BLANKS.finditer(text)]
        self._blank_starts, self._blank_ends = zip(*blanks, strict=True) if blanks else ((), ())

    def token_at(self, char: int) -> int | None:
        """The token that starts a macro action for a boundary at `char`.

        None where no token follows, or at the start of the response, which needs no boundary.
        """
        if char <= self._leading:
            return None
        rank = self._rank(char)
        return self._tokens[rank] if rank < len(self._tokens) else None

    def count(self, start: int, end: int) -> int:
        """Number of tokens of the characters `[start, end)`; adjacent spans share none."""
        return self._rank(end) - self._rank(start)

    def _rank(self, char: int) -> int:
        run = bisect_left(self._blank_starts, char) - 1  # the last run of blanks before char
        if run >= 0 and char <= self._blank_ends[run]:
            char = self._blank_starts[run]
        return bisect_left(self._anchors, char)


def token_starts(text: str, spans: Sequence[Span], boundaries: Iterable[int]) -> set[int]:
    """Tokens at which macro actions start, for character boundaries in any order.

    The first token of the response is left out unless a boundary names it: `close` adds it.
    """
    index = TokenIndex(text, spans)
    return {token for char in boundaries if (token := index.token_at(char)) is not None}


def starts_tensor(batch: ResponseBatch, tokens: Iterable[Iterable[int]]) -> Tensor:
    """`[B,T]` bool, True at the given tokens of each response."""
    mask = batch.response_mask
    starts = torch.zeros(mask.shape, dtype=torch.bool)
    for row, indices in enumerate(tokens):
        starts[row, list(indices)] = True
    return starts.to(mask.device)


def _anchor(text: str, span: Span) -> int:
    start, end = span
    visible = text[start:end].lstrip()
    return end - len(visible) if visible else start
