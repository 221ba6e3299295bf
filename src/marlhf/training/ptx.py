"""Pretraining loss in addition to PPO, against forgetting: InstructGPT's PPO-ptx.

Source: Ouyang et al. 2022 (arXiv 2203.02155), section 3.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from marlhf.common.errors import UserError
from marlhf.common.tokenization import Tokenizer, continuation_ids, with_eos
from marlhf.config import PTXSettings
from marlhf.data.encoding import encode
from marlhf.data.files import Row, read_rows
from marlhf.data.order import PromptStream
from marlhf.data.rows import Derived, RowDigest
from marlhf.data.store import stored
from marlhf.distributed import Distributed

PromptAndText = tuple[str | None, str]  # a prompt or None, and the text to train on


@dataclass(frozen=True)
class TextBatch:
    """A right-padded batch of texts.

    input_ids [B,L], attention_mask [B,L] bool
    loss_mask [B,L-1] bool: which tokens after the first are in the loss
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor

    def select(self, index: Tensor) -> TextBatch:
        """The sequences at `index`, without columns that are padding in all of them."""
        index = index.to(self.input_ids.device)
        attention_mask = self.attention_mask[index]
        L = int(attention_mask.sum(1).max())
        return TextBatch(
            self.input_ids[index, :L], attention_mask[:, :L], self.loss_mask[index, : L - 1]
        )

    def counts(self) -> Tensor:
        """Tokens in the loss, float64 [1]."""
        return self.loss_mask.sum().double()[None]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return dict(vars(self))


class TextStream:
    """This rank's texts for each optimiser step, as a function of seed and step."""

    def __init__(
        self,
        settings: PTXSettings,
        seed: int,
        tokenizer: Tokenizer,
        distributed: Distributed,
        positions: int | None = None,
    ) -> None:
        """Read the texts. Raises UserError.

        positions   the model's, or None for no limit
        """
        texts, world = load_texts(settings), distributed.world_size
        if settings.batch_size % world:
            raise UserError(
                f"ptx.batch_size: given {settings.batch_size}, must be a multiple of the {world} "
                "ranks"
            )
        if positions is not None and settings.max_length > positions:
            raise UserError(
                f"ptx.max_length: given {settings.max_length}, must not exceed the {positions} "
                "positions of the model"
            )
        self.settings, self.tokenizer, self.distributed = settings, tokenizer, distributed
        self.stream = PromptStream(texts, seed)
        self.stream.check_batch(settings.batch_size, "ptx.batch_size")

    def batch(self, step: int) -> TextBatch:
        """Texts for the policy's optimiser step `step`, counted from 0 over the run."""
        size, world = self.settings.batch_size, self.distributed.world_size
        mine = self.stream.batch(step, size)[self.distributed.rank :: world]
        limit = self.settings.max_length
        encoded = [text_ids(prompt, text, self.tokenizer, limit) for prompt, text in mine]
        device = self.distributed.device
        ids = pad_sequence([torch.tensor(x) for x, _ in encoded], batch_first=True).to(device)
        lengths, prompts = (torch.tensor(x, device=device)[:, None] for x in _sizes(encoded))
        positions = torch.arange(ids.shape[1], device=device)
        attention_mask = positions < lengths
        loss_mask = attention_mask & (positions >= prompts)
        return TextBatch(ids, attention_mask, loss_mask[:, 1:])


def load_texts(settings: PTXSettings) -> Derived[PromptAndText]:
    """Every row's text, and its prompt if there is one. Raises UserError, naming the row."""
    rows = read_rows(
        settings.path,
        settings.split,
        settings.name,
        settings.limit,
        key="ptx.path",
        split_key="ptx.split",
    )
    columns = {"text_column": settings.text_column, "prompt_column": settings.prompt_column}
    for key, column in columns.items():
        if column is not None and column not in rows.names:
            raise UserError(
                f"ptx.{key}: no column is called {column!r}; the data has {', '.join(rows.names)}"
            )

    def cell(row: Row, number: int, column: str) -> str:
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            kind = "empty" if isinstance(value, str) else type(value).__name__
            raise UserError(f"ptx.path: row {number}: {column!r} is {kind}, must be text")
        return value

    def text(row: Row, number: int) -> PromptAndText:
        column = settings.prompt_column
        prompt = None if column is None else cell(row, number, column)
        return prompt, cell(row, number, settings.text_column)

    key = None if rows.key is None else [rows.key, columns]
    survey = stored("texts", key, lambda _: {"fact": RowDigest(Derived(rows, text, {})).fact})
    return Derived(rows, text, survey.facts)


def text_ids(
    prompt: str | None, text: str, tokenizer: Tokenizer, max_length: int
) -> tuple[list[int], int]:
    """`(token ids with EOS at the end, number of leading tokens outside the loss)`.

    Without a prompt that is the first token alone, as nothing precedes it. To `max_length`, texts
    are truncated at the end, prompts on the left.
    """
    if prompt is None:
        ((ids,), _) = encode([text], tokenizer, 2**31)
        return with_eos(ids, tokenizer)[:max_length], 1
    tail = with_eos(continuation_ids(text, tokenizer), tokenizer)[: max_length - 1]
    ((head,), _) = encode([prompt], tokenizer, max_length - len(tail))
    return head + tail, len(head)


def _sizes(encoded: list[tuple[list[int], int]]) -> tuple[list[int], list[int]]:
    return [len(ids) for ids, _ in encoded], [first for _, first in encoded]
