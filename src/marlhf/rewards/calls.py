"""Calls a reward and checks its return values; every fault is reported in one line.

A reward gets copies, so that its changes to them reach no other reward.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from marlhf.common.errors import ReportedError, UserError, one_line, raised, short_repr
from marlhf.common.plugins import copied, plugin_call
from marlhf.common.registry import check_call

RewardFn = Callable[..., Any]
PlacedRewards = list[tuple[int, float]]
Columns = Mapping[str, Sequence[Any]]

_LARGEST = float(np.finfo(np.float32).max)


class RewardError(ReportedError):
    """A reward failed on a batch; one line names the reward and the row. Chained to the cause."""


def needed_columns(function: RewardFn) -> list[str]:
    """Columns that a reward requires: parameters without a default, and those that it lists.

    It lists columns in its attribute `needed_columns`.
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
    if _names_texts(parameters):
        columns = [p for p in parameters if p.name not in ("prompts", "completions")]
    else:
        columns = parameters[2:]
    return [p for p in columns if p.name not in bound]


def _names_texts(parameters: Sequence[inspect.Parameter]) -> bool:
    """Whether a reward takes its texts by the contract's names, or all by name."""
    by_name = [p for p in parameters if p.kind in (p.VAR_KEYWORD, p.KEYWORD_ONLY)]
    names = any(p.name == "completions" and p.kind != p.POSITIONAL_ONLY for p in parameters)
    return names or (bool(by_name) and len(by_name) == len(parameters))


def text_parameters(function: RewardFn) -> list[str]:
    """Names of parameters that receive prompts and completions by position."""
    parameters = _parameters(function)
    if _names_texts(parameters):
        return []
    texts = ("prompts", "completions")
    return [p.name for p in parameters[:2] if p.name not in texts and p.kind != p.VAR_KEYWORD]


def evaluate(
    name: str, function: RewardFn, prompts: list[str], completions: list[str], columns: Columns
) -> list[float | PlacedRewards | None]:
    """Call a reward and check its values; every fault becomes a RewardError.

    A UserError that the reward raises passes through.
    """
    try:
        with plugin_call(name, _FailedError):
            values: Any = _call(function, prompts, completions, columns)
    except _FailedError as failed:
        if isinstance(failed.__cause__, UserError):
            raise failed.__cause__ from None
        row, cause = _first_failure(name, function, prompts, completions, columns, _cause(failed))
        raise _error(name, row, prompts, raised(cause)) from cause
    row, checked = None, []
    try:
        with plugin_call(name, _FailedError):
            for row, value in enumerate(_listed(values, len(prompts))):
                checked.append(_checked(value, len(completions[row])))
    except _FailedError as failed:
        cause = _cause(failed)
        fault = one_line(cause) if isinstance(cause, TypeError | ValueError) else raised(cause)
        raise _error(name, row, prompts, fault) from cause
    return checked


class _FailedError(Exception):
    """A reward failed; the exception is its cause."""


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
                with plugin_call(name, _FailedError):
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
            raise TypeError(f"returned {short_repr(values)}, must be a list of numbers") from None
    if not isinstance(values, list | tuple):
        raise TypeError(f"returned {type(values).__name__}, must be a list with one entry per row")
    if len(values) != rows:
        raise ValueError(f"returned {len(values)} entries for {rows} rows")
    return values


def _checked(value: Any, length: int) -> float | PlacedRewards | None:
    """One row's value in plain types. Raises TypeError or ValueError, naming the fault."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        return _number(value)
    pairs = []
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TypeError(f"{short_repr(value)} is no list of (end_char, reward) pairs")
        try:
            end = operator.index(pair[0].item() if hasattr(pair[0], "item") else pair[0])
        except Exception:
            raise TypeError(f"end_char {short_repr(pair[0])} is not an integer") from None
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
            f"returned {short_repr(value)}, must be a number, None or a list of (end_char, reward)"
        )
    try:
        result = float(number)
    except OverflowError:
        result = math.inf
    if not is_finite(result):
        raise ValueError(f"returned {short_repr(number)}, must be finite (in float32)")
    return result


def is_finite(score: float) -> bool:
    """Whether a score is finite in float32, the precision of the update."""
    return abs(score) <= _LARGEST


def check_signature(name: str, function: RewardFn, available: Iterable[str]) -> None:
    """Check that a reward can be called with the columns available. Raises UserError."""
    check_call(function, f"reward {name}", *_names(function, available))


def _names(function: RewardFn, available: Iterable[str]) -> tuple[list[str], list[str]]:
    """What a reward gets: names of texts by position, and of all by name."""
    parameters, accepted = _parameters(function), column_parameters(function)
    texts = ["prompts", "completions"]
    if any(p.kind == p.VAR_KEYWORD for p in accepted):
        bound = function.keywords if isinstance(function, functools.partial) else {}
        columns = [name for name in available if name not in texts and name not in bound]
    else:
        present = set(available)
        columns = [p.name for p in accepted if p.name in present]
    if not _names_texts(parameters):
        return texts, columns
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    known = {p.name for p in parameters}
    return [], [*(name for name in texts if takes_any or name in known), *columns]


def _call(
    function: RewardFn, prompts: list[str], completions: list[str], columns: Columns
) -> Sequence[Any]:
    """Call a reward with copies of its texts and of the columns that it accepts."""
    texts = {"prompts": list(prompts), "completions": list(completions)}
    positional, named = _names(function, columns)
    passed = copied({name: list(columns[name]) for name in named if name not in texts})
    passed |= {name: texts[name] for name in named if name in texts}
    return function(*(texts[name] for name in positional), **passed)


def _error(name: str, row: int | None, prompts: Sequence[str], fault: str) -> RewardError:
    where = f"a batch of {len(prompts)} rows"
    if row is not None:
        where = f"row {row} (prompt {short_repr(prompts[row])})"
    return RewardError(f"reward {name}: {where}: {fault}")
