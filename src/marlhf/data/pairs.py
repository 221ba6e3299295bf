"""Loads and tokenises preference pairs for reward models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from marlhf.common.chat_templates import (
    answer_left_out,
    joined,
    prompt_left_out,
    without_answers,
)
from marlhf.common.errors import UserError, one_line
from marlhf.common.tokenization import Tokenizer
from marlhf.config import PairDataSettings, RewardConfig
from marlhf.config.loading import config_to_dict
from marlhf.data.conversations import text_or_messages
from marlhf.data.encoding import tokenised_key
from marlhf.data.files import Row, number_in, read_rows
from marlhf.data.prompts import (
    Prompt,
    PromptMaker,
    check_template,
    load_records,
    source_labels,
)
from marlhf.data.rows import (
    DataSource,
    Derived,
    RowDigest,
    Rows,
    batches_of,
    list_lengths,
)
from marlhf.data.store import Stored, Writer, stored
from marlhf.data.template_checks import (
    LEFT_OUT,
    REPEATED,
    TOOLS_IGNORED,
    TURN_LEFT_OUT,
    RowNotes,
    ignores_tools,
)
from marlhf.rewards.learned import encode_for_reward, reward_texts, with_completion

Item = TypeVar("Item")

_IDS = pa.list_(pa.int32())
_PAIRS = pa.schema([("chosen", _IDS), ("rejected", _IDS), ("margin", pa.float64())])
_DEMONSTRATIONS = pa.schema([("demonstrations", _IDS)])
_BEGINS_WITH_PROMPT = (
    "data: every answer begins with its prompt, which the model therefore reads twice; set "
    "data.full_texts=true where the columns hold both"
)
_THE_SAME = "the model reads the same text for both answers, and learns nothing from the pair"


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of the two texts, and the margin of the ranking loss."""

    chosen: list[int]
    rejected: list[int]
    margin: float = 0.0

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class Preferences:
    """Data to train, evaluate and centre a reward model on; sequences are memory-mapped.

    demonstrations   token ids of the texts whose mean score becomes 0
    truncated        number of texts of training pairs that were truncated on the left
    longest          tokens of the longest text
    tokens           every token id that occurs
    notes            lines about repeated turns, dropped text, and pairs of equal texts
    """

    pairs: Sequence[TokenizedPair]
    held_out: Sequence[TokenizedPair]
    demonstrations: Sequence[list[int]]
    truncated: int
    longest: int
    tokens: set[int]
    notes: Sequence[str] = ()


def load_preferences(config: RewardConfig, tokenizer: Tokenizer) -> Preferences:
    """Load the pairs and demonstrations of a configuration. Raises UserError, naming the row."""
    data = config.data
    if data.apply_chat_template:
        check_template(tokenizer)
    rows, held_out = load_records(data, "reward")
    train_label, held_out_label = source_labels(data, len(rows))
    encoded = partial(_stored, config, tokenizer)
    pairs = encoded(_PAIRS, rows, *train_label)
    entries = [pairs, encoded(_PAIRS, held_out, *held_out_label)]
    if data.demonstrations_path is not None:
        separate = read_rows(data.demonstrations_path, key="data.demonstrations_path")
        entries.append(encoded(_DEMONSTRATIONS, separate, "demonstrations", 0))
    elif data.demonstrations_column is not None:
        entries.append(encoded(_DEMONSTRATIONS, rows, *train_label))
    column = _DEMONSTRATIONS.names[0] if len(entries) > 2 else "chosen"
    facts = [entry.facts for entry in entries]
    notes = RowNotes(note for part in facts for note in part["notes"]).lines()
    plain, repeating = (sum(part[name] for part in facts) for name in ("plain", "repeating"))
    return Preferences(
        pairs=_items(pairs, _pair, "chosen", "rejected"),
        held_out=_items(entries[1], _pair, "chosen", "rejected"),
        demonstrations=_items([pairs, *entries[2:]][-1], lambda row, _: row[column], column),
        truncated=pairs.facts["truncated"],
        longest=max(part["longest"] for part in facts),
        tokens={token for part in facts for token in part["tokens"]},
        notes=[*notes, *([_BEGINS_WITH_PROMPT] if 0 < plain == repeating else [])],
    )


