"""Builds prompts from rows: columns, templates and conversations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any

from marlhf.common.chat_templates import render_chat
from marlhf.common.errors import UserError, one_line
from marlhf.common.tokenization import Tokenizer
from marlhf.config import DataSettings
from marlhf.data.conversations import Messages, text_or_messages
from marlhf.data.files import Row, read_rows
from marlhf.data.presets import Stage, preset_records
from marlhf.data.rows import DataSource, Derived, RowDigest, Rows, rows_of_dataset
from marlhf.data.store import stored

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


def load_records(
    settings: DataSettings, stage: Stage = "ppo"
) -> tuple[Sequence[Row], Sequence[Row]]:
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
        same_path = settings.eval_path is None
        held_out = read_rows(
            settings.eval_path or settings.path,
            settings.eval_split or "train",
            settings.name if same_path else None,
            max(count, 1),
            key="data.path" if same_path else "data.eval_path",
            split_key="data.eval_split",
        )
        return rows, _renamed(held_out, settings.columns)[:count]
    if count >= len(rows):
        raise UserError(
            f"data.eval_rows: given {count}, must be less than the {len(rows)} rows of the data "
            "that they are taken off (0 for none)"
        )
    return rows[: len(rows) - count], rows[len(rows) - count :]


def load_rows(
    settings: DataSettings, stage: Stage = "ppo"
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
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
) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Prompts to train on and held-out ones: as given in Python, else as configured."""
    if train is not None:
        return as_prompts(train, settings), as_prompts(held_out or [], settings)
    train, configured = load_rows(settings)
    return train, configured if held_out is None else as_prompts(held_out, settings)


def as_prompts(data: Iterable[Any], settings: DataSettings | None = None) -> Sequence[Prompt]:
    """Convert Python data to prompts, lazily for a `datasets.Dataset`.

    data: texts, lists of messages, rows (`{column: value}`) or Prompts; also a `datasets.Dataset`.
    Texts and messages are complete prompts: `prompt_template` applies to rows only.
    settings: columns and templates; only the keys about a row matter. Raises UserError.
    """
    return prompts_of(data, settings or DataSettings(), "data", 0)


def render(prompt: Prompt, tokenizer: Tokenizer) -> str:
    """Text of a prompt for the policy: a conversation in the tokenizer's chat template.

    A conversation that ends with the assistant's turn is continued in that turn. Raises UserError.
    """
    if prompt.messages is None:
        return prompt.text
    text = apply_template(prompt.messages, tokenizer, for_answer=True, where=prompt.where)
    if not text.strip():
        where = f"{prompt.where}: " if prompt.where else ""
        raise UserError(
            f"model.chat_template: {where}the chat template writes nothing for the prompt "
            f"{excerpt(prompt.text)}"
        )
    return text


