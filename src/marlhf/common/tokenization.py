"""Encoding of texts, and decoding of responses that continue them.

A response is never decoded and tokenised again for the policy: a sampled sequence need not be the
tokenizer's encoding of its text. Offsets come from the text that decoding more tokens adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any, Protocol

Span = tuple[int, int]


class Tokenizer(Protocol):
    """The members of a transformers tokenizer that the library relies on."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: Any

    def __len__(self) -> int: ...

    def __call__(self, text: Any, /, **options: Any) -> Any: ...

    def decode(self, token_ids: Any, /, **options: Any) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...

    def get_chat_template(self) -> str: ...

    def apply_chat_template(self, conversation: Any, /, **options: Any) -> Any: ...

    def save_pretrained(self, save_directory: Any, /) -> Any: ...


_UNKNOWN = "\ufffd"  # a decoder's output for bytes that are not, or not yet, a character
_CONTEXT = 4  # tokens; no character has more bytes
_PROBES = ("a", "0", "\n")  # every tokenizer encodes at least one of them


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], special: Sequence[bool], ending: bool = False
) -> list[list[int]]:
    """Encode texts, without doubling the special tokens at their start.

    A text that already begins with the tokenizer's special tokens (usually BOS) does not get them
    again, wherever they come from. All models' inputs are encoded in this way.

    special   per text: add the tokenizer's special tokens; False for a text from a chat template
    ending    also add its special tokens after a text, unless the text ends with them
    """
    if not texts:
        return []
    before, after = added_ids(tokenizer)
    first, encoded = set(text_start(tokenizer)), []
    for ids, flag in zip(_bare_ids(tokenizer, texts), special, strict=True):
        leading = list(takewhile(first.__contains__, ids))
        start = before if flag and before else list(dict.fromkeys(leading))
        sequence = start + ids[len(leading) :]
        if flag and ending and after == [tokenizer.eos_token_id]:
            sequence = with_eos(sequence, tokenizer)
        elif flag and ending and after and sequence[-len(after) :] != after:
            sequence = [*sequence, *after]
        encoded.append(sequence)
    return encoded


def continuation_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encode a text that continues another.

    Without special tokens, and without the space that SentencePiece tokenizers put before a text.
    """
    for anchor in ("\n", "a"):  # one of them does not join with what follows
        before, both = _bare_ids(tokenizer, [anchor, anchor + text])
        if both[: len(before)] == before:
            return both[len(before) :]
    return _bare_ids(tokenizer, [text])[0]


def added_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds before a text, and after it."""
    full: list[int] = []
    for probe in _PROBES:
        (bare,) = _bare_ids(tokenizer, [probe])
        full = list(tokenizer(probe, verbose=False)["input_ids"])
        starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        if bare and starts:
            return full[: starts[0]], full[starts[0] + len(bare) :]
    count = len(full) - (full[-1:] == [tokenizer.eos_token_id])
    return full[:count], full[count:]


def text_start(tokenizer: Tokenizer) -> list[int]:
    """Special tokens at the start of a text: the tokenizer's, else BOS; may be empty."""
    before, _ = added_ids(tokenizer)
    bos = tokenizer.bos_token_id
    return before or ([] if bos is None else [bos])


