"""A reward for programs: runs them on the dataset's tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from marlhf.common.errors import UserError, one_line, short_repr
from marlhf.common.markdown import fenced_blocks, without_indent
from marlhf.rewards.problems import Problem, apps_problem, check_humaneval, humaneval_problem
from marlhf.rewards.sandbox import Job, Limits, Outcome, Sandbox

PASSED, NONE_PASSED, RUNTIME_ERROR, NO_PROGRAM = 1.0, -0.3, -0.6, -1.0

_MOST_WORKERS = 1024
_PYTHON = ("python", "python3", "py", "py3")


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
    `problems.same_output`); with it each input is a list of arguments to that function, which may
    use names that APPS's own evaluation imports (`List`, `Counter`, `math`). None where empty.

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
                    check_humaneval(values[self.check_column], self.check_column)
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
