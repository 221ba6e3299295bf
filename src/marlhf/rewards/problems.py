"""Programming problems of APPS and HumanEval: their tests, and which outputs pass."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import zip_longest
from typing import Any

from marlhf.common.errors import one_line
from marlhf.rewards.sandbox import Calls, Check, Job, Outcome, Script, read_answer

_WORD = re.compile(r"\S+")
# tolerances of a decimal number that a program prints, as in APPS's own evaluation
_RELATIVE, _ABSOLUTE = 1e-5, 1e-8
# names that the sites of APPS's functions predefine, and APPS's own evaluation too
_APPS_PRELUDE = """
import collections, fractions, heapq, itertools, math, random, sys, time
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque
from functools import lru_cache
from heapq import *
from itertools import accumulate, combinations, permutations, product
from math import ceil, cos, exp, fabs, floor, gcd, log, log2, sin, sqrt, tan
from typing import *
"""


@dataclass(frozen=True)
class Problem:
    """One row's tests, and the fraction that passed.

    job     makes the job that runs a program on the tests
    share   the fraction passed, 0 to 1, of the outcome of a job that ran
    """

    job: Callable[[str], Job]
    share: Callable[[Outcome], float]


def apps_problem(tests: Any, column: str = "input_output") -> Problem | None:
    """A problem of APPS (Hendrycks et al., 2021); None where it has no tests.

    Raises ValueError for tests in another format.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests, parse_int=_integer) if tests.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"column {column!r} is not JSON: {one_line(error, 100)}") from error
    if not tests:
        return None
    if not isinstance(tests, Mapping) or not {"inputs", "outputs"} <= tests.keys():
        raise ValueError(f"column {column!r} must have the keys inputs and outputs")
    inputs, outputs, function = tests["inputs"], tests["outputs"], tests.get("fn_name") or None
    lists = isinstance(inputs, list) and isinstance(outputs, list)
    if not lists or len(inputs) != len(outputs):
        raise ValueError(f"column {column!r}: inputs and outputs must be lists of one length")
    if not inputs:
        return None
    if function is None:
        stdins = tuple(_lines(x, column) for x in inputs)
        expected = [_lines(x, column) for x in outputs]
        return Problem(
            lambda source: Script(source, stdins, lambda i, text: same_output(text, expected[i])),
            lambda outcome: sum(outcome.outputs) / len(expected),
        )
    if not isinstance(function, str):
        raise ValueError(f"column {column!r}: fn_name must be the name of a function")
    if not all(isinstance(x, list) for x in inputs):
        raise ValueError(f"column {column!r}: inputs for fn_name must be lists of arguments")
    arguments = tuple(tuple(_integer_keys(x) for x in call) for call in inputs)

    def passes(i: int, answer: str) -> bool:
        return _may_equal(answer, outputs[i]) and same_value(read_answer(answer), outputs[i])

    return Problem(
        lambda source: Calls(source, function, arguments, _APPS_PRELUDE, passes),
        lambda outcome: sum(outcome.outputs) / len(outputs),
    )


def humaneval_problem(prefix: str, test: str, function: str) -> Problem:
    """A problem of HumanEval (Chen et al., 2021); the test's helpers come from the prefix."""
    definitions = _definitions(prefix)
    helpers = prefix if function in definitions else ""
    is_class = _asks_for_class(prefix, definitions.get(function), test, function)
    # a regex: programs are parsed only inside the sandbox
    definition = re.compile(rf"^((async\s+)?def|class)\s+{re.escape(function)}\b", re.MULTILINE)

    def job(program: str) -> Job:
        # a complete definition, or a continuation of the prefix
        is_complete = definition.search(program)
        source = f"{helpers}\n{program}" if is_complete else helpers + program
        return Check(source, function, test, helpers, is_class)

    return Problem(job, lambda outcome: float(outcome.status == "ok"))


