"""Chat templates: their date, text that they omit, and joining of conversations.

A template may ask for today's date (`strftime_now`, Llama 3.1 and later). A run fixes one date when
it begins, so that its prompts do not change at midnight or on a resume.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

from marlhf.common.errors import one_line
from marlhf.common.signals import time_limit
from marlhf.common.tokenization import Tokenizer

Messages = Sequence[Mapping[str, Any]]

TEMPLATE_SECONDS = 20.0  # for one conversation; a template can loop for days
_MOST_ADDED = 2**20  # characters, such as of a system turn of the template's own
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZf"
_REASONING = ("reasoning_content", "reasoning", "thinking")  # keys that datasets use for it


def render_chat(tokenizer: Tokenizer, messages: Messages, **options: Any) -> str:
    """Render a conversation in a tokenizer's chat template, on the date set by `fix_date`.

    options: of `apply_chat_template`. Raises any exception of the template, TimeoutError for one
    that does not end, and ValueError for one that writes far more than it is given.
    """
    day = getattr(tokenizer, "template_date", None)
    if day is not None and uses_date(tokenizer):
        options["chat_template"] = _clock(day) + tokenizer.get_chat_template()
    with time_limit(TEMPLATE_SECONDS):
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    content = sum(len(str(message)) for message in messages)
    if len(text) > _MOST_ADDED + 10 * content:
        raise ValueError(f"it writes {len(text)} characters for a conversation of {content}")
    return text


def uses_date(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer's chat template asks for today's date."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def fix_date(tokenizer: Any, day: str | None) -> None:
    """Fix a chat template's current time at the beginning of `day` (YYYY-MM-DD).

    None: the clock. The template, which is saved with the model, is unchanged.
    """
    tokenizer.template_date = day


def _clock(day: str) -> str:
    """A Jinja macro that replaces `strftime_now`.

    transformers gives templates data but no functions. Jinja drops the newline after the macro, as
    after all blocks.
    """
    midnight = datetime.combine(date.fromisoformat(day), time())
    filters = "|replace('%%', '\\0')"
    for directive in _DIRECTIVES:
        for flag in ("", "-"):  # %-d: without the leading 0
            code = f"%{flag}{directive}"
            filters += f"|replace({code!r}, {midnight.strftime(code)!r})"
    filters += "|replace('\\0', '%')"
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n"


def left_out(text: str, rendered: str) -> str:
    """An excerpt of `text` missing from a rendered text, white space aside; else empty."""
    if text.strip() in rendered or _squeezed(text) in _squeezed(rendered):
        return ""
    end = _first(len(text), lambda i: text[i:].rstrip() in rendered)
    start = len(text) - _first(len(text), lambda i: text[: len(text) - i].lstrip() in rendered)
    while 0 < end < len(text) and _in_word(text[end - 1 : end + 1]):
        end += 1
    while 0 < start < len(text) and _in_word(text[start - 1 : start + 1]):
        start -= 1
    return one_line(text[start:end].strip() or text.strip(), 60)


def _in_word(letters: str) -> bool:
    """Whether no word or tag ends between two letters."""
    return all(letter.isalnum() or letter in "<>/" for letter in letters)


def reasoning_of(turn: Mapping[str, Any]) -> list[str]:
    """An assistant's reasoning texts, if the message has a key for them."""
    return [text for key in _REASONING if isinstance(text := turn.get(key), str) and text.strip()]


def answer_left_out(messages: Messages, rendered: str) -> str:
    """An excerpt of the assistant's turns missing from a rendered conversation; else empty."""
    for turn in messages:
        if turn["role"] == "assistant":
            for text in (*reasoning_of(turn), turn["content"], *_tools_called(turn)):
                if lost := left_out(text, rendered):
                    return lost
        # the same text before a turn does not count as the turn
        if text := turn["content"].strip():
            _, content, remainder = rendered.partition(text)
            rendered = remainder if content else rendered
    return ""