def with_eos(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Append EOS, unless the encoded text ends with one or the tokenizer has none.

    White space and further EOS after the text's own EOS are removed.
    """
    eos, text = tokenizer.eos_token_id, list(ids)
    end = end_of_text(text, tokenizer)
    if eos is None or (end is not None and _is_blank(text[end:], tokenizer)):
        return text[:end]
    return [*text, eos]


def end_of_text(ids: Sequence[int], tokenizer: Tokenizer) -> int | None:
    """Number of tokens up to and including the final EOS; None without one.

    Of several EOS at the end, with only white space between them, it is the first: a template may
    add one to a text that has one.
    """
    eos, end = tokenizer.eos_token_id, None
    if eos is None or eos not in ids:
        return None
    for i in reversed(range(len(ids))):
        if ids[i] == eos:
            end = i + 1
        elif end is not None and not _is_blank(ids[i : i + 1], tokenizer):
            break
    return end


def _is_blank(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether tokens decode to nothing but white space and EOS."""
    written = [token for token in ids if token != tokenizer.eos_token_id]
    return not written or not tokenizer.decode(written).strip()


def has_text(prompt_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a prompt is more than BOS, so that what follows continues a text."""
    return any(token != tokenizer.bos_token_id for token in prompt_ids)


def _bare_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    # verbose: no warning about texts longer than the model's limit, which are truncated later
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [list(ids) for ids in rows]


def decode_with_offsets(
    tokenizer: Tokenizer, ids: Sequence[int], continues: bool = True, **options: Any
) -> tuple[str, list[Span]]:
    """`ResponseDecoder(tokenizer, **options).with_offsets` for one response."""
    return ResponseDecoder(tokenizer, **options).with_offsets(ids, continues)


class ResponseDecoder:
    """Decodes a response into its continuation of the prompt's text.

    The tokenizer decodes a response after an anchor, tokens of some other text, whose text is then
    removed: decoders treat the first token of their input differently (SentencePiece drops its
    space). Spaces are never cleaned up.

    eos_ids               left out at the end of a response, as are the tokenizer's EOS and padding
    skip_special_tokens   leave all special tokens out, wherever they are
    """

    def __init__(
        self, tokenizer: Tokenizer, eos_ids: Sequence[int] = (), skip_special_tokens: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._options = {"skip_special_tokens": skip_special_tokens}
        if getattr(tokenizer, "clean_up_tokenization_spaces", False):
            self._options["clean_up_tokenization_spaces"] = False
        eos, pad = (getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "pad"))
        self._ends = {*eos_ids, eos, pad}
        self._pieces: dict[int, str] = {}  # the text that a token adds by itself
        anchors = _bare_ids(tokenizer, _PROBES) if callable(tokenizer) else []
        anchors += [] if eos is None else [[eos]]
        self._anchors = [*(a for a in anchors if self._decode(a)), []]

    def text(self, ids: Sequence[int], continues: bool = True) -> str:
        """The text of a response; `continues` if it follows other text."""
        return self._text(list(ids[: self._length(ids)]), continues)

    def with_offsets(self, ids: Sequence[int], continues: bool = True) -> tuple[str, list[Span]]:
        """The text of a response, and the half-open character span of each of its tokens.

        Tokens that together write one character (byte-level pieces of an emoji) all carry the span
        of that character, or of the decoder's substitute where it is incomplete; a token that
        writes nothing has an empty span. Spans never move backwards, and cover the text.

        The number of tokens decoded is linear in `len(ids)` for any ids.
        """
        written = list(ids[: self._length(ids)])
        text = self._text(written, continues)
        end = (len(text), len(text))
        return text, self._spans(written, text, continues) + [end] * (len(ids) - len(written))

    def _length(self, ids: Sequence[int]) -> int:
        """Tokens without EOS and padding at the end."""
        length = len(ids)
        while length and ids[length - 1] in self._ends:
            length -= 1
        return length

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, **self._options)

    def _text(self, ids: list[int], continues: bool) -> str:
        contexts = self._anchors if continues else [[]]
        return next(t for c in contexts if (t := self._added(c, ids)) is not None)

    def _added(self, context: list[int], ids: list[int]) -> str | None:
        """Text that `ids` add to that of `context`; None if they change that text."""
        before = self._decode(context) if context else ""
        both = self._decode(context + ids)
        return both[len(before) :] if both.startswith(before) else None

    def _spans(self, ids: list[int], text: str, continues: bool) -> list[Span]:
        """Spans, by decoding the fewest tokens that write each next piece of the text."""
        spans: list[Span] = []
        last = 0  # the first of the tokens that wrote the last piece
        while len(spans) < len(ids):
            start, position = len(spans), spans[-1][1] if spans else 0
            behind = [self._anchors[0]] if continues or position else [[]]
            if start:
                behind = [ids[max(last, start - _CONTEXT) : start], *behind]
            size, piece = self._next(ids, start, text, position, behind)
            if piece:
                last = start
            share = not piece and text[position - 1 : position] == _UNKNOWN  # of one character
            spans += [spans[-1] if share else (position, position + len(piece))] * size
        return spans

    def _next(
        self, ids: list[int], start: int, text: str, position: int, contexts: list[list[int]]
    ) -> tuple[int, str]:
        """Number of tokens from `start` that write the text's next piece, and that piece."""

        def piece(size: int) -> str | None:
            window = ids[start : start + size]
            added = (self._added(context, window) for context in contexts)
            return next((a for a in added if a is not None and text.startswith(a, position)), None)

        if contexts[-1] == self._anchors[0] and start + 1 < len(ids):
            by_itself = self._piece(ids[start])
            if by_itself and _UNKNOWN not in by_itself and text.startswith(by_itself, position):
                return 1, by_itself
        remaining, too_few = len(ids) - start, 0
        for size in _sizes(remaining):
            written = piece(size)
            while written is not None and size - too_few > 1:  # bisect for the fewest tokens
                middle = (size + too_few) // 2
                by_fewer = piece(middle)
                if by_fewer is None:
                    too_few = middle
                else:
                    size, written = middle, by_fewer
            if written is not None and size < remaining:
                return size, written
            too_few = size
        return remaining, text[position:]

    def _piece(self, token: int) -> str:
        """The text that a token adds by itself."""
        if token not in self._pieces:
            self._pieces[token] = self._text([token], continues=True)
        return self._pieces[token]


def _sizes(limit: int) -> Iterator[int]:
    """Growing numbers of tokens to try, up to `limit`.

    Of three consecutive ones, one ends at the end of a three-byte character.
    """
    sizes = [*range(1, 2 * _CONTEXT + 1)]
    while sizes[-1] < limit:
        sizes += range(2 * sizes[-1], 2 * sizes[-1] + 3)
    yield from (s for s in sizes if s < limit)
    yield limit
