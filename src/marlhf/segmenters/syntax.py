"""A segmenter that follows the syntax tree of code: `parsing` for programs.

tree-sitter parses it: one small package per language (tree-sitter-python, tree-sitter-rust, ...),
and truncated or faulty code has a tree too. In Markdown the segmenter reads the fenced blocks.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from torch import Tensor

from marlhf.common.errors import UserError, one_line
from marlhf.common.markdown import fenced_blocks
from marlhf.common.types import ResponseBatch
from marlhf.segmenters.base import Fallbacks, Segmenter
from marlhf.segmenters.offsets import TokenIndex, starts_tensor
from marlhf.segmenters.parsers import is_importable
from marlhf.segmenters.text import line_boundaries, sentence_spans

_FIRST_VISIBLE = re.compile(r"^[^\S\n]*\S", re.MULTILINE)  # of each line
_ALIASES = {  # what fences call a language -> the end of its package's name
    "py": "python",
    "python3": "python",
    "js": "javascript",
    "jsx": "javascript",
    "ts": "typescript",
    "sh": "bash",
    "shell": "bash",
    "c++": "cpp",
    "c#": "c_sharp",
    "cs": "c_sharp",
    "csharp": "c_sharp",
    "golang": "go",
    "rs": "rust",
    "rb": "ruby",
}


@dataclass(frozen=True)
class Syntax(Segmenter):
    """Nodes of the syntax tree, depth first, that hold fewer than `cutoff` policy tokens.

    A node that begins a line (a statement, a clause, an item of a list) opens a macro action; a
    single leaf (a name, an operator, a comment) inside a line joins the previous one. A response
    with Markdown fences is code inside them, in the language that each fence names, and sentences
    outside; any other response is code. A block in a language whose package is missing is cut by
    lines; the metric `syntax_fallback_fraction` is the share of such blocks in the last batch.

    language   of code without a name: "python", "javascript", ...; needs `tree-sitter-LANGUAGE`
    """

    requires = frozenset()

    language: str = "python"
    cutoff: int = 5
    _fallbacks: Fallbacks = field(default_factory=Fallbacks, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cutoff < 1:
            raise UserError(f"cutoff: given {self.cutoff}, must be at least 1")
        if not is_importable("tree_sitter"):
            raise UserError("segmenter syntax: needs tree-sitter; pip install 'marlhf[code]'")
        if _parser(self.language) is None:
            raise UserError(
                f"language: tree-sitter's grammar of {self.language!r} is not installed; "
                f"pip install tree-sitter-{_package(self.language).replace('_', '-')}"
            )

    def metrics(self) -> dict[str, float]:
        """`syntax_fallback_fraction` of the last batch."""
        return self._fallbacks.metrics("syntax_fallback_fraction")

    def starts(self, batch: ResponseBatch) -> Tensor:
        blocks = fallbacks = 0
        starts: list[set[int]] = []
        for text, spans in zip(batch.texts, batch.offsets, strict=True):
            index = TokenIndex(text, spans)
            chars: list[int] = []
            for start, end, language in code_and_prose(text, self.language):
                part = text[start:end]
                parser = None if language is None else _parser(language)
                if language is None:
                    chars += [start + sentence for sentence, _ in sentence_spans(part)]
                elif parser is None:
                    chars += [start + line for line in line_boundaries(part)]
                else:
                    chars += syntax_starts(parser, part, start, index, self.cutoff)
                blocks += language is not None
                fallbacks += language is not None and parser is None
            starts.append({t for char in chars if (t := index.token_at(char)) is not None})
        self._fallbacks.count(fallbacks, blocks)
        return starts_tensor(batch, starts)


def code_and_prose(text: str, language: str) -> Iterator[tuple[int, int, str | None]]:
    """Split a response into `(start, end, language)`; language None: prose, fences included.

    A response without fences is code in `language`, as is a block that names none.
    """
    blocks = fenced_blocks(text)
    if not blocks:
        yield 0, len(text), language
        return
    position = 0
    for block in blocks:
        yield position, block.start, None
        yield block.start, block.code_start, None
        yield block.code_start, block.code_end, block.language or language
        position = block.code_end
    yield position, len(text), None


def syntax_starts(
    parser: Any, code: str, offset: int, index: TokenIndex, cutoff: int
) -> Iterator[int]:
    """Characters of the response at which the macro actions of a piece of code start.

    offset   character of the response at which the code begins
    """
    yield offset
    char = _characters(code)
    lines = {match.end() - 1 for match in _FIRST_VISIBLE.finditer(code)}
    stack = [parser.parse(code.encode("utf-8", "replace")).root_node]
    while stack:
        node = stack.pop()
        start, end = char[node.start_byte], char[node.end_byte]
        if node.is_named and start in lines:
            yield offset + start
        if not node.children:
            continue  # a leaf joins the macro action before it
        tokens = index.count(offset + start, offset + end)
        if tokens >= cutoff:
            stack.extend(node.children)
        elif tokens:
            yield offset + start


def _characters(code: str) -> Any:
    """Character index of each byte of the UTF-8 text, then the number of characters."""
    if code.isascii():
        return range(len(code) + 1)
    sizes = (len(char.encode("utf-8", "replace")) for char in code)
    ends = list(accumulate(sizes))
    characters = [0] * (ends[-1] + 1)
    start = 0
    for i, end in enumerate(ends):
        characters[start:end] = [i] * (end - start)
        start = end
    characters[-1] = len(code)
    return characters


def _package(language: str) -> str:
    return _ALIASES.get(language.lower(), language.lower().replace("-", "_"))


@functools.cache
def _parser(language: str) -> Any | None:
    """tree-sitter's parser of a language; None where its package is not installed.

    Raises UserError where the package does not fit the installed tree-sitter.
    """
    name = _package(language)
    if not name.isidentifier() or not is_importable(f"tree_sitter_{name}"):
        return None
    tree_sitter = importlib.import_module("tree_sitter")
    grammar = importlib.import_module(f"tree_sitter_{name}")
    try:
        function = getattr(grammar, "language", None) or getattr(grammar, f"language_{name}")
        return tree_sitter.Parser(tree_sitter.Language(function()))
    except (AttributeError, ValueError, TypeError) as error:
        raise UserError(
            f"language: tree-sitter cannot load the grammar of {language!r}: {one_line(error)}"
        ) from error
