"""Laws of segmenters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from marlhf.common.registry import Spec
from marlhf.common.tokenization import Tokenizer
from marlhf.common.types import ResponseBatch
from marlhf.segmenters import SegmenterFn, build_segmenter, segment

TEXTS = (
    "When it rains, nobody sings. When it shines - everybody does!",
    "Yes.",
    "def f(x):\n    return [x ** 2, None]  # squares\n\n\nf(3)",
    'Prices rose by 3.5% (see "Table 1"), i.e. more than expected...\n\n- one\n- two',
    "ein Häuschen, 日本語の文。 🙂🙂",
    " a",
    "",
)
"""Prose, code, lists, punctuation, other scripts, one token, and nothing."""


def check_segmenter(
    segmenter: Spec | SegmenterFn,
    tokenizer: Tokenizer,
    texts: Sequence[str] = TEXTS,
    *,
    stateful: bool = False,
) -> None:
    """Check the laws of a segmenter. Raises AssertionError, naming law and text.

    contract     starts of the right shape, one at each response's first token, none on padding, the
                 batch unchanged: what `marlhf ppo` refuses by itself
    repetition   the same batch is cut in the same places
    padding      neither more of it nor what it holds matters
    company      a response is cut in the same places alone, and with others in another order

    tokenizer   makes tokens of the texts, and is what the segmenter reads
    texts       responses to cut, all but the first end with the tokenizer's EOS; log-probabilities,
                entropies and those of the reference are random
    stateful    it learns from what it has seen, or draws by place in the batch; only the contract
                 is checked
    """
    segmenter = build_segmenter(segmenter)
    batch = _batch(tokenizer, texts)
    starts = segment(segmenter, batch)
    if stateful:
        return
    _compare(segment(segmenter, batch), starts, texts, "repetition: the same batch again")
    T = starts.shape[1]
    wider = _changed(batch, lambda x: torch.nn.functional.pad(x, (0, 3)))
    _compare(segment(segmenter, wider)[:, :T], starts, texts, "padding: three more tokens of it")

    def spoilt(x: Tensor) -> Tensor:
        return x if x.dtype == torch.bool else x.masked_fill(~batch.response_mask, 7)

    noisy = _changed(batch, spoilt)
    _compare(segment(segmenter, noisy), starts, texts, "padding: the number 7 in it")
    order = list(range(len(texts)))[::-1]
    turned = _changed(batch, lambda x: x[order])
    assert batch.row_ids is not None
    turned = replace(turned, row_ids=batch.row_ids[order])
    law = "company: the responses from last to first"
    _compare(segment(segmenter, turned)[order], starts, texts, law)
    for row in range(len(texts)):
        width = max(1, int(batch.response_mask[row].sum()))
        alone = _changed(batch, lambda x, row=row, width=width: x[row : row + 1, :width])
        alone = replace(alone, row_ids=batch.row_ids[row : row + 1])
        law = "company: a response alone"
        wanted = starts[row : row + 1, :width]
        _compare(segment(segmenter, alone), wanted, texts[row : row + 1], law)


def _batch(tokenizer: Any, texts: Sequence[str]) -> ResponseBatch:
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if tokenizer.eos_token_id is not None:  # a finished response has it, one that was cut has none
        rows = [row + [tokenizer.eos_token_id] * (i > 0) for i, row in enumerate(rows)]
    T = max(map(len, rows))
    mask = torch.arange(T) < torch.tensor(list(map(len, rows)))[:, None]
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows], dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, *ids.shape, generator=generator) * 3
    return ResponseBatch(
        token_ids=ids,
        response_mask=mask,
        logprobs=-noise[0],
        ref_logprobs=-noise[1],
        entropy=noise[2],
        row_ids=torch.arange(len(rows)),
        tokenizer=tokenizer,
    )


def _changed(batch: ResponseBatch, change: Any) -> ResponseBatch:
    """The batch with all its [B,T] tensors changed."""
    names = ("token_ids", "response_mask", "logprobs", "ref_logprobs", "entropy")
    return replace(batch, **{name: change(getattr(batch, name)) for name in names})


def _compare(actual: Tensor, wanted: Tensor, texts: Sequence[str], law: str) -> None:
    for text, now, before in zip(texts, actual, wanted, strict=True):
        assert torch.equal(now, before), (
            f"{law}: {text!r} is cut at tokens {now.nonzero().flatten().tolist()}, was at "
            f"{before.nonzero().flatten().tolist()}"
        )
