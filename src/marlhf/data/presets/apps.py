"""`codeparrot/apps`: programming problems with solutions and tests (Hendrycks et al. 2021, arXiv
2105.09938)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from marlhf.common.errors import UserError
from marlhf.data.file_formats import parse_json
from marlhf.data.files import Files, Row
from marlhf.data.presets.base import Example, RowError, Source, value
from marlhf.rewards.problems import apps_problem


@dataclass(frozen=True)
class APPS:
    """Programming problems of APPS.

    level: problems of one difficulty, or of `all`
    solutions: maximum sft rows per problem; null: one per solution

    The prompt is that of the APPS paper; the MA-RLHF paper's released code has none. A problem
    without tests gives no prompt, one without solutions no sft row, and none gives pairs. Prompts
    have the columns `input_output` (the tests, as the dataset's JSON text), `starter_code`,
    `difficulty`, `problem_id` and `reference` (the first solution, or null).
    """

    level: Literal["all", "introductory", "interview", "competition"] = "all"
    solutions: int | None = None

    def __post_init__(self) -> None:
        if self.solutions is not None and self.solutions < 1:
            raise UserError(f"solutions: given {self.solutions}, must be at least 1 or null")

    @property
    def source(self) -> Source:
        columns = ("problem_id", "question", "solutions", "input_output", "difficulty")
        files = Files(self.level, "refs/convert/parquet", (*columns, "starter_code"))
        shares = {"sft": 0.2, "ppo": 0.8}
        return Source("codeparrot/apps", files, eval_split="test", shares=shares)

    def __call__(self, row: Row) -> Example:
        question = value(row, "question", str)
        if not question.strip():
            raise RowError("question is empty")
        starter = value(row, "starter_code", str, optional=True) or ""
        solutions, tests = _solutions(row), _tests(row)
        columns = {
            "input_output": row.get("input_output"),
            "starter_code": starter,
            "difficulty": value(row, "difficulty", str, optional=True),
            "problem_id": value(row, "problem_id", int, optional=True),
            "reference": solutions[0] if solutions else None,
        }
        return Example(
            _prompt(question, starter, called=bool(tests.get("fn_name"))),
            tuple(solutions[: self.solutions]),
            None,
            columns if tests.get("inputs") else None,
            question,
        )


def _prompt(question: str, starter: str, called: bool) -> str:
    starter = f"\n{starter}" if starter else ""
    way = "Call-Based" if called else "Standard Input"
    return f"\nQUESTION:\n{question}{starter}\nUse {way} format\nANSWER:\n"


def _solutions(row: Row) -> list[str]:
    solutions = _json(row, "solutions", [])
    if not isinstance(solutions, list) or not all(isinstance(s, str) for s in solutions):
        raise RowError("solutions is no list of texts")
    return [solution for solution in solutions if solution.strip()]


def _tests(row: Row) -> dict[str, Any]:
    tests = _json(row, "input_output", {})
    if not isinstance(tests, dict):
        raise RowError("input_output is no object with `inputs` and `outputs`")
    try:
        apps_problem(tests)
    except ValueError as error:
        raise RowError(str(error)) from None
    return tests


def _json(row: Row, key: str, empty: Any) -> Any:
    """Parse the JSON text of a column; `empty` where it is null or blank. Raises RowError."""
    text = value(row, key, str, optional=True)
    if not (text or "").strip():
        return empty
    try:
        with _long_numbers():
            return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{key} is not valid JSON: {error}") from None


@contextmanager
def _long_numbers() -> Iterator[None]:
    """Lift Python's limit on the digits of an integer, which some tests exceed."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)