def apply_template(
    messages: Messages, tokenizer: Tokenizer, for_answer: bool = False, where: str = ""
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


def check_template(tokenizer: Tokenizer) -> None:
    """Raise UserError where a tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise UserError(
            "model.chat_template: must be given, because the prompts are conversations, in the "
            "data or by data.apply_chat_template, and the model's tokenizer has no chat template"
        )


def _renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """Rename columns by `{new: old}`. Raises UserError."""
    if not columns:
        return rows
    present = rows.names
    old_names = set(columns.values())
    for new, old in columns.items():
        if old not in present:
            raise UserError(
                f"data.columns.{new}: no column is called {old!r}; the data has "
                f"{', '.join(present)}"
            )
        if new in present and new not in old_names:
            raise UserError(f"data.columns.{new}: the data already has a column of that name")
    return rows.with_names(columns)


def prompts_of(data: Any, settings: DataSettings, where: str, first_row: int) -> Sequence[Prompt]:
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
    elif hasattr(data, "with_format") and hasattr(data, "to_list"):  # a datasets.Dataset
        data = rows_of_dataset(data)
    items = data if isinstance(data, Rows) else list(data)
    mappings = items if isinstance(items, Rows) else [x for x in items if isinstance(x, Mapping)]
    make = PromptMaker(DataSource.of(mappings, where, first_row), settings)
    if not isinstance(items, Rows):
        return [make(item, index) for index, item in enumerate(items)]
    prompts = Derived(items, make, {})
    key = None if items.key is None else [items.key, *make.key]
    survey = stored("prompts", key, lambda _: _survey(prompts))
    return Derived(items, make, survey.facts, survey.key)


def _survey(prompts: Iterable[Prompt]) -> dict[str, Any]:
    """Facts about all prompts, from one pass; see `survey_of`."""
    digest, columns, kinds, longest = RowDigest(), {}, {}, 0
    for index, prompt in enumerate(prompts):
        digest.add(prompt)
        columns |= dict.fromkeys(prompt.columns)
        kinds.setdefault(kind_of(prompt), index)
        longest = max(longest, len(prompt.text.encode("utf-8", "surrogatepass")))
    return {
        "fact": digest.fact,
        "columns": list(columns),
        "kinds": list(kinds.values()),
        "bytes": longest,
    }


def survey_of(prompts: Sequence[Prompt]) -> Mapping[str, Any]:
    """Facts about all prompts.

    fact      their `RowDigest`
    columns   names of all columns
    kinds     index of the first prompt of each kind; see `kind_of`
    bytes     those of the longest prompt, of a conversation without its template
    """
    return prompts.facts if isinstance(prompts, Derived) else _survey(prompts)


def kind_of(prompt: Prompt) -> tuple[tuple[str, ...], ...] | None:
    """Roles and keys of a conversation's messages, in order; None for a text.

    Chat templates refuse conversations by them.
    """
    if prompt.messages is None:
        return None
    return tuple((message["role"], *sorted(message)) for message in prompt.messages)


def kinds_of(*sets: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each kind, in each set; see `kind_of`."""
    return [prompts[index] for prompts in sets for index in survey_of(prompts)["kinds"]]


def _check_columns(source: DataSource, settings: DataSettings) -> None:
    """Raise UserError where the data lacks a column that the settings name."""
    template, column = settings.prompt_template, settings.prompt_column
    if template is None:
        source.check_columns("prompt_column", [column])
        return
    fields = [name for _, name in template_parts(template, source.columns) if name is not None]
    source.check_columns("prompt_template", fields)
    if not fields:
        raise UserError(
            f"data.prompt_template: names no column, so that every prompt would be the same; "
            f"the {source.name} has {', '.join(map(str, source.columns)) or 'none'}"
        )
    if column != "prompt" and column not in fields:
        raise UserError(
            f"data.prompt_column: given {column!r}, but prompt_template does not use it; give "
            "only one of them"
        )


class PromptMaker:
    """Makes the prompt of an item: a text, messages, a Prompt or a row.

    Raises UserError where the settings name other columns, and for an unsuitable item.
    """

    def __init__(self, source: DataSource, settings: DataSettings) -> None:
        if source.has_rows:
            _check_columns(source, settings)
        self._source, self._settings = source, settings

    @property
    def key(self) -> list[Any]:
        """Everything that prompts depend on, in addition to their rows."""
        settings, source = self._settings, self._source
        keys = settings.prompt_column, settings.prompt_template, settings.apply_chat_template
        return [list(source.columns), *keys, source.name, source.first_row]

    def __call__(self, item: Any, index: int) -> Prompt:
        where, settings = self._source.label(index), self._settings
        if isinstance(item, Prompt):
            if item.messages is None and not isinstance(item.text, str):
                kind = type(item.text).__name__
                raise UserError(f"{where}: the text of the Prompt is {kind}, must be text")
            unchecked = item.messages
            messages = None if unchecked is None else text_or_messages(unchecked, where)[1]
            prompt = replace(item, messages=messages, where=item.where or where)
        elif isinstance(item, Mapping):
            prompt = self._of_row(item, where)
        else:
            prompt = Prompt(*text_or_messages(item, where), {}, where)
        if settings.apply_chat_template and prompt.messages is None:
            return replace(prompt, messages=[{"role": "user", "content": prompt.text}])
        return prompt

    def _of_row(self, row: Mapping[str, Any], where: str) -> Prompt:
        settings = self._settings
        columns = {name: row.get(name) for name in self._source.columns}
        if settings.prompt_template is not None:
            text = fill_template(settings.prompt_template, columns, where)
            if not text.strip():
                raise UserError(f"{where}: the prompt is empty")
            return Prompt(text, None, columns, where)
        value = columns.pop(settings.prompt_column)
        return Prompt(*text_or_messages(value, where), columns, where)


def template_parts(template: str, names: Sequence[str]) -> list[tuple[str, str | None]]:
    """Parse a template into `(literal text, column after it or None)` pairs.

    The syntax is that of Python's `str.format`, with `{{` for a brace. In a template that this
    syntax does not allow, as it has braces around anything but names (JSON, code), only `{column}`s
    are fields, and the rest is literal.
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
    fields, position = [], 0
    for match in _BRACES.finditer(template):
        if match[1] in names or match[1].isidentifier():
            fields.append((template[position : match.start()], match[1]))
            position = match.end()
    return [*fields, (template[position:], None)]


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
