"""Calls a reward and checks its return values; every fault is reported in one line.

A reward gets copies, so that its changes to them reach no other reward.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from marlhf.common.errors import ReportedError, UserError, one_line, raised, shown
from marlhf.common.plugins import called, copied

RewardFn = Callable[..., Any]
Pairs = list[tuple[int, float]]
Columns = Mapping[str, Sequence[Any]]


class RewardError(ReportedError):
    """A reward failed on a batch; one line names the reward and the row. Chained to the cause."""


def needed_columns(function: RewardFn) -> list[str]:
    """Columns that a reward requires.

    Its parameters without a default, and those listed in its attribute `needed_columns`.
    """
    needed = [
        p.name
        for p in column_parameters(function)
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    return [*needed, *getattr(function, "needed_columns", ())]


def _parameters(function: RewardFn) -> list[inspect.Parameter]:
    """Parameters of the signature; `prompts, completions` where Python cannot inspect it."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        kind = inspect.Parameter.POSITIONAL_ONLY
        return [inspect.Parameter(name, kind) for name in ("prompts", "completions")]


def column_parameters(function: RewardFn) -> list[inspect.Parameter]:
    """Parameters after prompts and completions that no `functools.partial` has bound."""
    bound = function.keywords if isinstance(function, functools.partial) else {}
    parameters = _parameters(function)
    if _by_keyword(parameters):
        rest = [p for p in parameters if p.name not in ("prompts", "completions")]
    else:
        rest = parameters[2:]
    return [p for p in rest if p.name not in bound]


def _by_keyword(parameters: Sequence[inspect.Parameter]) -> bool:
    """Whether a reward names its texts as the contract does, in any order."""
    return any(p.name == "completions" and p.kind != p.POSITIONAL_ONLY for p in parameters)


def texts_by_place(function: RewardFn) -> list[str]:
    """A reward's own names for prompts and completions, which it then gets by position."""
    parameters = _parameters(function)
    if _by_keyword(parameters):
        return []
    texts = ("prompts", "completions")
    return [p.name for p in parameters[:2] if p.name not in texts and p.kind != p.VAR_KEYWORD]


def evaluate(
    name: str, function: RewardFn, prompts: list[str], completions: list[str], columns: Columns
) -> list[float | Pairs | None]:
    """Call a reward and check its values; every fault becomes a RewardError.

    A UserError that the reward raises passes through.
    """
    try:
        with called(name, _FailedError):
            values: Any = _call(function, prompts, completions, columns)
    except _FailedError as failed:
        if isinstance(failed.__cause__, UserError):
            raise failed.__cause__ from None
        row, cause = _first_failure(name, function, prompts, completions, columns, _cause(failed))
        raise _error(name, row, prompts, raised(cause)) from cause
    row, checked = None, []
    try:
        with called(name, _FailedError):
            for row, value in enumerate(_listed(values, len(prompts))):
                checked.append(_checked(value, len(completions[row])))
    except _FailedError as failed:
        cause = _cause(failed)
        fault = one_line(cause) if isinstance(cause, TypeError | ValueError) else raised(cause)
        raise _error(name, row, prompts, fault) from cause
    return checked


class _FailedError(Exception):
    """A reward failed; its cause says how."""


def _cause(failed: _FailedError) -> BaseException:
    assert failed.__cause__ is not None
    return failed.__cause__


def _first_failure(
    name: str,
    function: RewardFn,
    prompts: list[str],
    completions: list[str],
    columns: Columns,
    error: BaseException,
) -> tuple[int | None, BaseException]:
    """Bisect the batch for a row on which the reward raises, and its exception.

    `(None, error)` where the batch fails but neither of its halves does.
    """
    first, last = 0, len(prompts)
    while last - first > 1:
        middle = (first + last) // 2
        for part in (slice(first, middle), slice(middle, last)):
            rows = {name: list(column)[part] for name, column in columns.items()}
            try:
                with called(name, _FailedError):
                    _call(function, prompts[part], completions[part], rows)
            except _FailedError as smaller:
                first, last, error = part.start, part.stop, _cause(smaller)
                break
        else:
            return None, error
    return (first if last > first else None), error


def _listed(values: Any, rows: int) -> Sequence[Any]:
    """A reward's return value as a list with one entry per row. Raises TypeError, ValueError."""
    if hasattr(values, "tolist"):
        try:
            values = values.tolist()
        except Exception:  # a tensor without data, or a sparse one
            raise TypeError(f"returned {shown(values)}, must be a list of numbers") from None
    if not isinstance(values, list | tuple):
        raise TypeError(f"returned {type(values).__name__}, must be a list with one entry a row")
    if len(values) != rows:
        raise ValueError(f"returned {len(values)} entries for {rows} rows")
    return values


def _checked(value: Any, length: int) -> float | Pairs | None:
    """One row's value in plain types. Raises TypeError or ValueError, naming the fault."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        return _number(value)
    pairs = []
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TypeError(f"{shown(value)} is no list of (end_char, reward) pairs")
        try:
            end = operator.index(pair[0].item() if hasattr(pair[0], "item") else pair[0])
        except Exception:
            raise TypeError(f"end_char {shown(pair[0])} is not an integer") from None
        if not 1 <= end <= length:
            raise ValueError(f"end_char {end} lies outside the response: 1..{length}")
        pairs.append((end, _number(pair[1])))
    return pairs


def _number(value: Any) -> float:
    try:
        number = value.item() if hasattr(value, "item") else value
    except Exception:  # a tensor of several numbers, or without data
        number = None
    if not isinstance(number, Real):
        raise TypeError(
            f"returned {shown(value)}, must be a number, None or a list of (end_char, reward)"
        )
    try:
        found = float(number)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"returned {shown(number)}, must be finite")
    return found


def _call(
    function: RewardFn, prompts: list[str], completions: list[str], columns: Columns
) -> Sequence[Any]:
    """Call a reward with copies of its texts and of the columns that it takes."""
    prompts, completions = list(prompts), list(completions)
    parameters = _parameters(function)
    wanted = column_parameters(function)
    texts = {"prompts": prompts, "completions": completions}
    if any(p.kind == p.VAR_KEYWORD for p in wanted):
        bound = function.keywords if isinstance(function, functools.partial) else {}
        given = {n: list(c) for n, c in columns.items() if n not in texts and n not in bound}
    else:
        given = {p.name: list(columns[p.name]) for p in wanted if p.name in columns}
    given = copied(given)
    if not _by_keyword(parameters):
        return function(prompts, completions, **given)
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    return function(**{n: t for n, t in texts.items() if takes_any or n in names}, **given)


def _error(name: str, row: int | None, prompts: Sequence[str], fault: str) -> RewardError:
    where = f"a batch of {len(prompts)} rows"
    if row is not None:
        where = f"row {row} (prompt {shown(prompts[row])})"
    return RewardError(f"reward {name}: {where}: {fault}")
