"""Where token ids and text meet: loading a tokenizer, and the characters that each token wrote.

Text is never decoded and tokenised again: a generated sequence need not be the tokenizer's own
encoding of its text. Offsets are found from what decoding one more token adds to the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Span = tuple[int, int]

_UNFINISHED = "\ufffd"  # what a decoder prints for bytes that are not yet a character


def decode_with_offsets(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of `ids`, special tokens left out, and the half-open character span of each token.

    Tokens that together write one character (byte-level pieces of an emoji) all carry the span of
    that character, and bytes that are no character share a span with the token after them; a token
    that writes nothing (a special token) has an empty span. Spans never move backwards, and the
    last one ends at `len(text)` when any token writes text.
    """
    text = _decode(tokenizer, ids)
    spans = _incremental_spans(tokenizer, ids, text)
    if spans is None:
        spans = _prefix_spans(tokenizer, ids, text)
    return text, spans


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def _incremental_spans(tokenizer: Any, ids: Sequence[int], text: str) -> list[Span] | None:
    """Spans from decoding a sliding window; None when the pieces do not add up to `text`.

    The window keeps the tokens of the last piece as context, because a decoder may treat the first
    token of what it is given differently (SentencePiece drops its leading space).
    """
    spans: list[Span] = []
    context, pending, position = 0, 0, 0
    context_text = ""
    for end in range(1, len(ids) + 1):
        window_text = _decode(tokenizer, ids[context:end])
        if window_text.endswith(_UNFINISHED) and end < len(ids):
            continue
        if not window_text.startswith(context_text):
            return None
        piece = window_text[len(context_text) :]
        if not text.startswith(piece, position):
            return None
        spans.extend([(position, position + len(piece))] * (end - pending))
        position += len(piece)
        if piece:
            context = pending
            context_text = _decode(tokenizer, ids[context:end])
        else:
            context_text = window_text
        pending = end
    return spans if position == len(text) else None


def _prefix_spans(tokenizer: Any, ids: Sequence[int], text: str) -> list[Span]:
    """Spans from decoding every prefix: quadratic, but right for decoders that rewrite their tail.

    A token ends where the common prefix of the text so far and the whole text ends.
    """
    spans: list[Span] = []
    start, pending = 0, 0
    for end in range(1, len(ids) + 1):
        prefix = _decode(tokenizer, ids[:end])
        common = start
        limit = min(len(prefix), len(text))
        while common < limit and prefix[common] == text[common]:
            common += 1
        if end == len(ids):
            common = len(text)
        elif prefix.endswith(_UNFINISHED):
            continue
        spans.extend([(start, common)] * (end - pending))
        start, pending = common, end
    return spans
