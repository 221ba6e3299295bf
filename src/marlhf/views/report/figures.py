"""Groups of runs -> the charts of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from marlhf.views.charts import Curve, LineChart
from marlhf.views.report.groups import Group, Mean
from marlhf.views.report.runs import Run

_LONGEST = 2**20  # tokens per macro action; larger values are no real data
_POINTS = 120  # per line; more would be slow to draw and not visible

SECTIONS = {
    "Reward, KL and responses": {
        "eval_score_mean": "Reward, held-out prompts",
        "score_mean": "Reward, training batch",
        "eval_kl_mean": "KL to the reference, held-out (nats)",
        "kl_mean": "KL to the reference, training (nats)",
        "objective_mean": "Reward less KL penalty",
        "entropy": "Entropy of the policy (nats per token)",
        "response_length_mean": "Response length (tokens)",
        "eos_fraction": "Finished responses (share)",
    },
    "Learning": {
        "loss": "Loss",
        "eval_loss": "Loss, held-out",
        "accuracy": "Accuracy",
        "eval_accuracy": "Accuracy, held-out",
        "policy_loss": "Policy loss",
        "value_loss": "Value loss",
        "explained_variance": "Explained variance of the returns",
        "clip_fraction": "Clipped ratios (share)",
        "approx_kl": "KL of the update (nats per token)",
        "ratio_max": "Largest ratio",
        "engine_kl": "KL from engine to policy (nats per token)",
        "grad_norm_policy": "Gradient norm, policy",
        "grad_norm_value": "Gradient norm, critic",
        "learning_rate": "Learning rate",
    },
    "Macro actions": {
        "macro_length_mean": "Tokens per macro action",
        "macro_count_mean": "Macro actions per response",
    },
    "Time and memory": {
        "step_seconds": "Seconds per update",
        "generate_seconds": "Seconds generating",
        "score_seconds": "Seconds scoring",
        "segment_seconds": "Seconds segmenting",
        "train_seconds": "Seconds training",
        "tokens_per_second": "Tokens per second",
        "peak_memory_gb": "Peak memory (GB)",
    },
}
_NEVER_NEGATIVE = ("_seconds", "_length_mean", "_count_mean", "_fraction", "_per_second", "_gb")
_NAMED = {key for section in SECTIONS.values() for key in section}


@dataclass(frozen=True)
class Figure:
    """One metric, against updates and against seconds. `name` is its PNG's name."""

    name: str
    title: str
    by_update: LineChart
    by_seconds: LineChart


def sections(groups: Sequence[Group]) -> dict[str, list[Figure]]:
    """Charts of all metrics that some run has, by section, without empty sections."""
    present = set().union(*(run.keys() for group in groups for run in group.runs))
    unnamed = {key: key for key in sorted(present - _NAMED)}
    by_section = {
        title: [figure(groups, key, name) for key, name in metrics.items() if key in present]
        for title, metrics in {**SECTIONS, "Other metrics": unnamed}.items()
    }
    return {title: figures for title, figures in by_section.items() if figures}


def figure(groups: Sequence[Group], key: str, title: str) -> Figure:
    """Means over the runs of each group, with a 95% band where there are several."""
    is_evaluation = key.startswith("eval_")
    charts = [
        LineChart(
            title,
            label,
            [mean_line(group, key, seconds) for group in groups],
            dots=is_evaluation,
            from_zero=_never_negative(key) or key.endswith("kl_mean"),  # a small wiggle looks small
        )
        for label, seconds in (("update", False), ("seconds of updates", True))
    ]
    return Figure(key, title, *charts)


def mean_line(group: Group, key: str, seconds: bool = False) -> Curve:
    """A group's mean of a metric at each update where some run has it.

    A long run has at most _POINTS points, means over neighbouring updates, except for evaluations.
    """
    curves = [_curve(run, key) for run in group.runs]
    clocks = [run.seconds() for run in group.runs]
    x, y, low, high = [], [], [], []
    for update in sorted(set().union(*curves)):
        mean = Mean.of(curve[update] for curve in curves if update in curve)
        assert mean is not None
        pairs = zip(clocks, curves, strict=True)
        times = [clock[update] for clock, curve in pairs if update in curve]
        x.append(float(np.mean(times)) if seconds else float(update))
        y.append(mean.value)
        bottom = mean.value - (mean.half or 0.0)
        low.append(max(bottom, 0.0) if _never_negative(key) else bottom)
        high.append(mean.value + (mean.half or 0.0))
    banded = low != high
    return Curve(group.label, group.index, x, y, low if banded else None, high if banded else None)


def _never_negative(key: str) -> bool:
    """Whether a metric cannot be negative; `reward_length_mean`, a reward, can."""
    return key.endswith(_NEVER_NEGATIVE) and not key.startswith("reward_")


def _curve(run: Run, key: str) -> dict[int, float]:
    """A metric by update; in a long run, means over bins of neighbouring updates."""
    values = run.values(key)
    width = -(-run.last_update // _POINTS)
    if width <= 1 or key.startswith("eval_"):
        return values
    bins: dict[int, list[float]] = {}
    ends: dict[int, int] = {}
    for row in run.rows:
        ends[(row["step"] - 1) // width] = row["step"]
    for update, value in values.items():
        bins.setdefault((update - 1) // width, []).append(value)
    return {ends[i]: float(np.mean(chunk)) for i, chunk in bins.items()}


def frontier(groups: Sequence[Group]) -> LineChart | None:
    """Reward against KL during training, as means over runs. None if no run has both.

    Uses held-out evaluations if there are any, else training batches.
    """
    for title, prefix in (("Reward, held-out prompts", "eval_"), ("Reward, training batch", "")):
        lines = [_path(group, f"{prefix}kl_mean", f"{prefix}score_mean") for group in groups]
        if any(line.x for line in lines):
            return LineChart(title, "KL to the reference (nats per response)", lines, dots=True)
    return None


def _path(group: Group, kl: str, score: str) -> Curve:
    by_kl, by_score = mean_line(group, kl), mean_line(group, score)
    kls, scores = (dict(zip(line.x, line.y, strict=True)) for line in (by_kl, by_score))
    updates = sorted(kls.keys() & scores.keys())
    if len(updates) > 24:
        updates = [updates[i] for i in np.linspace(0, len(updates) - 1, 24).round().astype(int)]
    return Curve(group.label, group.index, [kls[u] for u in updates], [scores[u] for u in updates])


def macro_lengths(group: Group) -> tuple[Counter[int], int]:
    """Counts of macro actions by length in a group's samples, and the number of responses."""
    lengths: Counter[int] = Counter()
    responses = 0
    for sample in (sample for run in group.runs for sample in run.samples):
        sample_lengths = sample.get("macro_lengths")
        if isinstance(sample_lengths, list) and all(
            isinstance(n, int) and 0 < n < _LONGEST for n in sample_lengths
        ):
            lengths.update(sample_lengths)
            responses += 1
    return lengths, responses


def final(group: Group, key: str) -> Mean | None:
    """Mean over runs of the last value of a metric."""
    curves = [run.values(key) for run in group.runs]
    return Mean.of(list(curve.values())[-1] for curve in curves if curve)


def total_seconds(run: Run) -> float:
    """Seconds of all updates."""
    return max(run.seconds().values(), default=0.0)
