"""Tokenises SFT data: completions of prompts, conversations, plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from marlhf.common.chat_templates import (
    answer_left_out,
    begins,
    joined,
    prompt_left_out,
    reasoning_of,
    without_answers,
)
from marlhf.common.errors import UserError
from marlhf.common.tokenization import (
    Tokenizer,
    continuation_ids,
    encode_texts,
    end_of_text,
    with_eos,
)
from marlhf.config import SFTConfig, SFTDataSettings
from marlhf.config.loading import config_to_dict
from marlhf.data.conversations import Messages, text_or_messages
from marlhf.data.encoding import encode, shortened, tokenised_key
from marlhf.data.files import Row
from marlhf.data.prompts import (
    PromptMaker,
    apply_template,
    fill_template,
    load_records,
    source_labels,
    template_parts,
)
from marlhf.data.rows import (
    DataSource,
    Derived,
    RowDigest,
    Rows,
    batches_of,
    list_lengths,
)
from marlhf.data.store import Writer, stored
from marlhf.data.template_checks import (
    LEFT_OUT,
    REPEATED,
    TOOLS_IGNORED,
    TURN_LEFT_OUT,
    RowNotes,
    ignores_tools,
)
from marlhf.rewards.learned import with_completion

TrainedSpan = tuple[str, bool]  # a piece of text, and whether it is in the loss

_UNLIMITED = 2**31
_SCHEMA = pa.schema(
    [("ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.bool_())), ("prompt", pa.int32())]
)
_ADDED = (
    "the chat template puts text before the answer that the prompt does not end with, so that the "
    "model learns to write it"
)


@dataclass(frozen=True)
class SFTExample:
    """An SFT example: token ids, and whether each token is in the loss.

    ids       [L]
    trained   [L]; the first token never is in the loss
    prompt    number of tokens at the start that truncation may remove
    """

    ids: list[int]
    trained: list[bool]
    prompt: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class SFTExamples:
    """Tokenised examples of an SFT job.

    rows        the examples, memory-mapped
    lengths     numbers of tokens, int64 [N]
    truncated   number of examples truncated, including those left out
    left_out    number of examples left out, as none of their tokens is in the loss
    notes       lines about repeated turns, and text that the chat template dropped or added
    """

    rows: Sequence[SFTExample]
    lengths: np.ndarray
    truncated: int
    left_out: int
    notes: Sequence[str] = ()


def load_examples(config: SFTConfig, tokenizer: Tokenizer) -> tuple[SFTExamples, SFTExamples]:
    """Load `(examples to train on, held-out examples)`. Raises UserError."""
    if tokenizer.eos_token_id is None:
        raise UserError("model.path: the tokenizer has no EOS token, which must end a completion")
    rows, held_out = load_records(config.data, "sft")
    train_label, held_out_label = source_labels(config.data, len(rows))
    return (
        as_examples(rows, config, tokenizer, *train_label),
        as_examples(held_out, config, tokenizer, *held_out_label),
    )


def as_examples(
    rows: Sequence[Row],
    config: SFTConfig,
    tokenizer: Tokenizer,
    where: str = "data",
    first_row: int = 0,
) -> SFTExamples:
    """Examples of at most `config.max_length` tokens. Raises UserError, naming the row.

    where, first_row   name of the data and number of its first row, in messages
    """

    def build(writer: Writer) -> dict[str, Any]:
        return _encode_all(rows, DataSource.of(rows, where, first_row), config, tokenizer, writer)

    settings = [config_to_dict(config.data), config.max_length, config.loss_on]
    entry = stored("examples", tokenised_key(rows, tokenizer, settings, where, first_row), build)
    facts = entry.facts
    examples = Derived(Rows(entry.tables), lambda row, _: SFTExample(**row), facts, entry.key)
    lengths = list_lengths(entry.tables, "ids")
    return SFTExamples(examples, lengths, facts["truncated"], facts["left_out"], facts["notes"])


def _encode_all(
    rows: Sequence[Row],
    source: DataSource,
    config: SFTConfig,
    tokenizer: Tokenizer,
    writer: Writer,
) -> dict[str, Any]:
    """Write the examples of all rows; returns facts about them."""
    notes, digest, bos = RowNotes(), RowDigest(), tokenizer.bos_token_id
    kind = _Texts if config.data.text_column is not None else _Completions
    examples_of = kind(source, config, tokenizer, notes)
    truncated = left_out = 0
    writer.new_table(_SCHEMA)
    for first, batch in batches_of(rows):
        examples = examples_of(batch, first)
        if config.loss_on == "all":
            examples = [
                SFTExample(e.ids, [False] + [True] * (len(e) - 1), e.prompt) for e in examples
            ]
        short = [_shortened(example, config.max_length, bos) for example in examples]
        kept = [example for example in short if any(example.trained)]
        truncated += sum(len(a) > len(b) for a, b in zip(examples, short, strict=True))
        left_out += len(short) - len(kept)
        for example in kept:
            digest.add(example)
        writer.write(pa.RecordBatch.from_pylist([vars(e) for e in kept], _SCHEMA))
    if rows and left_out == len(rows):
        raise UserError(
            f"{source.name}: no row has a token to train on within max_length={config.max_length}"
        )
    counts = {"truncated": truncated, "left_out": left_out}
    return {"fact": digest.fact, **counts, "notes": notes.lines()}


class _Completions:
    """Makes examples of prompt and completion: both text, or either in messages."""

    def __init__(
        self, source: DataSource, config: SFTConfig, tokenizer: Tokenizer, notes: RowNotes
    ) -> None:
        source.check_columns(*_completion_columns(config.data, source.columns))
        self._source, self._data, self._tokenizer = source, config.data, tokenizer
        self._notes = notes
        self._prompt = PromptMaker(source, config.data)

    def __call__(self, rows: Sequence[Row], first: int) -> list[SFTExample]:
        """Examples of rows; `first` is the index of the first one."""
        tokenizer = self._tokenizer
        heads: list[tuple[int, str, str]] = []
        examples: dict[int, SFTExample] = {}
        for i, row in enumerate(rows):
            label, prompt = self._source.label(first + i), self._prompt(row, first + i)
            completion, turns = self._completion(row, label)
            if prompt.messages is None and turns is None:
                heads.append((i, prompt.text, completion))
            else:
                messages = prompt.messages or [{"role": "user", "content": prompt.text}]
                self._notes.add_if(TOOLS_IGNORED, label, ignores_tools(tokenizer, row))
                spans = _answer_spans(messages, completion, turns, tokenizer, label, self._notes)
                examples[i] = _example(spans, tokenizer)
        prompt_ids, _ = encode([text for _, text, _ in heads], tokenizer, _UNLIMITED)
        for (i, _, completion), head in zip(heads, prompt_ids, strict=True):
            tail = with_eos(continuation_ids(completion, tokenizer), tokenizer)
            trained = [False] * len(head) + [True] * len(tail)
            examples[i] = SFTExample(head + tail, trained, len(head))
        return [examples[i] for i in range(len(rows))]

    def _completion(self, row: Row, label: str) -> tuple[str, Messages | None]:
        data = self._data
        if data.completion_template is None:
            return text_or_messages(row.get(data.completion_column), label, "completion")
        columns = dict.fromkeys(self._source.columns) | row
        completion = fill_template(data.completion_template, columns, label, "completion")
        if not completion.strip():
            raise UserError(f"{label}: the completion is empty")
        return completion, None


def _completion_columns(data: SFTDataSettings, names: Sequence[str]) -> tuple[str, list[str]]:
    """The key that names the columns of the completion, and these columns."""
    if data.completion_template is None:
        return "completion_column", [data.completion_column]
    parts = template_parts(data.completion_template, names)
    return "completion_template", [name for _, name in parts if name]


class _Texts:
    """Makes examples of one column: full texts, or conversations."""

    def __init__(
        self, source: DataSource, config: SFTConfig, tokenizer: Tokenizer, notes: RowNotes
    ) -> None:
        self._column = str(config.data.text_column)
        source.check_columns("text_column", [self._column])
        self._source, self._tokenizer, self._notes = source, tokenizer, notes
        self._trains_all = config.loss_on == "all"

    def __call__(self, rows: Sequence[Row], first: int) -> list[SFTExample]:
        """Examples of rows; `first` is the index of the first one."""
        return [self._example(row, self._source.label(i)) for i, row in enumerate(rows, first)]

    def _example(self, row: Row, label: str) -> SFTExample:
        tokenizer, notes = self._tokenizer, self._notes
        text, messages = text_or_messages(row.get(self._column), label, "text")
        if messages is None:
            (ids,), _ = encode([text], tokenizer, _UNLIMITED)
            ids = with_eos(ids, tokenizer)
            return SFTExample(ids, [False] + [True] * (len(ids) - 1))
        notes.add_if(TOOLS_IGNORED, label, ignores_tools(tokenizer, row))
        if self._trains_all:
            rendered = apply_template(messages, tokenizer, where=label)
            notes.add_if(LEFT_OUT, label, answer_left_out(messages, rendered))
            notes.add_if(TURN_LEFT_OUT, label, prompt_left_out(without_answers(messages), rendered))
            return _example([(rendered, True)], tokenizer)
        return _example(_assistant_spans(messages, tokenizer, label, notes), tokenizer)


def _answer_spans(
    messages: Messages,
    completion: str,
    turns: Messages | None,
    tokenizer: Tokenizer,
    where: str,
    notes: RowNotes,
) -> list[TrainedSpan]:
    """Prompt and completion in the chat template.

    The completion is the assistant's turn, the end of that turn, or several turns, which may begin
    with those of the prompt.
    """
    if turns is not None:
        conversation, first, repeated = joined(messages, turns)
        notes.add_if(REPEATED, where, repeated)
        return _assistant_spans(conversation, tokenizer, where, notes, first)
    before = apply_template(messages, tokenizer, for_answer=True, where=where)
    notes.add_if(TURN_LEFT_OUT, where, prompt_left_out(messages, before))
    conversation = with_completion(messages, completion)
    answer = _rest(conversation, before, conversation, tokenizer, where)
    _compare({"role": "assistant", "content": completion}, answer, where, notes)
    return [(before, False), (answer, True)]


def _assistant_spans(
    messages: Messages, tokenizer: Tokenizer, where: str, notes: RowNotes, first: int = 0
) -> list[TrainedSpan]:
    """Split a templated conversation into trained assistant turns and the rest.

    Assistant turns before message `first` are not trained.
    A turn includes the text that the template writes after it. Spans are found by rendering the
    conversation up to each turn: exact for every template that renders a conversation's beginning
    as a prefix of the full conversation. Raises UserError for other templates.
    """
    answers = [i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant"]
    if not answers:
        raise UserError(f"{where}: has no turn of the assistant to train on")
    if answers[0] == 0:
        raise UserError(f"{where}: begins with a turn of the assistant, must begin with the user's")
    full_text = apply_template(messages, tokenizer, where=where)
    notes.add_if(TURN_LEFT_OUT, where, prompt_left_out(without_answers(messages), full_text))
    spans, position = [], 0
    for i in answers:
        before = apply_template(messages[:i], tokenizer, for_answer=True, where=where)
        answer = _rest(messages[: i + 1], before, messages, tokenizer, where)
        if not full_text.startswith(before + answer):
            raise _changes(messages, tokenizer, where)
        _compare(messages[i], answer, where, notes)
        spans += [(before[position:], False), (answer, True)]
        position = len(before + answer)
    return spans


def _rest(
    messages: Messages, beginning: str, conversation: Messages, tokenizer: Tokenizer, where: str
) -> str:
    """The template's text of messages after the text `beginning`. Raises UserError."""
    text = apply_template(messages, tokenizer, where=where)
    if not text.startswith(beginning):
        raise _changes(conversation, tokenizer, where)
    return text[len(beginning) :]


