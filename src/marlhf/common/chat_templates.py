"""Chat templates: their date, text that they leave out, and joining of conversations.

A template may ask for today's date (`strftime_now`, Llama 3.1 and later). A run fixes one date when
it begins, so that its prompts do not change at midnight or on a resume.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

from marlhf.common.errors import one_line
from marlhf.common.signals import time_limit

Messages = Sequence[Mapping[str, Any]]

_TEMPLATE_SECONDS = 20.0  # for one conversation; a template can loop for days
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZf"
_REASONING = ("reasoning_content", "reasoning", "thinking")  # keys that datasets use for it


def render_chat(tokenizer: Any, messages: Messages, **options: Any) -> str:
    """Render a conversation in a tokenizer's chat template, on the date set by `fix_date`.

    options: of `apply_chat_template`. Raises whatever the template raises, and
    TimeoutError for one that does not end.
    """
    day = getattr(tokenizer, "template_date", None)
    if day is not None and uses_date(tokenizer):
        options["chat_template"] = _clock(day) + tokenizer.get_chat_template()
    with time_limit(_TEMPLATE_SECONDS):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)


def uses_date(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template asks for today's date."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def fix_date(tokenizer: Any, day: str | None) -> None:
    """Fix a chat template's current time at the beginning of `day` (YYYY-MM-DD).

    None: the clock. The template itself, which is saved with the model, is unchanged.
    """
    tokenizer.template_date = day


def _clock(day: str) -> str:
    """A Jinja macro that replaces `strftime_now`.

    transformers gives templates data but no functions. Jinja drops the newline after the macro, as
    after all blocks.
    """
    now = datetime.combine(date.fromisoformat(day), time())
    filters = "|replace('%%', '\\0')"
    for directive in _DIRECTIVES:
        for flag in ("", "-"):  # %-d: without the leading 0
            code = f"%{flag}{directive}"
            filters += f"|replace({code!r}, {now.strftime(code)!r})"
    filters += "|replace('\\0', '%')"
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n"


def left_out(text: str, rendered: str) -> str:
    """An excerpt of `text` missing from a rendered text, white space aside; else empty."""
    if text.strip() in rendered or _squeezed(text) in _squeezed(rendered):
        return ""
    end = _first(len(text), lambda i: text[i:].rstrip() in rendered)
    kept = len(text) - _first(len(text), lambda i: text[: len(text) - i].lstrip() in rendered)
    while 0 < end < len(text) and _in_word(text[end - 1 : end + 1]):
        end += 1
    while 0 < kept < len(text) and _in_word(text[kept - 1 : kept + 1]):
        kept -= 1
    return one_line(text[kept:end].strip() or text.strip(), 60)


def _in_word(letters: str) -> bool:
    """Whether no word or tag ends between two letters."""
    return all(letter.isalnum() or letter in "<>/" for letter in letters)


def reasoning_of(turn: Mapping[str, Any]) -> list[str]:
    """An assistant's reasoning, where it has a key of its own."""
    return [text for key in _REASONING if isinstance(text := turn.get(key), str) and text.strip()]


def answer_left_out(messages: Messages, rendered: str) -> str:
    """An excerpt of the assistant's turns missing from a rendered conversation; else empty."""
    for turn in messages:
        if turn["role"] == "assistant":
            for text in (*reasoning_of(turn), turn["content"]):
                if lost := left_out(text, rendered):
                    return lost
        # the same text before a turn does not count as the turn
        _, found, rest = rendered.partition(turn["content"].strip())
        rendered = rest if found else rendered
    return ""


def begins(text: str, beginning: str) -> bool:
    """Whether a text begins with another, white space aside."""
    return text.startswith(beginning) or _squeezed(text).startswith(_squeezed(beginning))


def joined(prompt: Messages, turns: Messages) -> tuple[list[dict[str, Any]], int, bool]:
    """`(conversation, number of its turns from the prompt, whether they came twice)`.

    `turns` follow those of the prompt, or begin with them, as in many preference datasets; then
    they are taken once. A system turn may stand before either.
    """
    asked, said = _without_system(prompt), _without_system(turns)
    system, other = prompt[: len(prompt) - len(asked)], turns[: len(turns) - len(said)]
    is_open = bool(asked) and asked[-1]["role"] == "assistant"  # an answer that was begun
    repeated = (
        len(said) >= len(asked) + (not is_open)
        and (bool(asked) or bool(system and other))
        and (not system or not other or all(map(_same, system, other)))
        and all(map(_same, asked[:-1], said))
        and (not asked or _same(asked[-1], said[len(asked) - 1], is_open))
    )
    rest = [*(system or other), *said] if repeated else [*prompt, *turns]
    count = len(system or other) + len(asked) - is_open if repeated else len(prompt)
    return [dict(turn) for turn in rest], count, repeated


def _without_system(turns: Messages) -> Messages:
    first = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    return turns[first:]


def _same(turn: Mapping[str, Any], twin: Mapping[str, Any], begun: bool = False) -> bool:
    """Whether two turns are equal or, if `begun`, the second continues the first."""
    text, other = turn["content"].strip(), twin["content"].strip()
    return turn["role"] == twin["role"] and (other.startswith(text) if begun else text == other)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The least number up to `count` where a monotone condition (false, then true) holds."""
    return bisect_left(range(count), True, key=holds)
