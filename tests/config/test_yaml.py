"""YAML by the types of version 1.2, merge keys, and files that would grow without end."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import fast

from marlhf.common.errors import UserError
from marlhf.config.yaml_text import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("08", 8),
        ("-007", -7),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-02", "2024-01-02"),
        ("2024-01-02T03:04:05Z", "2024-01-02T03:04:05Z"),
        ("y", "y"),
        ("n", "n"),
        ("True", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("'no'", "no"),
        ("|\n  on\n", "on\n"),
        ("1.", 1.0),
        ("-.5", -0.5),
        ("-.INF", -math.inf),
        ("{no one: 1}", {"no one": 1}),
        ("=", "="),
    ],
)
def test_types_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text, "here")
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("word", ["yes", "No", "ON", "off"])
@pytest.mark.parametrize("text", ["a: {}", "[a, {}]", "{}: 1", "- - {}"])
def test_words_that_readers_disagree_on_are_refused(word, text):
    with pytest.raises(UserError, match=f"here, line 1: .*{word} means true or false to some"):
        parse_yaml(text.replace("{}", word), "here")


def test_merge_keys():
    text = """
    base: &base {a: 1, b: 2}
    more: &more {<<: *base, b: 3, c: 4}
    deep: {list: [{<<: [*more, {d: 5, a: 9}], e: 6}], two: &two {<<: *more, a: 0}}
    last: {<<: *two}
    """
    more = {"a": 1, "b": 3, "c": 4}
    assert parse_yaml(text, "here") == {
        "base": {"a": 1, "b": 2},
        "more": more,
        "deep": {"list": [more | {"d": 5, "e": 6}], "two": more | {"a": 0}},
        "last": more | {"a": 0},
    }


def laughs(levels: int, head: str, item: str, tail: str) -> str:
    lines = [f"a0: &a0 {head}x: 1{tail}" if head == "{" else "a0: &a0 [x]"]
    for level in range(1, levels):
        below = ", ".join(item.format(level - 1) for _ in range(9))
        lines.append(f"a{level}: &a{level} {head}{below}{tail}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        laughs(9, "[", "*a{}", "]"),
        laughs(30, "[", "*a{}", "]"),
        laughs(9, "{<<: [", "*a{}", "]}").replace("{<<: [x: 1]}", "{x: 1}"),
        "a: &a [1]\nb: &b [*a, *a]\nc: &c {x: *b, *b : 1}\nd: &d [*d]",
    ],
    ids=["nine of nine", "thirty", "merged", "itself"],
)
def test_aliases_of_aliases_end_at_once(text):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"not valid YAML: (with its al|a key|it holds its)"):
        parse_yaml(text, "here")
    assert time.monotonic() - start < 5


def test_a_file_with_a_few_aliases_is_fine():
    assert parse_yaml(laughs(4, "[", "*a{}", "]"), "here")["a3"][8][8][8] == ["x"]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
odd = st.sampled_from(["no", "1e5", "0o17", "08", "010", "1:30", "1_0", "<<", "=", "~", ".inf", ""])


@fast
@given(plain | odd | st.dictionaries(odd, odd))
def test_what_is_written_is_read_alike_by_both_versions(value: Any):
    text = dump_yaml(value)
    assert parse_yaml(text, "here") == value
    assert yaml.safe_load(text) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: !!bool maybe", "'maybe' is not what the tag !!bool says"),
        ("a: 1\nb: !!null kept", "'kept' is not what the tag !!null says"),
        ("a: 1\nb: !!int 1_0", "'1_0' is not what the tag !!int says"),
        ("a: 1\nb: !!float x", "'x' is not what the tag !!float says"),
        ("a: 1\n!!bool x: b", "'x' is not what the tag !!bool says"),
        ("a: 1\nb: 0x" + "9" * 5000, "a number has more than 1000 digits"),
        ("a: 1\nb: -" + "9" * 5000, "a number has more than 1000 digits"),
        ('a: 1\nb: "\\UFFFFFFFF"', "an escape is no character"),
        ('a: 1\nb: "\\U00110000"', "an escape is no character"),
        ("a: 1\nb: {1: x, 1.0: y}", "key '1.0' is given twice"),
        ("a: 1\nb: {true: x, 1: y}", "key '1' is given twice"),
        ("a: 1\nb: {1: x, '1': y}", "key '1' is given twice"),
        ("a: 1\nb: " + "[" * 99 + "]" * 99, "nested too deeply, over 50 levels"),
        ("a: 1\nb: " + "{a: " * 99 + "}" * 99, "nested too deeply, over 50 levels"),
        ("a: 1\n? " + "- " * 99 + "x", "nested too deeply, over 50 levels"),
        ("a: 1\nb: [" + "1, " * 99_999 + "]", "it has more than 20000 values"),
    ],
)
def test_what_no_value_can_be_made_of_is_a_line_that_names_its_line(text, problem):
    with pytest.raises(UserError, match=r"here, line 2: not valid YAML: .*") as error:
        parse_yaml(text, "here")
    assert problem in str(error.value)


def test_tags_that_fit_are_read():
    text = "[!!str 3, !!int '3', !!float 3, !!bool 'true', !!null '', !<tag:yaml.org,2002:int> 3]"
    assert parse_yaml(text, "here") == ["3", 3, 3.0, True, None, 3]
