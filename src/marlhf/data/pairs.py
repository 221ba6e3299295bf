"""Loads and tokenises preference pairs for reward models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from marlhf.common.chat_templates import answer_left_out, joined
from marlhf.common.errors import UserError, one_line
from marlhf.config import PairDataSettings, RewardConfig
from marlhf.data.conversations import text_or_messages
from marlhf.data.files import Row, number_in, read_rows
from marlhf.data.prompts import (
    Prompt,
    check_template,
    load_records,
    prompts_of,
    source_labels,
)
from marlhf.data.template_checks import LEFT_OUT, REPEATED, RowNotes
from marlhf.rewards.learned import encode_for_reward, reward_texts, with_completion

_BEGINS_WITH_PROMPT = (
    "data: every answer begins with its prompt, which the model therefore reads twice; set "
    "data.full_texts=true where the columns hold both"
)
_THE_SAME = "the model reads the same text for both answers, and learns nothing from the pair"


@dataclass(frozen=True)
class Pair:
    """Token ids of the two texts, and the margin of the ranking loss."""

    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class Preferences:
    """Data to train, evaluate and centre a reward model on.

    demonstrations   token ids of the texts whose mean score becomes 0
    truncated        number of texts of training pairs that were truncated on the left
    notes            lines about repeated turns, dropped text, and pairs of equal texts
    """

    pairs: list[Pair]
    held_out: list[Pair]
    demonstrations: list[list[int]]
    truncated: int
    notes: Sequence[str] = ()


def load_preferences(config: RewardConfig, tokenizer: Any) -> Preferences:
    """Load the pairs and demonstrations of a configuration. Raises UserError, naming the row."""
    data, reader = config.data, _Decoder(config, tokenizer)
    if data.apply_chat_template:
        check_template(tokenizer)
    rows, held_out = load_records(data, "reward")
    train_label, held_out_label = source_labels(data, len(rows))
    pairs = reader.pairs(rows, *train_label)
    truncated = reader.truncated
    column = data.demonstrations_column or data.chosen_column
    if data.demonstrations_path is not None:
        shown = read_rows(data.demonstrations_path, key="data.demonstrations_path")
        demonstrations = reader.texts(shown, column, "demonstrations_column", "demonstrations", 0)
    elif data.demonstrations_column is not None:
        demonstrations = reader.texts(rows, column, "demonstrations_column", *train_label)
    else:
        demonstrations = [pair.chosen for pair in pairs]
    held_out_pairs = reader.pairs(held_out, *held_out_label)
    return Preferences(pairs, held_out_pairs, demonstrations, truncated, reader.notes())


class _Decoder:
    """Tokenises rows for a reward model, exactly as `RewardModel` does."""

    def __init__(self, config: RewardConfig, tokenizer: Any) -> None:
        self._data, self._tokenizer = config.data, tokenizer
        self._max_length = config.max_length
        self.truncated = 0
        self._notes = RowNotes()
        self._plain_texts = self._repeating = 0  # all answers; those that repeat the prompt

    def notes(self) -> list[str]:
        """Lines about problems of the texts."""
        begin = 0 < self._plain_texts == self._repeating
        return [*self._notes.lines(), *([_BEGINS_WITH_PROMPT] if begin else [])]

    def pairs(self, rows: Sequence[Row], where: str, first_row: int) -> list[Pair]:
        """Preference pairs of the rows."""
        data = self._data
        chosen = self.texts(rows, data.chosen_column, "chosen_column", where, first_row)
        rejected = self.texts(rows, data.rejected_column, "rejected_column", where, first_row)
        margins = [
            _margin(row, data, f"{where}: row {number}")
            for number, row in enumerate(rows, first_row)
        ]
        pairs = [Pair(*pair) for pair in zip(chosen, rejected, margins, strict=True)]
        for number, pair in enumerate(pairs, first_row):
            same = pair.chosen == pair.rejected
            self._notes.add_if(_THE_SAME, f"{where}: row {number}", same)
        return pairs

    def texts(
        self, rows: Sequence[Row], column: str, key: str, where: str, first_row: int
    ) -> list[list[int]]:
        """Token ids of each row's prompt with the answer in a column."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        if rows and column not in names:
            raise UserError(
                f"data.{key}: no column is called {column!r}; the {where} has {', '.join(names)}"
            )
        prompts: list[Prompt | None] = [None] * len(rows)
        if not self._data.full_texts:
            prompts = [*prompts_of(rows, self._data, where, first_row)]
        found = []
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True), first_row):
            label = f"{where}: row {number}"
            answer, turns = text_or_messages(row.get(column), label, f"column {column!r}")
            found.append(self._ids(prompt, answer, turns, label))
        return found

    def _ids(self, prompt: Prompt | None, answer: str, turns: Any, where: str) -> list[int]:
        messages = prompt.messages if prompt is not None else None
        text = prompt.text if prompt is not None else ""
        if turns is not None:
            if turns[-1]["role"] != "assistant":
                raise UserError(f"{where}: the last message must be the assistant's")
            before = messages or ([{"role": "user", "content": text}] if prompt else [])
            (*messages, last), _, repeated = joined(before, turns)
            answer = last["content"]
            self._notes.add_if(REPEATED, where, repeated)
            if not messages:
                raise UserError(f"{where}: the conversation has no turn before the assistant's")
        elif prompt is not None and messages is None:
            self._plain_texts += 1
            self._repeating += answer.startswith(text)
        try:
            texts, templated = reward_texts(self._tokenizer, [text], [answer], [messages])
        except UserError as error:
            raise UserError(f"model.chat_template: {where}: {error}") from error
        if messages and templated[0]:
            lost = answer_left_out(with_completion(messages, answer), texts[0])
            self._notes.add_if(LEFT_OUT, where, lost)
        (ids,) = encode_for_reward(self._tokenizer, texts, templated)
        if len(ids) <= self._max_length:
            return ids
        self.truncated += 1
        return encode_for_reward(self._tokenizer, texts, templated, self._max_length)[0]


def _margin(row: Row, data: PairDataSettings, where: str) -> float:
    if data.margin_column is None:
        return 0.0
    if data.margin_column not in row:
        raise UserError(
            f"data.margin_column: {where} has no column {data.margin_column!r}; it has "
            f"{', '.join(row)}"
        )
    margin = number_in(row[data.margin_column])
    if margin is None or not 0 <= margin < math.inf:
        given = one_line(repr(row[data.margin_column]), 60)
        raise UserError(f"{where}: the margin is {given}, must be a number of at least 0")
    return float(margin)


def choose_pad_token(tokenizer: Any, vocabulary: int, used: set[int]) -> None:
    """Choose a pad token that no text contains: transformers scores the last non-pad token.

    Prefers, in order: the present one, a new token with a spare embedding, an unused special
    token, a new token for which the model's embeddings must be resized.

    used   every token id in the data
    """
    taken = {*used, tokenizer.eos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return
    special = sorted(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)
    unused = [i for i in special if i not in {*taken, tokenizer.bos_token_id}]
    if len(tokenizer) < vocabulary or not unused:
        tokenizer.add_special_tokens({"pad_token": "<|reward_pad|>"})
    else:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(unused[0])