def _changes(conversation: Messages, tokenizer: Tokenizer, where: str) -> UserError:
    """The error for a conversation that cannot be split into turns, with advice."""
    advice = "give another template, or conversations in data.text_column and loss_on=all"
    lost = answer_left_out(conversation, apply_template(conversation, tokenizer))
    if lost:
        advice = f"it leaves {lost!r} out altogether; give a template that keeps what they say"
    return UserError(
        f"model.chat_template: {where}: the template writes the beginning of a conversation "
        "otherwise when more follows, so that the assistant's turns cannot be told apart; " + advice
    )


def _compare(turn: dict[str, Any], answer: str, where: str, notes: RowNotes) -> None:
    """Note text that the template drops from a trained turn, or adds before it."""
    lost = answer_left_out([turn], answer)
    notes.add_if(LEFT_OUT, where, lost)
    if not lost and not reasoning_of(turn) and not begins(answer, turn["content"]):
        notes.add(_ADDED, where, answer.partition(turn["content"].strip())[0])


def _example(spans: Sequence[TrainedSpan], tokenizer: Tokenizer) -> SFTExample:
    """Tokenise the spans of a conversation.

    A trained span is in the loss up to its last EOS. The last span ends there; an EOS is appended
    where the template writes none.
    """
    eos = tokenizer.eos_token_id
    ids: list[int] = []
    trained: list[bool] = []
    for number, (text, is_trained) in enumerate(spans):
        if ids:
            span_ids = continuation_ids(text, tokenizer)
        else:
            (span_ids,) = encode_texts(tokenizer, [text], [False])
        end = end_of_text(span_ids, tokenizer)
        if number == len(spans) - 1:
            span_ids = [*span_ids, eos] if end is None else span_ids[:end]
        end = len(span_ids) if end is None else end
        ids += span_ids
        trained += [is_trained and i < end for i in range(len(span_ids))]
    trained[0] = False
    prompt = trained.index(True) if len(spans) == 2 and any(trained) else 0
    return SFTExample(ids, trained, prompt)


def _shortened(example: SFTExample, length: int, bos: int | None) -> SFTExample:
    """Truncate the prompt on its left, to at least one token, then the example's end."""
    excess = len(example) - length
    if excess <= 0:
        return example
    kept = max(example.prompt - excess, min(example.prompt, 1))
    lost = example.prompt - kept
    head = shortened(example.ids[: example.prompt], kept, bos) if kept else []
    ids = (head + example.ids[example.prompt :])[:length]
    trained = example.trained[lost:][:length]
    return SFTExample(ids, [False, *trained[1:]], kept)
