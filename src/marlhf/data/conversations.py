"""Parses a data value into a text or the messages of a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from marlhf.common.errors import UserError, one_line
from marlhf.data.file_formats import parse_json

Messages = list[dict[str, Any]]

_MAYBE = re.compile(r"""\s*(\[\s*)?\{(?=.*"role"\s*:)(?=.*"content"\s*:)""", re.S)
# the start of a list of messages written as text: as JSON, or as Python prints it
_WRITTEN = re.compile(r"""\s*(\[\s*)?\{\s*(?P<quote>["'])(role|content)(?P=quote)\s*:""")


def text_or_messages(value: Any, where: str, what: str = "prompt") -> tuple[str, Messages | None]:
    """`(text, conversation or None)` of a text or of messages.

    Messages are a list of mappings with `role` and `content`, one such mapping, or the JSON text
    of either, as in a CSV cell. The text of a conversation is its messages joined by empty lines.
    Raises UserError, in which `what` names the value.
    """
    messages = None
    turns = _turns(_parsed(value, where, what))
    if turns is not None:
        messages = [_message(message, i, where) for i, message in enumerate(turns)]
        value = "\n\n".join(message["content"] for message in messages)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{where}: the {what} is {kind}, must be text or a list of messages")
    if not value.strip():
        raise UserError(f"{where}: the {what} is empty")
    return value, messages


def _parsed(value: Any, where: str, what: str) -> Any:
    """Parse a text that is the JSON of messages; return any other value unchanged."""
    if not isinstance(value, str) or not (_WRITTEN.match(value) or _MAYBE.match(value)):
        return value
    try:
        parsed = parse_json(value)
    except (ValueError, RecursionError) as error:
        if value.rstrip()[-1:] not in "]}" or not _WRITTEN.match(value):
            return value  # a text that happens to start like messages
        raise UserError(
            f"{where}: the {what} is the text {one_line(repr(value), 60)}, which is no JSON; "
            f"messages written as text must be JSON ({one_line(error, 100)})"
        ) from None
    if isinstance(parsed, list):
        return parsed if all(isinstance(m, dict) and "role" in m for m in parsed) else value
    return parsed if {"role", "content"} <= parsed.keys() else value


def _turns(value: Any) -> list[Any] | None:
    """The messages in a value, unchecked; None for a value without any."""
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    if not isinstance(value, Mapping) or not {"role", "content"} <= value.keys():
        return None
    columns = {key: column for key, column in value.items() if column is not None}
    lists = [c for c in columns.values() if isinstance(c, list | tuple | np.ndarray)]
    if len(lists) < len(columns) or len({len(column) for column in lists}) != 1:
        return [value]
    # the form in which `datasets` returns a column of the feature type Sequence({...})
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*lists, strict=True)]


def _message(message: Any, position: int, where: str) -> dict[str, Any]:
    """Check a chat message and drop its null keys, which tables fill in.

    A message that only calls tools may have null as its content, as OpenAI's do.
    """
    if isinstance(message, Mapping) and message.get("tool_calls"):
        message = {**message, "content": message.get("content") or ""}
    fine = (
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
    )
    if not fine:
        raise UserError(
            f"{where}: message {position} is {one_line(repr(message), 60)}, must be "
            '{"role": text, "content": text}'
        )
    return {key: value for key, value in message.items() if value is not None}
