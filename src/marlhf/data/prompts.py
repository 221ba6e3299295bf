"""Builds prompts from rows: columns, templates and conversations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any

from marlhf.common.chat_templates import render_chat
from marlhf.common.errors import UserError, one_line
from marlhf.config import DataSettings
from marlhf.data.conversations import Messages, text_or_messages
from marlhf.data.files import Row, read_rows
from marlhf.data.presets import Stage, preset_records

_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    text       as given or filled in; of a conversation, its messages joined by empty lines
    messages   the conversation, which `render` puts into the policy's chat template, or None
    columns    the row's other columns, for rewards
    where      name of its row in messages
    """

    text: str
    messages: Messages | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False, repr=False)


def load_records(settings: DataSettings, stage: Stage = "ppo") -> tuple[list[Row], list[Row]]:
    """Load `(rows to train on, held-out rows)`, columns renamed.

    stage: the job; with `data.preset` it determines the shape of the rows, and the part.

    Raises UserError.
    """
    if settings.preset is not None:
        return preset_records(settings, stage)
    if settings.path is None:
        raise UserError("data.path: missing; must be a file, a folder or a hub name")
    rows = read_rows(settings.path, settings.split, settings.name, settings.limit)
    rows = _renamed(rows, settings.columns)
    count = settings.eval_rows
    if settings.eval_path is not None or settings.eval_split is not None:
        own = settings.eval_path is None
        held_out = read_rows(
            settings.eval_path or settings.path,
            settings.eval_split or "train",
            settings.name if own else None,
            max(count, 1),
            key="data.path" if own else "data.eval_path",
            split_key="data.eval_split",
        )
        return rows, _renamed(held_out, settings.columns)[:count]
    if count >= len(rows):
        raise UserError(
            f"data.eval_rows: given {count}, must be less than the {len(rows)} rows of the data "
            "that they are taken off (0 for none)"
        )
    return rows[: len(rows) - count], rows[len(rows) - count :]


def load_rows(settings: DataSettings, stage: Stage = "ppo") -> tuple[list[Prompt], list[Prompt]]:
    """Load `(prompts to train on, held-out prompts)`. Raises UserError."""
    rows, held_out = load_records(settings, stage)
    train, eval_ = source_labels(settings, len(rows))
    return prompts_of(rows, settings, *train), prompts_of(held_out, settings, *eval_)