def prompt_left_out(messages: Messages, rendered: str) -> str:
    """Role and excerpt of a turn missing from a rendered prompt; else empty.

    Reasoning of earlier answers does not count: many templates drop it on purpose. Text may be
    written as JSON, as results of tools often are.
    """
    for turn in messages:
        text = turn["content"]
        if turn["role"] == "assistant":
            text = text.rpartition("</think>")[2]
        for part in (text, *_tools_called(turn)):
            as_json = json.dumps(part, ensure_ascii=False)[1:-1]
            if (lost := left_out(part, rendered)) and left_out(as_json, rendered):
                return f"{turn['role']}: {lost}"
    return ""


def without_answers(messages: Messages) -> list[Mapping[str, Any]]:
    """The turns that are not the assistant's."""
    return [turn for turn in messages if turn["role"] != "assistant"]


def _tools_called(turn: Mapping[str, Any]) -> list[str]:
    """Names of the tools that a turn calls, in the usual forms of `tool_calls`."""
    calls = turn.get("tool_calls")
    calls = [c for c in calls if isinstance(c, Mapping)] if isinstance(calls, list) else []
    functions = [call.get("function", call) for call in calls]
    names = [f.get("name") for f in functions if isinstance(f, Mapping)]
    return [name for name in names if isinstance(name, str)]


def begins(text: str, beginning: str) -> bool:
    """Whether a text begins with another, white space aside."""
    return text.startswith(beginning) or _squeezed(text).startswith(_squeezed(beginning))


def joined(prompt: Messages, turns: Messages) -> tuple[list[dict[str, Any]], int, bool]:
    """`(conversation, number of its turns from the prompt, whether they came twice)`.

    `turns` follow those of the prompt, or contain them, as in many preference datasets: at the
    start, or later, where the prompt is the question of a longer conversation. Then they count
    once. A system turn may precede either.
    """
    question, dialogue = _without_system(prompt), _without_system(turns)
    system = prompt[: len(prompt) - len(question)]
    system_of_turns = turns[: len(turns) - len(dialogue)]
    both_have_system = bool(system and system_of_turns)
    is_open = bool(question) and question[-1]["role"] == "assistant"  # an answer that was begun
    start = _start_of_prompt(question, dialogue, is_open)
    if (
        start is None
        or not (question or both_have_system)
        or (both_have_system and not all(map(_same, system, system_of_turns)))
    ):
        return [dict(turn) for turn in (*prompt, *turns)], len(prompt), False
    system = system or system_of_turns
    count = len(system) + start + len(question) - is_open
    return [dict(turn) for turn in (*system, *dialogue)], count, True


def _start_of_prompt(question: Messages, dialogue: Messages, is_open: bool) -> int | None:
    """Index of the prompt's turns in a conversation that contains them; else None.

    They are at the start, or directly before an answer, in a conversation that the user begins.
    """
    last = len(dialogue) - len(question) - (not is_open)
    user_begins = bool(question and dialogue) and dialogue[0]["role"] == "user"
    later = range(last, 0, -1) if user_begins else ()
    for start in (0, *later) if last >= 0 else ():
        twins = dialogue[start : start + len(question)]
        if (
            all(map(_same, question[:-1], twins))
            and (not question or _same(question[-1], twins[-1], is_open))
            and (not start or is_open or dialogue[start + len(question)]["role"] == "assistant")
        ):
            return start
    return None


def _without_system(turns: Messages) -> Messages:
    first = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    return turns[first:]


def _same(turn: Mapping[str, Any], twin: Mapping[str, Any], begun: bool = False) -> bool:
    """Whether two turns are equal or, if `begun`, the second continues the first."""
    text, twin_text = turn["content"].strip(), twin["content"].strip()
    is_same = twin_text.startswith(text) if begun else text == twin_text
    return turn["role"] == twin["role"] and is_same


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The lowest number up to `count` where a monotone condition (false, then true) holds."""
    return bisect_left(range(count), True, key=holds)
