"""A value of a data row -> a text, or the messages of a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from marlhf.common.errors import UserError, one_line

Messages = list[dict[str, Any]]

# how a list of messages begins that was written as text: by JSON, or as Python prints it
_WRITTEN = re.compile(r"""\s*(\[\s*)?\{\s*(?P<quote>["'])(role|content)(?P=quote)\s*:""")


def text_or_messages(value: Any, where: str, what: str = "prompt") -> tuple[str, Messages | None]:
    """`(text, conversation or None)` of a text or of messages.

    Messages are a list of mappings with `role` and `content`, one such mapping, or the JSON text
    of either, as a cell of CSV has it. The text of a conversation is its messages with empty lines
    between them. Raises UserError, in which `what` is the value.
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
    """The messages in a text that is nothing but messages; any other value as it is."""
    if not isinstance(value, str) or not _WRITTEN.match(value):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        if value.rstrip()[-1:] not in "]}":  # a text that happens to begin so
            return value
        raise UserError(
            f"{where}: the {what} is the text {one_line(repr(value), 60)}, which is no JSON; "
            "messages written as text must be JSON"
        ) from None
    if isinstance(found, list):
        return found if all(isinstance(m, dict) and "role" in m for m in found) else value
    return found if {"role", "content"} <= found.keys() else value


def _turns(value: Any) -> list[Any] | None:
    """The messages of a value that has some, unchecked; None for any other."""
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    if not isinstance(value, Mapping) or not {"role", "content"} <= value.keys():
        return None
    columns = {key: column for key, column in value.items() if column is not None}
    lists = [c for c in columns.values() if isinstance(c, list | tuple | np.ndarray)]
    if len(lists) < len(columns) or len({len(column) for column in lists}) != 1:
        return [value]
    # how `datasets` gives back a column of the feature type Sequence({...})
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*lists, strict=True)]


def _message(message: Any, position: int, where: str) -> dict[str, Any]:
    """A chat message, without the keys that a table filled in with null."""
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
