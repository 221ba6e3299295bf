"""Runs -> groups of one configuration, means over their seeds, and updates to parity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from marlhf.common.errors import UserError
from marlhf.common.registry import spec_label
from marlhf.views.report.runs import Run

# Keys that differ within one configuration, or have no effect on learning.
_NO_DIFFERENCE = {
    "seed",
    "output_dir",
    "overwrite",
    "resume",
    "resume_changed",
    "log",
    "checkpoint",
}
SMOOTHED = 5  # evaluations
_LONG = 70  # characters
_RESAMPLES = 2000
# Student's t, two-sided 95%, for 1, 2, ... degrees of freedom: from any textbook's table.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
_T += (2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064)
_T += (2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, usually over seeds. `index` chooses colour, dashes and marker."""

    label: str
    index: int
    runs: list[Run]


@dataclass(frozen=True)
class Mean:
    """A mean over runs with its 95% interval (Student's t).

    half    half the interval's width; None for a single run
    """

    value: float
    half: float | None
    count: int

    @staticmethod
    def of(values: Iterable[float]) -> Mean | None:
        """The mean of `values`; None if there are none."""
        x = np.asarray(list(values), dtype=np.float64)
        if not len(x):
            return None
        if len(x) == 1:
            return Mean(float(x[0]), None, 1)
        half = student_t(len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
        return Mean(float(x.mean()), float(half), len(x))


def student_t(freedom: float) -> float:
    """Two-sided 95% quantile of Student's t; `freedom`, at least 1, is rounded down."""
    degrees = int(freedom)
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.4 / degrees


def difference(values: Sequence[float], baseline: Sequence[float]) -> Mean | None:
    """Mean of `values` minus mean of `baseline`, with Welch's 95% interval.

    The half is None if one of the two is a single value; the result is None if one is empty.
    """
    a, b = (np.asarray(sample, dtype=np.float64) for sample in (values, baseline))
    if not len(a) or not len(b):
        return None
    value, count = float(a.mean() - b.mean()), min(len(a), len(b))
    if count == 1:
        return Mean(value, None, count)
    parts = [x.var(ddof=1) / len(x) for x in (a, b)]
    if not sum(parts):
        return Mean(value, 0.0, count)
    welch = sum(parts) ** 2 / sum(p**2 / (len(x) - 1) for p, x in zip(parts, (a, b), strict=True))
    return Mean(value, float(student_t(welch) * math.sqrt(sum(parts))), count)


# --- grouping


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs whose configurations differ only in seed and outputs, in the given order.

    A missing key (of a run by another version) separates a run only if others differ in that key.
    A run without configuration is a group of its own.
    """
    varying = what_varies(runs)
    members: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        values = _flat(run.config)
        key = tuple(_canonical(values[k]) if k in values else "" for k in varying)
        members.setdefault(key if run.config else (f"no config {run.path}",), []).append(run)
    labels = [_label(group, varying) for group in members.values()]
    arms = [_arm(group) for group in members.values()]
    too_long = any(len(label) > _LONG for label in labels)
    if too_long:  # too many differences for a name
        labels = [group[0].name for group in members.values()]
    if too_long or None not in arms:  # names from a sweep, if they are distinct
        named = [arm or label for arm, label in zip(arms, labels, strict=True)]
        labels = named if len(set(named)) == len(named) else labels
    return [
        Group(label, i, group)
        for i, (label, group) in enumerate(zip(labels, members.values(), strict=True))
    ]


def what_varies(runs: Sequence[Run]) -> list[str]:
    """Keys with more than one value among the configurations that have them."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in _flat(run.config).items():
            values.setdefault(key, set()).add(_canonical(value))
    return sorted(key for key, distinct in values.items() if len(distinct) > 1)


def _arm(group: Sequence[Run]) -> str | None:
    """The sweep arm that all runs of a group share, if any."""
    arms = {run.arm for run in group}
    return arms.pop() if len(arms) == 1 else None


def _label(group: Sequence[Run], varying: Sequence[str]) -> str:
    config = group[0].config
    if not config:
        return group[0].name
    if not varying:
        return spec_label(config["segmenter"]) if "segmenter" in config else group[0].name
    settings = {key: spec_label(value) for key, value in _flat(config).items() if key in varying}
    parts = [v if k == "segmenter" else f"{k}={v}" for k, v in sorted(settings.items())]
    return ", ".join(parts) or group[0].name


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of sections -> values, without keys that do not tell configurations apart.

    A segmenter is one value, as is a key of a section. `template_date`, the day a run began, is
    left out.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in _NO_DIFFERENCE:
            continue
        if key != "segmenter" and isinstance(value, dict):
            flat.update({f"{key}.{k}": v for k, v in value.items() if k != "template_date"})
        else:
            spec = {"name": value} if key == "segmenter" and isinstance(value, str) else value
            flat[str(key)] = spec
    return flat


def _canonical(value: Any) -> str:
    """A value as text, independent of the order of keys."""
    if isinstance(value, dict):
        return repr(sorted(f"{key!r}: {_canonical(v)}" for key, v in value.items()))
    return repr([*map(_canonical, value)] if isinstance(value, list) else value)


def value_of(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key of `what_varies`; a dash if the run lacks it."""
    return _flat(config).get(key, "–")


def choose_baseline(groups: Sequence[Group], requested: str | None) -> Group:
    """Choose the group that others are compared with.

    requested   its label or the name of one of its runs; default: token-level PPO, else the first

    Raises UserError.
    """
    if requested is not None:
        for group in groups:
            if requested == group.label or requested in (run.name for run in group.runs):
                return group
        labels = "; ".join(group.label for group in groups)
        raise UserError(f"--baseline: no group is called {requested!r}; possible: {labels}")
    for group in groups:
        spec = group.runs[0].config.get("segmenter")
        name = spec.get("name") if isinstance(spec, dict) else spec
        if name == "token":
            return group
    return groups[0]


# --- parity


@dataclass(frozen=True)
class Parity:
    """When the runs of a group reach the baseline's final held-out reward.

    times      updates (or seconds) of each run with evaluations; infinite if it never does
    median     their median; low, high: its 95% interval, if there are several runs
    ratio      this group's median divided by the baseline's, with its interval
    """

    times: list[float]
    median: float
    low: float | None
    high: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None

    @property
    def reached(self) -> int:
        """Number of runs that reach it."""
        return sum(map(math.isfinite, self.times))


def smoothed(values: Mapping[int, float]) -> dict[int, float]:
    """Running means over the last SMOOTHED evaluations; updates with fewer are left out."""
    updates = sorted(values)
    return {
        updates[i]: float(np.mean([values[u] for u in updates[i + 1 - SMOOTHED : i + 1]]))
        for i in range(SMOOTHED - 1, len(updates))
    }


def finals(group: Group, key: str = "eval_score_mean") -> list[float]:
    """Final smoothed values of a held-out metric, one per run that has it."""
    curves = [smoothed(run.values(key)) for run in group.runs]
    return [list(curve.values())[-1] for curve in curves if curve]


def target_of(baseline: Group) -> float | None:
    """Mean of the final smoothed held-out reward over the baseline's runs; None without any."""
    rewards = finals(baseline)
    return float(np.mean(rewards)) if rewards else None


def parity(
    group: Group, baseline: Group, seconds: bool = False, target: float | None = None
) -> Parity | None:
    """Updates (or their seconds) to parity; None if there are too few evaluations.

    Parity is `target_of(baseline)`, unless another reward is given as `target`. Intervals are
    percentiles of a bootstrap over runs, of both groups for the ratio. In the ratio a baseline run
    that never reaches its group's mean counts with its last update, which favours the baseline.
    """
    target = target_of(baseline) if target is None else target
    if target is None:
        return None
    times = [_first_at(run, target, seconds) for run in group.runs if _curve(run)]
    if not times:
        return None
    median = float(np.median(times))
    baseline_times = [
        min(_first_at(run, target, seconds), _last(run, seconds))
        for run in baseline.runs
        if _curve(run)
    ]
    baseline_median = float(np.median(baseline_times))
    has_ratio = group is not baseline and baseline_median > 0
    low = high = ratio_low = ratio_high = None
    if len(times) > 1:
        draws = _medians(times, seed=0)
        low, high = _interval(draws)
        if has_ratio and len(baseline_times) > 1:
            baseline_draws = _medians(baseline_times, seed=1)
            ratio_low, ratio_high = _interval(draws / np.maximum(baseline_draws, 1e-12))
    ratio = median / baseline_median if has_ratio else None
    return Parity(times, median, low, high, ratio, ratio_low, ratio_high)


def _curve(run: Run) -> dict[int, float]:
    return smoothed(run.values("eval_score_mean"))


def _first_at(run: Run, target: float, seconds: bool) -> float:
    for update, value in _curve(run).items():
        if value >= target - 1e-9 * abs(target):
            return run.seconds()[update] if seconds else float(update)
    return math.inf


def _last(run: Run, seconds: bool) -> float:
    update = list(_curve(run))[-1]
    return run.seconds()[update] if seconds else float(update)


def _medians(values: Sequence[float], seed: int) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    drawn = x[np.random.default_rng(seed).integers(0, len(x), (_RESAMPLES, len(x)))]
    ordered = np.sort(drawn, axis=1)
    # the middle two of an even number are averaged; infinity stays infinity
    return (ordered[:, (len(x) - 1) // 2] + ordered[:, len(x) // 2]) / 2


def _interval(draws: np.ndarray) -> tuple[float, float]:
    """95% percentile interval of drawn values, not interpolated, as some are infinite."""
    ordered = np.sort(draws)
    count = len(ordered)
    return float(ordered[int(0.025 * count)]), float(ordered[math.ceil(0.975 * count) - 1])
