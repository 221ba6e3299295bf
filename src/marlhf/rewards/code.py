"""A reward for programs: runs them on the dataset's tests."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from itertools import zip_longest
from typing import Any, Literal

from marlhf.common.errors import UserError, one_line, short_repr
from marlhf.common.markdown import fenced_blocks, without_indent
from marlhf.rewards.sandbox import (
    Calls,
    Check,
    Job,
    Limits,
    Outcome,
    Sandbox,
    Script,
    read_answer,
)

PASSED, NONE_PASSED, RUNTIME_ERROR, NO_PROGRAM = 1.0, -0.3, -0.6, -1.0

_WORD = re.compile(r"\S+")
_MOST_WORKERS = 1024
_PYTHON = ("python", "python3", "py", "py3")
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


@dataclass(frozen=True)
class Code:
    """The reward of a program by the row's tests; None where a row has none.

        1.3 x share of tests passed - 0.3   if it runs
        -0.6   on a runtime error in any test: an exception that the test does not expect, an exit
               status other than 0, no function of the expected name, a limit of the sandbox, a
               timeout included
        -1.0   if it does not compile, or if there is no program

    As in PPOCoder (Shojaee et al., 2023, arXiv 2301.13816) and RLTF (Liu et al., 2023, arXiv
    2307.04349). A timeout counts as a runtime error because APPS's own evaluation does not
    distinguish them. No test runs after the first such error.

    The program is the completion's last Markdown block of Python, else its last block, else all of
    the completion (see `extract_code`).

    format="apps": `tests_column` holds JSON text, or a mapping, with `inputs`, `outputs` and
    perhaps `fn_name`: without it each input is a stdin and each output the expected stdout (see
    `same_output`); with it each input is a list of arguments to that function, which may use names
    that APPS's own evaluation imports (`List`, `Counter`, `math`). None where empty.

    format="humaneval": `check_column` holds code that defines `check(candidate)`, which either
    passes or fails; `entry_point_column` the function's name; `prefix_column` the code before the
    completion (without such a column: the prompt), which is prepended to the program if it
    compiles and defines the function.

    workers: programs at a time; default: the machine's CPUs, at most 16. The limits are those of
    `marlhf.rewards.sandbox.Limits`; that module also lists the risks of `allow_weak_sandbox`.
    """

    format: Literal["apps", "humaneval"] = "apps"
    tests_column: str = "input_output"
    check_column: str = "test"
    entry_point_column: str = "entry_point"
    prefix_column: str = "prompt"
    workers: int | None = None
    wall_seconds: float = Limits.wall_seconds
    cpu_seconds: int = Limits.cpu_seconds
    memory_mb: int = Limits.memory_mb
    allow_weak_sandbox: bool = False

    def __post_init__(self) -> None:
        if self.format not in ("apps", "humaneval"):
            raise UserError(f"format: given {self.format!r}, must be apps or humaneval")
        if self.workers is not None and not 1 <= self.workers <= _MOST_WORKERS:
            raise UserError(f"workers: given {self.workers}, must be 1 to {_MOST_WORKERS}")
        if problem := self._limits.problem():
            raise UserError(problem)

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """Columns that the data must have."""
        if self.format == "apps":
            return (self.tests_column,)
        return (self.check_column, self.entry_point_column)

    def check_values(self, **columns: Sequence[Any]) -> None:
        """Raise ValueError where a row's tests are not in the format."""
        row = 0
        try:
            for row in range(len(columns[self.needed_columns[0]])):
                values = {name: column[row] for name, column in columns.items()}
                if self._problem("", values) is not None and self.format == "humaneval":
                    _check_test(values[self.check_column], self.check_column)
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {row}: {one_line(error)}") from error

    @property
    def _limits(self) -> Limits:
        return Limits(
            wall_seconds=self.wall_seconds,
            cpu_seconds=self.cpu_seconds,
            memory_mb=self.memory_mb,
        )

    @cached_property
    def sandbox(self) -> Sandbox:
        """The sandbox, started at first use. Raises UserError where there can be none."""
        return Sandbox(self._limits, self.workers, self.allow_weak_sandbox)

    def load(self) -> Code:
        """Start the sandbox now. Raises UserError."""
        _ = self.sandbox
        return self

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> list[float | None]:
        """Run and reward programs. Raises ValueError for tests that are not in the format."""
        problems: dict[int, Problem] = {}
        jobs: dict[int, Job] = {}
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            problem = self._problem(prompt, {name: column[row] for name, column in columns.items()})
            if problem is not None:
                problems[row] = problem
                program = extract_code(completion, prompt)
                if has_code(program):
                    jobs[row] = problem.job(program)
        outcomes = dict(zip(jobs, self.sandbox.run(list(jobs.values())), strict=True))
        return [
            None
            if row not in problems
            else reward(outcomes[row], problems[row].share)
            if row in outcomes
            else NO_PROGRAM
            for row in range(len(completions))
        ]

    def _problem(self, prompt: str, row: Mapping[str, Any]) -> Problem | None:
        if self.format == "apps":
            return apps_problem(row[self.tests_column], self.tests_column)
        test, function = row[self.check_column], row[self.entry_point_column]
        if not test or not function:
            return None
        for value, column in ((test, self.check_column), (function, self.entry_point_column)):
            if not isinstance(value, str):
                raise ValueError(f"column {column!r}: {short_repr(value, 40)} must be text")
        if not function.isidentifier():
            column = self.entry_point_column
            raise ValueError(f"column {column!r}: {short_repr(function, 40)} must name a function")
        prefix = row.get(self.prefix_column)
        return humaneval_problem(prompt if prefix is None else prefix, test, function)


def reward(outcome: Outcome, share: Callable[[Outcome], float]) -> float:
    """A program's reward by its outcome; `share` computes the fraction of tests passed."""
    if outcome.status == "syntax":
        return NO_PROGRAM
    if outcome.status in ("ok", "failed"):
        return NONE_PASSED + (PASSED - NONE_PASSED) * share(outcome)
    return RUNTIME_ERROR


def extract_code(completion: str, prompt: str = "") -> str:
    """Extract the program from a completion.

    The last fenced block (``` or ~~~) marked as Python, else the last one, else the full text. An
    unclosed block extends to the end of the text, and one that the prompt leaves open is the
    completion's first. The indentation of the opening fence is removed from the block's lines.
    """
    opened = [block for block in fenced_blocks(prompt) if not block.closed]
    if opened:
        completion = f"{prompt[opened[0].start : opened[0].code_start].strip()}\n{completion}"
    blocks = fenced_blocks(completion)
    chosen = [block for block in blocks if block.language in _PYTHON] or blocks
    if not chosen:
        return completion
    return without_indent(
        completion[chosen[-1].code_start : chosen[-1].code_end], chosen[-1].indent
    )


def has_code(program: str) -> bool:
    """Whether a program has any line other than comments and blank lines."""
    return any(line.strip() and not line.strip().startswith("#") for line in program.splitlines())


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


def _check_test(test: str, column: str) -> None:
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