def check_humaneval(test: str, column: str) -> None:
    """Raise ValueError for a test that does not compile or define `check`. Does not run it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = compile(test, "test", "exec", dont_inherit=True).co_names
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"column {column!r} is no Python: {one_line(error, 100)}") from error
    if "check" not in names:
        raise ValueError(f"column {column!r} must define the function check(candidate)")


def same_output(actual: str, expected: str) -> bool:
    """Whether a program printed the expected output: the same words in the same order.

    White space between them is ignored; where the expected word is a number with a decimal point,
    a close number is accepted (relative 1e-5, absolute 1e-8).
    """
    # word by word: a list of all words takes many times the memory of the text
    texts = ((word[0] for word in _WORD.finditer(text)) for text in (actual, expected))
    return all(a == e or _near(a, e) for a, e in zip_longest(*texts))


def same_value(actual: Any, expected: Any) -> bool:
    """Whether a function returned the expected value, which APPS may wrap in a list.

    Both are in JSON's types, as in an `Outcome`.
    """
    return _equal(actual, expected) or (
        isinstance(expected, list) and len(expected) == 1 and _equal(actual, expected[0])
    )


def _equal(actual: Any, expected: Any) -> bool:
    try:
        return bool(actual == expected)
    except RecursionError:
        return False


def _may_equal(answer: str, expected: Any) -> bool:
    """Whether an answer is small enough to be right: parsing takes memory.

    Compares the number of its parts with that of the expected value.
    """
    allowed, rest = 64, [expected]
    while rest:
        value = rest.pop()
        allowed += 8 + (_marks(value) if isinstance(value, str) else 0)
        if isinstance(value, list | dict):
            rest += value
        if isinstance(value, dict):
            rest += value.values()
    return _marks(answer) <= allowed


def _marks(text: str) -> int:
    return sum(map(text.count, "[{,"))


def _near(actual: str | None, expected: str | None) -> bool:
    if actual is None or expected is None or "." not in expected:
        return False
    try:
        a, e = float(actual), float(expected)
    except ValueError:
        return False
    return math.isclose(a, e, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)


def _lines(value: Any, column: str) -> str:
    """A test's input or output as text, joined where it is a list of lines."""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if not isinstance(value, str):
        raise ValueError(f"column {column!r}: {one_line(repr(value), 40)} must be text")
    return value


def _integer(digits: str) -> int:
    """Convert digits as `int` does, without its limit on their number, which some tests exceed."""
    return int(digits) if len(digits) < 1000 else int(Decimal(digits))


def _integer_keys(value: Any) -> Any:
    """Convert a dictionary's integer keys back from text, which JSON made of them."""
    if isinstance(value, dict) and all(re.fullmatch("-?[0-9]+", key) for key in value):
        return {int(key): item for key, item in value.items()}
    return value


def _asks_for_class(prefix: str, definition: type | None, test: str, name: str) -> bool:
    """Whether a problem asks for a class, as judged by the dataset alone.

    A capitalised name is not enough, as some datasets capitalise functions: the text must mention a
    class, or the test use a method or attribute of an instance.
    """
    if definition is not None:
        return definition is ast.ClassDef
    try:
        nodes = list(ast.walk(ast.parse(test)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    names = ("candidate", name)
    if any(_asks_for_instance(node, names) for node in nodes):
        return True
    mentions_class = re.search(r"\bclass\b", prefix) is not None
    return name[:1].isupper() and (mentions_class or _uses_instances(nodes, names))


def _asks_for_instance(node: ast.AST, names: tuple[str, ...]) -> bool:
    """Whether a node is `isinstance(x, candidate)` or the like."""
    if not isinstance(node, ast.Call) or not _is_name(node.func, ("isinstance", "issubclass")):
        return False
    return any(_is_name(x, names) for x in node.args[1:])


def _is_name(node: ast.AST, names: tuple[str, ...]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _uses_instances(nodes: list[ast.AST], names: tuple[str, ...]) -> bool:
    """Whether a test uses an attribute of `candidate(...)`, directly or through a variable."""

    def makes(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and _is_name(node.func, names)

    made = {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign) and makes(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return any(
        makes(node.value) or (isinstance(node.value, ast.Name) and node.value.id in made)
        for node in nodes
        if isinstance(node, ast.Attribute) and not _is_of_builtin_type(node.attr)
    )


def _is_of_builtin_type(attribute: str) -> bool:
    kinds = (str, bytes, int, float, complex, list, tuple, dict, set)
    return any(hasattr(kind, attribute) for kind in kinds)


def _definitions(source: str) -> dict[str, type]:
    """Top-level functions and classes of a source by name; none where it does not parse."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name: type(node) for node in body if isinstance(node, kinds)}
