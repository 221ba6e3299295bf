"""Fenced code blocks of Markdown, by CommonMark's rule."""

from __future__ import annotations

import re
from dataclasses import dataclass

# each part is greedy and the rest of the line is arbitrary, so that the regex never backtracks
_FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,})(?P<info>.*)$", re.MULTILINE)


@dataclass(frozen=True)
class FencedBlock:
    """A fenced code block (``` or ~~~) of a text, by character offsets.

    start, end             the lines of the fences included; an unclosed block ends with the text
    code_start, code_end   the lines between the fences
    language               first word of the opening fence, in lower case; "" without one
    indent                 spaces before the opening fence
    closed                 False where the closing fence is missing
    """

    start: int
    code_start: int
    code_end: int
    end: int
    language: str
    indent: int
    closed: bool


def fenced_blocks(text: str) -> list[FencedBlock]:
    """Find the fenced code blocks of a text, in order, in linear time."""
    blocks: list[FencedBlock] = []
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if "`" in fence["info"]:
            continue  # code inside a line
        if opening is None:
            opening = fence
        elif _closes(fence, opening):
            blocks.append(
                _block(opening, fence.start(), min(fence.end() + 1, len(text)), closed=True)
            )
            opening = None
    if opening is not None:
        blocks.append(_block(opening, len(text), len(text), closed=False))
    return blocks


def without_indent(code: str, indent: int) -> str:
    """Remove up to `indent` leading spaces from every line."""
    return re.sub(rf"^ {{0,{indent}}}", "", code, flags=re.MULTILINE) if indent else code


def _closes(fence: re.Match[str], opening: re.Match[str]) -> bool:
    """Whether a fence closes a block.

    A closing fence has at least as many marks, no language, and at most 3 more spaces of
    indentation: a fence inside a docstring is not at the margin.
    """
    indent = len(fence["indent"]) - len(opening["indent"])
    return fence["marks"].startswith(opening["marks"]) and not fence["info"].strip() and indent <= 3


def _block(opening: re.Match[str], code_end: int, end: int, closed: bool) -> FencedBlock:
    return FencedBlock(
        start=opening.start(),
        code_start=min(opening.end() + 1, code_end),
        code_end=code_end,
        end=end,
        language=(opening["info"].split() or [""])[0].strip("{}.").lower(),
        indent=len(opening["indent"]),
        closed=closed,
    )
