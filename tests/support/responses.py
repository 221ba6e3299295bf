"""Responses as a policy may sample them, as batches and as hypothesis strategies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from marlhf.common.types import ResponseBatch
from support.tokenizer_families import FAMILIES, SAMPLES

families = st.sampled_from(sorted(FAMILIES))


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def batch_of(tokenizer: Any, responses: Sequence[Sequence[int]], padding: int = 0, **fields: Any):
    """A ResponseBatch padded with whatever token comes first in the vocabulary."""
    width = max(map(len, responses), default=0) + padding
    ids = [[*row, *[0] * (width - len(row))] for row in responses]
    mask = [[t < len(row) for t in range(width)] for row in responses]
    return ResponseBatch(
        token_ids=torch.tensor(ids, dtype=torch.int64).reshape(len(responses), width),
        response_mask=torch.tensor(mask, dtype=torch.bool).reshape(len(responses), width),
        tokenizer=tokenizer,
        **fields,
    )


def text_batch(tokenizer: Any, *texts: str, **fields: Any) -> ResponseBatch:
    return batch_of(tokenizer, [encode(tokenizer, text) for text in texts], **fields)


def pieces(starts: Tensor, batch: ResponseBatch, row: int = 0) -> list[str]:
    """The text of each macro action of one row."""
    found: list[str] = []
    position = 0
    for token, (_, end) in enumerate(batch.offsets[row]):
        if starts[row, token]:
            found.append("")
        found[-1] += batch.texts[row][position:end]
        position = max(position, end)
    return found


@st.composite
def sampled_ids(draw, tokenizer: Any, max_size: int = 24) -> list[int]:
    """Token ids that need not be the encoding of any text: random ids, slices of real text that
    begin and end in mid-character, special tokens in the middle, ids beyond the vocabulary."""
    ids: list[int] = []
    anything = st.integers(0, len(tokenizer) + 2)
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            ids += draw(st.lists(anything, max_size=8))
        else:
            encoded = encode(tokenizer, draw(st.sampled_from(SAMPLES)))
            first = draw(st.integers(0, len(encoded) - 1))
            ids += encoded[first : first + draw(st.integers(1, 10))]
    return ids[:max_size]


@st.composite
def sampled_responses(draw, max_rows: int = 4) -> tuple[str, list[list[int]]]:
    """The name of a tokenizer family and responses in it, at least one."""
    family = draw(families)
    row = sampled_ids(FAMILIES[family]())
    return family, draw(st.lists(row, min_size=1, max_size=max_rows))


class PieceTokenizer:
    """A tokenizer whose tokens are the given pieces of text; for cases worked out by hand."""

    def __init__(self) -> None:
        self.pieces: list[str] = [""]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.pieces[token] for token in ids)


def piece_batch(*rows: Sequence[str], **fields: Any) -> ResponseBatch:
    """Responses given as the text of each token; "" is a special token."""
    tokenizer = PieceTokenizer()
    ids = []
    for row in rows:
        first = len(tokenizer.pieces)
        tokenizer.pieces += row
        ids.append(list(range(first, first + len(row))))
    return batch_of(tokenizer, ids, **fields)
