"""Tokenises SFT data (completions of prompts, conversations, plain text) and packs it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from marlhf.common.chat_templates import answer_left_out, begins, joined, reasoning_of
from marlhf.common.errors import UserError
from marlhf.common.tokenization import continuation_ids, encode_texts
from marlhf.config import SFTConfig, SFTDataSettings
from marlhf.data.conversations import Messages, text_or_messages
from marlhf.data.encoding import encode, shortened
from marlhf.data.files import Row
from marlhf.data.prompts import (
    apply_template,
    fill_template,
    load_records,
    prompts_of,
    source_labels,
    template_parts,
)
from marlhf.data.template_checks import LEFT_OUT, REPEATED, RowNotes
from marlhf.rewards.learned import with_completion

Span = tuple[str, bool]  # a piece of text, and whether it is in the loss

_UNLIMITED = 2**31
_ADDED = (
    "the chat template puts text before the answer that the prompt does not end with, so that the "
    "model learns to write it"
)


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether it is in the loss.

    The first one never is. `prompt` is the number of tokens at the start that truncation may
    remove.
    """

    ids: list[int]
    trained: list[bool]
    prompt: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Examples:
    """Examples ready for training.

    rows        the examples
    truncated   number of examples truncated, left out or not
    left_out    number of examples left out, as none of their tokens is in the loss
    notes       lines about repeated turns, and text that the chat template dropped or added
    """

    rows: list[Example]
    truncated: int
    left_out: int
    notes: Sequence[str] = ()


def load_examples(config: SFTConfig, tokenizer: Any) -> tuple[Examples, Examples]:
    """`(examples to train on, held-out examples)`. Raises UserError."""
    if tokenizer.eos_token_id is None:
        raise UserError("model.path: the tokenizer has no EOS token, which must end a completion")
    rows, held_out = load_records(config.data, "sft")
    train_label, held_out_label = source_labels(config.data, len(rows))
    return (
        as_examples(rows, config, tokenizer, *train_label),
        as_examples(held_out, config, tokenizer, *held_out_label),
    )


def as_examples(
    rows: Sequence[Row], config: SFTConfig, tokenizer: Any, where: str = "data", first_row: int = 0
) -> Examples:
    """Examples of at most `config.max_length` tokens. Raises UserError, naming the row.

    where, first_row   name of the data and number of its first row, in messages
    """
    make = _from_text if config.data.text_column is not None else _from_prompts
    notes = RowNotes()
    whole = make(rows, config, tokenizer, where, first_row, notes)
    if config.loss_on == "all":
        whole = [Example(e.ids, [False] + [True] * (len(e) - 1), e.prompt) for e in whole]
    bos = tokenizer.bos_token_id
    cut = [_shortened(example, config.max_length, bos) for example in whole]
    kept = [example for example in cut if any(example.trained)]
    if rows and not kept:
        raise UserError(
            f"{where}: no row has a token to train on within max_length={config.max_length}"
        )
    truncated = sum(len(a) > len(b) for a, b in zip(whole, cut, strict=True))
    return Examples(kept, truncated, len(cut) - len(kept), notes.lines())


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Pack examples into groups of at most `length` tokens, by best-fit decreasing."""
    groups: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for example in sorted(examples, key=len, reverse=True):
        place = bisect.bisect_left(room, (len(example), -1))
        if place == len(room):
            left, group = length, len(groups)
            groups.append([])
        else:
            left, group = room.pop(place)
        groups[group].append(example)
        bisect.insort(room, (left - len(example), group))
    return groups


def _from_prompts(
    rows: Sequence[Row],
    config: SFTConfig,
    tokenizer: Any,
    where: str,
    first_row: int,
    notes: RowNotes,
) -> list[Example]:
    """Examples of prompt and completion: both text, or either in messages."""
    data = config.data
    names = _check_columns(rows, data, where)
    prompts = prompts_of(rows, data, where, first_row)
    heads: list[tuple[int, str, str]] = []
    examples: dict[int, Example] = {}
    for i, prompt in enumerate(prompts):
        label = f"{where}: row {first_row + i}"
        if data.completion_template is None:
            value = rows[i].get(data.completion_column)
            completion, turns = text_or_messages(value, label, "completion")
        else:
            columns, turns = dict.fromkeys(names) | rows[i], None
            completion = fill_template(data.completion_template, columns, label, "completion")
            if not completion.strip():
                raise UserError(f"{label}: the completion is empty")
        if prompt.messages is None and turns is None:
            heads.append((i, prompt.text, completion))
        else:
            messages = prompt.messages or [{"role": "user", "content": prompt.text}]
            spans = _answer_spans(messages, completion, turns, tokenizer, label, notes)
            examples[i] = _example(spans, tokenizer)
    prompt_ids, _ = encode([text for _, text, _ in heads], tokenizer, _UNLIMITED)
    for (i, _, completion), head in zip(heads, prompt_ids, strict=True):
        tail = [*continuation_ids(completion, tokenizer), tokenizer.eos_token_id]
        trained = [False] * len(head) + [True] * len(tail)
        examples[i] = Example(head + tail, trained, len(head))
    return [examples[i] for i in range(len(prompts))]


def _check_columns(rows: Sequence[Row], data: SFTDataSettings, where: str) -> list[str]:
    """Names of all columns. Raises UserError where one of the completion is missing."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    key, wanted = "completion_column", [data.completion_column]
    if data.completion_template is not None:
        key = "completion_template"
        wanted = [name for _, name in template_parts(data.completion_template, names) if name]
    for name in wanted:
        if rows and name not in names:
            raise UserError(
                f"data.{key}: no column is called {name!r}; the {where} has {', '.join(names)}"
            )
    return names


