"""The syntax segmenter on code, on code that is wrong, and on code inside Markdown."""

from __future__ import annotations

import ast
import pickle
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.responses import batch_of, piece_batch, pieces, text_batch
from support.strategies import fast
from support.tokenizer_families import byte_level

from marlhf.common.errors import UserError
from marlhf.segmenters import Syntax, Union, build_segmenter, validate

pytest.importorskip("tree_sitter_python")
pytest.importorskip("tree_sitter_javascript")

LOOP = """import os

def f(x, y=1):
    total = 0
    for i in range(10):
        total += x * i + y
    return total
"""


class Characters:
    """One token per character, so that a cutoff counts characters."""

    all_special_ids: tuple[int, ...] = ()

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


def cut(text: str, cutoff: int = 5, language: str = "python") -> list[str]:
    """Macro actions of a text whose tokens are its words, with the white space before each."""
    tokens = re.findall(r"\n|[ ]*(?:\w+|[^\w\s])", text)
    assert "".join(tokens) == text
    batch = piece_batch(tokens)
    starts = validate(Syntax(language, cutoff)(batch), batch, "syntax")
    return pieces(starts, batch)


def test_statements_open_macro_actions_and_small_nodes_are_ones():
    # (x, y=1) holds 7 tokens and is descended: y=1 holds 3; "def", "f", "x" are leaves and join
    # "total += x * i + y" holds 7: its leaves open with the line, x * i + y holds 5 and is
    # descended: x * i holds 3, + and y join it
    assert cut(LOOP) == [
        "import os\n\n",
        "def f(x,",
        " y=1):\n",
        "    total = 0\n",
        "    for i in",
        " range(10):\n",
        "        total +=",
        " x * i + y\n",
        "    return total\n",
    ]


def test_cutoff_is_strict():
    assert cut("a = b + c * d\n", 8) == ["a = b + c * d\n"]
    assert cut("a = b + c * d\n", 7) == ["a =", " b + c * d\n"]
    assert cut("a = b + c * d\n", 5) == ["a = b +", " c * d\n"]
    assert cut("a = b + c * d\n", 1) == ["a = b + c * d\n"]


def test_every_statement_begins_a_macro_action():
    """By Python's own parser: the first line of every statement but those inside a small node."""
    text = LOOP + "if a:\n    b()\nwhile True:\n    f(1)\n    g(2)\n"
    actions = cut(text, 2)
    starts = {sum(map(len, actions[:i])) for i in range(len(actions))}
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            assert sum(map(len, lines[: node.lineno - 1])) in starts


def test_a_comment_of_its_own_line_is_a_macro_action_and_one_at_an_end_is_not():
    assert cut("# first we add\nx = 1\ny = 2 # the end\n", 4) == [
        "# first we add\n",
        "x = 1\n",
        "y = 2 # the end\n",
    ]


@pytest.mark.parametrize(
    "text",
    ["def f(:\n    return (((\n", "x = [", "if a:\n", "'''never closed\nx = 1", "}{)(", "é = 'ü"],
)
def test_code_that_is_cut_short_or_wrong_has_a_tree_too(text):
    assert "".join(cut(text)) == text


def test_markdown_is_code_in_its_fences_and_sentences_outside():
    text = (
        "Here it is. It adds.\n"
        "```python\nx = 1\nif x:\n    y = a + b + c + d\n```\n"
        "And in JavaScript:\n"
        "```js\nlet a = 1;\nf(a);\n```\n"
        "Done."
    )
    assert cut(text) == [
        "Here it is.",
        " It adds.\n",
        "```python\n",
        "x = 1\n",
        "if x:\n",
        "    y =",
        " a + b + c + d\n",
        "```\n",
        "And in JavaScript:\n",
        "```js\n",
        "let",
        " a = 1;\n",
        "f(a);\n",
        "```\n",
        "Done.",
    ]


def test_a_block_that_is_not_closed_is_code_to_the_end():
    assert cut("So:\n```\nx = 1\ny = 2\n") == ["So:\n", "```\n", "x = 1\n", "y = 2\n"]


def test_a_language_without_a_grammar_is_cut_by_lines_and_counted():
    text = "```cobol\nADD A TO B.\nSTOP RUN.\n```\n```python\nx = 1\n```\n"
    batch = text_batch(byte_level(), text)
    segmenter = Syntax()
    found = pieces(segmenter(batch), batch)
    assert found[:4] == ["```cobol\n", "ADD A TO B.\n", "STOP RUN.\n", "```\n"]
    assert segmenter.metrics() == {"syntax_fallback_fraction": 0.5}
    segmenter(text_batch(byte_level(), "x = 1"))
    assert segmenter.metrics() == {"syntax_fallback_fraction": 0.0}


@fast
@given(st.text(alphabet="ab=+():\n `\"'é😀#\t\r", max_size=80), st.integers(1, 9))
def test_any_text_is_partitioned(text: str, cutoff: int):
    batch = batch_of(Characters(), [[ord(c) for c in text]])
    starts = validate(Syntax(cutoff=cutoff)(batch), batch, "syntax")
    assert "".join(pieces(starts, batch)) == text


def test_deep_nesting_and_long_lines_are_no_recursion():
    for text in ("(" * 5000, "x = [" * 2000, "if a:\n " * 1000 + "b"):
        assert "".join(cut(text)) == text


def test_max_length_union_pickle_and_yaml():
    batch = piece_batch(["x", " =", " 1", "\n", "y", " =", " 2"])
    assert pieces(Syntax(max_length=2)(batch), batch) == ["x =", " 1\n", "y =", " 2"]
    built = build_segmenter({"name": "union", "of": [{"name": "syntax", "cutoff": 9}, "line"]})
    assert isinstance(built, Union)
    assert pieces(built(batch), batch) == ["x = 1\n", "y = 2"]
    segmenter = Syntax()
    segmenter(batch)
    assert pickle.loads(pickle.dumps(segmenter)) == segmenter


def test_faults_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="cutoff: given 0"):
        Syntax(cutoff=0)
    for language in ("klingon", "no such/thing", ""):
        with pytest.raises(UserError, match=r"language: tree-sitter's grammar of .* pip install"):
            Syntax(language)
    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    with pytest.raises(UserError, match=r"pip install 'marlhf\[code\]'"):
        Syntax()
