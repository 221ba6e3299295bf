"""Segment texts for `marlhf segment`, and show the result in a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from marlhf.common.errors import UserError, printable
from marlhf.common.tokenization import (
    Tokenizer,
    continuation_ids,
    encode_texts,
)
from marlhf.views.terminal import colour_macro_actions, macro_pieces

if TYPE_CHECKING:
    from marlhf.segmenters import SegmenterFn

_NARROWEST = 36  # columns a segmenter's text needs to be readable


@dataclass(frozen=True)
class Segmented:
    """A text in tokens, and the macro-action starts of each segmenter.

    pieces     text of each token; joined they are the text
    ids        token ids
    logprobs   of each token under the model, nats; None without a model
    starts     for each segmenter, for each token: whether a macro action starts there
    """

    pieces: list[str]
    ids: list[int]
    logprobs: list[float] | None
    starts: list[list[bool]]

    def macro_actions(self, segmenter: int) -> list[range]:
        """Token positions of each macro action."""
        begins = [t for t, start in enumerate(self.starts[segmenter]) if start]
        return [range(a, b) for a, b in pairwise([*begins, len(self.ids)])]

    def written(self, tokens: range) -> str:
        """Text of a range of tokens."""
        return "".join(self.pieces[tokens.start : tokens.stop])


def segment_texts(
    texts: Sequence[str],
    segmenters: Sequence[SegmenterFn],
    tokenizer: Tokenizer,
    model_path: str | None = None,
    prompts: Sequence[str | None] | None = None,
) -> list[Segmented]:
    """Segment texts, tokenised as continuations of their prompts, by every segmenter.

    model_path   a causal LM for each token's log-probability given the prompt and preceding text

    Raises UserError, naming the segmenter, for any error in a segmenter.
    """
    import torch

    from marlhf.common.types import ResponseBatch
    from marlhf.segmenters import segment

    prompts = list(prompts or [None] * len(texts))
    # a text that begins with a space counts as a response without its prompt
    continues = [bool(p) or t[:1] == " " for p, t in zip(prompts, texts, strict=True)]
    token_ids = [
        continuation_ids(text, tokenizer)
        if is_response
        else encode_texts(tokenizer, [text], special=[False])[0]
        for text, is_response in zip(texts, continues, strict=True)
    ]
    lengths = torch.tensor([len(tokens) for tokens in token_ids])
    ids = torch.zeros(len(token_ids), max(map(len, token_ids)), dtype=torch.int64)
    for i, tokens in enumerate(token_ids):
        ids[i, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    logprobs = entropy = None
    if model_path is not None:
        logprobs, entropy = _logprobs(model_path, tokenizer, token_ids, prompts, mask)
    batch = ResponseBatch(
        ids, mask, logprobs, logprobs, entropy, tokenizer=tokenizer, continues=continues
    )
    cut = [segment(segmenter, batch).tolist() for segmenter in segmenters]
    segmented = []
    for i, tokens in enumerate(token_ids):
        count = len(tokens)
        segmented.append(
            Segmented(
                pieces=macro_pieces(batch.texts[i], batch.offsets[i], [True] * count),
                ids=tokens,
                logprobs=None if logprobs is None else logprobs[i, :count].tolist(),
                starts=[starts[i][:count] for starts in cut],
            )
        )
    return segmented


def _logprobs(
    path: str,
    tokenizer: Tokenizer,
    token_ids: Sequence[Sequence[int]],
    prompts: Sequence[str | None],
    mask: Any,
) -> Any:
    """Log-probabilities of `token_ids` and entropies before each token, nats, [2,B,T].

    0 outside the mask. Raises UserError if the model cannot take them.
    """
    import torch

    from marlhf.common.third_party_output import hide_loading_bars
    from marlhf.config import ModelSettings
    from marlhf.models.loading import admit, load_causal_lm, load_model_config, position_limit
    from marlhf.models.policy import Policy

    hide_loading_bars()
    settings = ModelSettings(path=path)
    config = load_model_config(settings, "--model")
    contexts = [_context(tokenizer, prompt) for prompt in prompts]
    longest = max(len(c) + len(tokens) for c, tokens in zip(contexts, token_ids, strict=True))
    limit = position_limit(config)
    if limit is not None and longest > limit:
        raise UserError(f"--model: takes {limit} tokens, and prompt and text have {longest}")
    vocabulary = config.get_text_config().vocab_size
    if any(i >= vocabulary for tokens in [*token_ids, *contexts] for i in tokens):
        raise UserError(
            f"--model: has {vocabulary} tokens, fewer than the tokenizer uses; leave --tokenizer "
            "out to take the model's own"
        )
    model = load_causal_lm(settings, config)
    admit(model, longest, "--model", samples=False)
    policy = Policy(model).eval()
    outputs = torch.zeros(2, *mask.shape)
    for i, (context, tokens) in enumerate(zip(contexts, token_ids, strict=True)):
        if tokens:
            ids = torch.tensor([[*context, *tokens]])
            with torch.no_grad():
                attention_mask = torch.ones_like(ids).bool()
                response_mask = mask[i : i + 1, : len(tokens)]
                logprobs, extras = policy(ids, attention_mask, response_mask, extras=("entropy",))
            outputs[:, i, : len(tokens)] = torch.cat((logprobs, extras["entropy"]))
    return outputs


def _context(tokenizer: Tokenizer, prompt: str | None) -> list[int]:
    """Context before the text: the prompt, or else one token to start from. Raises UserError."""
    if prompt:
        return encode_texts(tokenizer, [prompt], special=[True])[0]
    for first in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if first is not None:
            return [first]
    raise UserError("--prompt: is required, because this tokenizer has no token that begins a text")


@dataclass(frozen=True)
class Summary:
    """Macro actions of one segmenter over all texts.

    lengths   number of macro actions by their length in tokens
    """

    lengths: Counter[int]

    @property
    def count(self) -> int:
        """Number of macro actions."""
        return self.lengths.total()

    @property
    def mean(self) -> float:
        """Mean tokens per macro action."""
        return sum(n * k for n, k in self.lengths.items()) / max(self.count, 1)

    @property
    def longest(self) -> int:
        """Tokens of the longest macro action."""
        return max(self.lengths, default=0)


def summarise(segmented: Sequence[Segmented], segmenter: int) -> Summary:
    """Summary of all macro actions of a segmenter."""
    return Summary(Counter(len(r) for item in segmented for r in item.macro_actions(segmenter)))


def show(segmented: Sequence[Segmented], labels: Sequence[str], console: Console) -> None:
    """Print each text by each segmenter, side by side if the terminal is wide enough."""
    wide = console.is_terminal and console.width >= _NARROWEST * len(labels)
    for number, item in enumerate(segmented, 1):
        heading = f"text {number} of {len(segmented)}, " if len(segmented) > 1 else ""
        perplexity = f", perplexity {_perplexity(item):.1f}" if item.logprobs else ""
        console.rule(f"{heading}{len(item.ids)} tokens{perplexity}", align="left", style="dim")
        cut = [
            colour_macro_actions(
                [item.written(tokens) for tokens in item.macro_actions(i)], console, "⏎\n"
            )
            for i in range(len(labels))
        ]
        if wide:
            table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
            for label in labels:
                table.add_column(Text(printable(label)), ratio=1)
            table.add_row(*cut)
            console.print(table)
            continue
        for label, coloured in zip(labels, cut, strict=True):
            console.print(Text(printable(label), style="bold"), soft_wrap=True)
            console.print(Group(coloured, ""), soft_wrap=not console.is_terminal)
    console.print(_summary_table(segmented, labels))


def _perplexity(item: Segmented) -> float:
    assert item.logprobs is not None
    return math.exp(-sum(item.logprobs) / max(len(item.logprobs), 1))


def _summary_table(segmented: Sequence[Segmented], labels: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("segmenter", overflow="fold")
    for heading in ("macro actions", "tokens each", "longest"):
        table.add_column(heading, justify="right")
    table.add_column("of 1, 2, 3... tokens")
    for i, label in enumerate(labels):
        summary = summarise(segmented, i)
        cells = (
            f"{summary.count}",
            f"{summary.mean:.2f}",
            f"{summary.longest}",
            _bars(summary.lengths),
        )
        table.add_row(Text(printable(label)), *cells)
    return table


def _bars(lengths: Counter[int], width: int = 24) -> str:
    """A one-line histogram; lengths of `width` and more share the last bar."""
    counts = [lengths[n] for n in range(1, min(max(lengths, default=0), width) + 1)]
    if max(lengths, default=0) > width:
        counts[-1] += sum(k for n, k in lengths.items() if n > width)
    top = max(counts, default=1)
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // top)] for count in counts)