def _from_text(
    rows: Sequence[Row],
    config: SFTConfig,
    tokenizer: Any,
    where: str,
    first_row: int,
    notes: RowNotes,
) -> list[Example]:
    """Examples of one column: full texts, or conversations."""
    column, examples = config.data.text_column, []
    names = list(dict.fromkeys(name for row in rows for name in row))
    if rows and column not in names:
        raise UserError(
            f"data.text_column: no column is called {column!r}; the {where} has {', '.join(names)}"
        )
    for number, row in enumerate(rows, first_row):
        label = f"{where}: row {number}"
        text, messages = text_or_messages(row.get(str(column)), label, "text")
        if messages is None:
            (ids,), _ = encode([text], tokenizer, _UNLIMITED)
            ids = [*ids, tokenizer.eos_token_id]
            examples.append(Example(ids, [False] + [True] * (len(ids) - 1)))
        elif config.loss_on == "all":
            rendered = apply_template(messages, tokenizer, where=label)
            notes.add_if(LEFT_OUT, label, answer_left_out(messages, rendered))
            examples.append(_example([(rendered, True)], tokenizer))
        else:
            spans = _assistant_spans(messages, tokenizer, label, notes)
            examples.append(_example(spans, tokenizer))
    return examples


def _answer_spans(
    messages: Messages,
    completion: str,
    turns: Messages | None,
    tokenizer: Any,
    where: str,
    notes: RowNotes,
) -> list[Span]:
    """Prompt and completion in the chat template.

    The completion is the assistant's turn, the end of that turn, or several turns, which may begin
    with those of the prompt.
    """
    if turns is not None:
        conversation, first, repeated = joined(messages, turns)
        notes.add_if(REPEATED, where, repeated)
        return _assistant_spans(conversation, tokenizer, where, notes, first)
    before = apply_template(messages, tokenizer, for_answer=True, where=where)
    conversation = with_completion(messages, completion)
    answer = _rest(conversation, before, conversation, tokenizer, where)
    _compare({"role": "assistant", "content": completion}, answer, where, notes)
    return [(before, False), (answer, True)]


def _assistant_spans(
    messages: Messages, tokenizer: Any, where: str, notes: RowNotes, first: int = 0
) -> list[Span]:
    """Split a templated conversation into assistant turns, from message `first` on, and the rest.

    A turn includes the text that the template writes after it. Spans are found by rendering the
    conversation up to each turn: exact for every template that renders a conversation's beginning
    as a prefix of the full conversation. Raises UserError for other templates.
    """
    answers = [i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant"]
    if not answers:
        raise UserError(f"{where}: has no turn of the assistant to train on")
    if answers[0] == 0:
        raise UserError(f"{where}: begins with a turn of the assistant, must begin with the user's")
    whole = apply_template(messages, tokenizer, where=where)
    spans, position = [], 0
    for i in answers:
        before = apply_template(messages[:i], tokenizer, for_answer=True, where=where)
        answer = _rest(messages[: i + 1], before, messages, tokenizer, where)
        if not whole.startswith(before + answer):
            raise _changes(messages, tokenizer, where)
        _compare(messages[i], answer, where, notes)
        spans += [(before[position:], False), (answer, True)]
        position = len(before + answer)
    return spans


def _rest(
    messages: Messages, beginning: str, conversation: Messages, tokenizer: Any, where: str
) -> str:
    """The template's text of messages after the text `beginning`. Raises UserError."""
    text = apply_template(messages, tokenizer, where=where)
    if not text.startswith(beginning):
        raise _changes(conversation, tokenizer, where)
    return text[len(beginning) :]


def _changes(conversation: Messages, tokenizer: Any, where: str) -> UserError:
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


def _example(spans: Sequence[Span], tokenizer: Any) -> Example:
    """Tokenise the spans of a conversation.

    A trained span is in the loss up to its last EOS. The last span ends there; an EOS is appended
    where the template writes none.
    """
    eos = tokenizer.eos_token_id
    ids: list[int] = []
    trained: list[bool] = []
    for number, (text, is_trained) in enumerate(spans):
        if ids:
            own = continuation_ids(text, tokenizer)
        else:
            (own,) = encode_texts(tokenizer, [text], [False])
        end = len(own) - own[::-1].index(eos) if eos in own else len(own)
        if number == len(spans) - 1:
            own = own[:end] if eos in own else [*own, eos]
            end = len(own)
        ids += own
        trained += [is_trained and i < end for i in range(len(own))]
    trained[0] = False
    prompt = trained.index(True) if len(spans) == 2 else 0
    return Example(ids, trained, prompt)


def _shortened(example: Example, length: int, bos: int | None) -> Example:
    """Truncate the prompt on its left, to at least one token, then the example's end."""
    excess = len(example) - length
    if excess <= 0:
        return example
    kept = max(example.prompt - excess, min(example.prompt, 1))
    lost = example.prompt - kept
    head = shortened(example.ids[: example.prompt], kept, bos) if kept else []
    ids = (head + example.ids[example.prompt :])[:length]
    trained = example.trained[lost:][:length]
    return Example(ids, [False, *trained[1:]], kept)