def _pair(row: Row, _: int) -> TokenizedPair:
    return TokenizedPair(**row)


def _items(entry: Stored, make: Callable[[Row, int], Item], *columns: str) -> Derived[Item]:
    """The items of an entry, whose token ids are in `columns`."""
    lengths = np.max([list_lengths(entry.tables, column) for column in columns], axis=0)
    return Derived(Rows(entry.tables), make, entry.facts, entry.key, lengths)


def _stored(
    config: RewardConfig,
    tokenizer: Tokenizer,
    schema: pa.Schema,
    rows: Sequence[Row],
    where: str,
    first_row: int,
) -> Stored:
    """The rows' pairs or demonstrations, tokenised unless they are in the cache."""

    def build(writer: Writer) -> dict[str, Any]:
        source = DataSource.of(rows, where, first_row)
        return _Encoder(config, tokenizer, source).write(rows, schema, writer)

    settings = [config_to_dict(config.data), config.max_length, schema.names]
    return stored("pairs", tokenised_key(rows, tokenizer, settings, where, first_row), build)


class _Encoder:
    """Tokenises rows for a reward model, exactly as `RewardModel` does."""

    def __init__(self, config: RewardConfig, tokenizer: Tokenizer, source: DataSource) -> None:
        self._data, self._tokenizer, self._source = config.data, tokenizer, source
        self._max_length = config.max_length
        self._notes = RowNotes()
        self._tokens: set[int] = set()
        self._truncated = self._longest = 0
        self._plain_texts = self._repeating = 0  # all answers; those that repeat the prompt

    def write(self, rows: Sequence[Row], schema: pa.Schema, writer: Writer) -> dict[str, Any]:
        """Write all rows; returns facts about them. Raises UserError, naming the row."""
        data, digest, source = self._data, RowDigest(), self._source
        columns = {"chosen": data.chosen_column, "rejected": data.rejected_column}
        if schema is _DEMONSTRATIONS:
            columns = {"demonstrations": data.demonstrations_column or data.chosen_column}
        for name, column in columns.items():
            source.check_columns(f"{name}_column", [column])
        prompt_of = None if data.full_texts else PromptMaker(source, data)
        writer.new_table(schema)
        for first, batch in batches_of(rows):
            encoded = []
            for index, row in enumerate(batch, first):
                prompt = None if prompt_of is None else prompt_of(row, index)
                label = source.label(index)
                item: Any = {name: self._text(row, c, prompt, label) for name, c in columns.items()}
                if schema is _PAIRS:
                    item["margin"] = _margin(row, data, label)
                    self._notes.add_if(_THE_SAME, label, item["chosen"] == item["rejected"])
                    digest.add(TokenizedPair(**item))
                else:
                    digest.add(item["demonstrations"])
                encoded.append(item)
            writer.write(pa.RecordBatch.from_pylist(encoded, schema))
        return {
            "fact": digest.fact,
            "truncated": self._truncated,
            "longest": self._longest,
            "tokens": sorted(self._tokens),
            "plain": self._plain_texts,
            "repeating": self._repeating,
            "notes": self._notes.facts(),
        }

    def _text(self, row: Row, column: str, prompt: Prompt | None, label: str) -> list[int]:
        """Token ids of a row's prompt with the answer in a column."""
        answer, turns = text_or_messages(row.get(column), label, f"column {column!r}")
        is_chat = turns is not None or (prompt is not None and prompt.messages is not None)
        self._notes.add_if(TOOLS_IGNORED, label, is_chat and ignores_tools(self._tokenizer, row))
        ids = self._ids(prompt, answer, turns, label)
        self._tokens.update(ids)
        self._longest = max(self._longest, len(ids))
        return ids

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
            lost = prompt_left_out(without_answers(messages), texts[0])
            self._notes.add_if(TURN_LEFT_OUT, where, lost)
        (ids,) = encode_for_reward(self._tokenizer, texts, templated)
        if len(ids) <= self._max_length:
            return ids
        self._truncated += 1
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
        value = one_line(repr(row[data.margin_column]), 60)
        raise UserError(f"{where}: the margin is {value}, must be a number of at least 0")
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