def source_labels(settings: DataSettings, rows: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """Name and first row number, in messages, of the data and of the held-out data."""
    taken_off = settings.eval_path is None and settings.eval_split is None
    return ("data", 0), ("held-out data", rows if taken_off else 0)


def prompt_sets(
    train: Any, held_out: Any, settings: DataSettings
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and held-out ones: as given in Python, else as configured."""
    if train is not None:
        return as_prompts(train, settings), as_prompts(held_out or [], settings)
    train, configured = load_rows(settings)
    return train, configured if held_out is None else as_prompts(held_out, settings)


def as_prompts(data: Iterable[Any], settings: DataSettings | None = None) -> list[Prompt]:
    """Convert Python data to prompts.

    data: texts, lists of messages, rows (`{column: value}`) or Prompts; also a `datasets.Dataset`.
    Texts and messages are complete prompts: `prompt_template` applies to rows only.
    settings: columns and templates; only the keys about a row matter. Raises UserError.
    """
    return prompts_of(data, settings or DataSettings(), "data", 0)


def render(prompt: Prompt, tokenizer: Any, settings: DataSettings | None = None) -> str:
    """Text of a prompt for the policy: a conversation in the tokenizer's chat template.

    A conversation that ends with the assistant's turn is continued in that turn. Raises UserError.
    """
    messages = chat_of(prompt, settings)
    if messages is None:
        return prompt.text
    return apply_template(messages, tokenizer, for_answer=True, where=prompt.where)


def chat_of(prompt: Prompt, settings: DataSettings | None) -> Messages | None:
    """The prompt as a conversation; None for plain text."""
    if prompt.messages is None and settings is not None and settings.apply_chat_template:
        return [{"role": "user", "content": prompt.text}]
    return prompt.messages


def apply_template(
    messages: Messages, tokenizer: Any, for_answer: bool = False, where: str = ""
) -> str:
    """Render a conversation in the tokenizer's chat template.

    for_answer   leave it open for the assistant: a new turn, or the end of its last one

    Raises UserError, naming the row `where`.
    """
    check_template(tokenizer)
    continues = for_answer and messages[-1]["role"] == "assistant"
    try:
        return render_chat(
            tokenizer,
            messages,
            add_generation_prompt=for_answer and not continues,
            continue_final_message=continues,
        )
    except Exception as error:  # a template can raise anything
        text = "\n\n".join(message["content"] for message in messages)
        raise UserError(
            f"model.chat_template: {where}{': ' if where else ''}the chat template refuses the "
            f"prompt {excerpt(text)}: {one_line(error)}"
        ) from error


def check_template(tokenizer: Any) -> None:
    """Raise UserError where a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            "model.chat_template: must be given, because the prompts are conversations, in the "
            "data or by data.apply_chat_template, and the model's tokenizer has no chat template"
        )


def _renamed(rows: list[Row], columns: Mapping[str, str]) -> list[Row]:
    """Rename columns by `{new: old}`. Raises UserError."""
    if not columns:
        return rows
    present = _names(rows)
    old_names = set(columns.values())
    for new, old in columns.items():
        if old not in present:
            raise UserError(
                f"data.columns.{new}: no column is called {old!r}; the data has "
                f"{', '.join(present)}"
            )
        if new in present and new not in old_names:
            raise UserError(f"data.columns.{new}: the data already has a column of that name")
    return [
        {n: v for n, v in row.items() if n not in old_names}
        | {new: row.get(old) for new, old in columns.items()}
        for row in rows
    ]


def prompts_of(data: Any, settings: DataSettings, where: str, first_row: int) -> list[Prompt]:
    """Convert data as `as_prompts` does; messages count rows from `first_row`."""
    if isinstance(data, str | Mapping):
        hint = "; choose one of its splits" if isinstance(data, Mapping) else ""
        raise UserError(
            f"{where}: given a {type(data).__name__}, must be a list of prompts or rows{hint}"
        )
    if hasattr(data, "iterrows"):  # iterating over a data frame yields column names
        if not data.columns.is_unique:
            twice = data.columns[data.columns.duplicated()][0]
            raise UserError(f"{where}: the column {twice!r} is given twice")
        data = data.to_dict("records")
    elif hasattr(data, "to_list"):  # a datasets.Dataset, much slower row by row
        data = data.to_list()
    items = list(data)
    mappings = [item for item in items if isinstance(item, Mapping)]
    names = _names(mappings)
    if mappings:
        _check_names(names, settings, where)
    return [
        _prompt(item, names, settings, f"{where}: row {row}")
        for row, item in enumerate(items, first_row)
    ]


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _check_names(names: Sequence[str], settings: DataSettings, where: str) -> None:
    """Raise UserError where the data lacks a column that the settings name."""
    present = ", ".join(map(str, names)) or "none"
    template, column = settings.prompt_template, settings.prompt_column
    if template is None:
        if column not in names:
            raise UserError(
                f"data.prompt_column: no column is called {column!r}; the {where} has {present}"
            )
        return
    fields = [name for _, name in template_parts(template, names) if name is not None]
    for name in fields:
        if name not in names:
            raise UserError(
                f"data.prompt_template: no column is called {name!r}; the {where} has {present}"
            )
    if not fields:
        raise UserError(
            f"data.prompt_template: names no column, so that every prompt would be the same; "
            f"the {where} has {present}"
        )
    if column != "prompt" and column not in fields:
        raise UserError(
            f"data.prompt_column: given {column!r}, but prompt_template does not use it; give "
            "only one of them"
        )


def _prompt(item: Any, names: Sequence[str], settings: DataSettings, where: str) -> Prompt:
    """Convert one item to a prompt; `where` names its row."""
    if isinstance(item, Prompt):
        if item.messages is None and not isinstance(item.text, str):
            kind = type(item.text).__name__
            raise UserError(f"{where}: the text of the Prompt is {kind}, must be text")
        given = item.messages
        messages = None if given is None else text_or_messages(given, where)[1]
        prompt = replace(item, messages=messages, where=item.where or where)
    elif isinstance(item, Mapping):
        columns = {name: item.get(name) for name in names}
        if settings.prompt_template is not None:
            text = fill_template(settings.prompt_template, columns, where)
            if not text.strip():
                raise UserError(f"{where}: the prompt is empty")
            prompt = Prompt(text, None, columns, where)
        else:
            value = columns.pop(settings.prompt_column)
            prompt = Prompt(*text_or_messages(value, where), columns, where)
    else:
        prompt = Prompt(*text_or_messages(item, where), {}, where)
    if settings.apply_chat_template and prompt.messages is None:
        return replace(prompt, messages=[{"role": "user", "content": prompt.text}])
    return prompt


def template_parts(template: str, names: Sequence[str]) -> list[tuple[str, str | None]]:
    """Parse a template into `(literal text, column after it or None)` pairs.

    The syntax is that of Python's `str.format`, with `{{` for a brace. In a template that is not
    valid so, because it has braces around anything but names (JSON, code), only `{column}`s are
    fields, and the rest is literal.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError:
        parts = []
    if parts and all(
        name is None or ((name in names or name.isidentifier()) and not spec and not conversion)
        for _, name, spec, conversion in parts
    ):
        return [(literal, name) for literal, name, _, _ in parts]
    found, position = [], 0
    for match in _BRACES.finditer(template):
        if match[1] in names or match[1].isidentifier():
            found.append((template[position : match.start()], match[1]))
            position = match.end()
    return [*found, (template[position:], None)]


def fill_template(
    template: str, columns: Mapping[str, Any], where: str, what: str = "prompt"
) -> str:
    """Fill in a template's columns; empty where all of them are. Raises UserError."""
    text, filled = "", False
    for literal, name in template_parts(template, list(columns)):
        value = "" if name is None else columns[name]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            kind = "null" if value is None else type(value).__name__
            raise UserError(f"{where}: column {name!r} of the {what} is {kind}, must be text")
        text += literal + str(value)
        filled = filled or bool(str(value).strip())
    return text if filled else ""


def excerpt(value: Any) -> str:
    """Start of a value's repr, for messages."""
    return one_line(repr(value), 60)
