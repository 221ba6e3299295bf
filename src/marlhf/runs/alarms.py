"""Warning signs in the history of a run's metrics.

A rule is a pure function from rows of metrics (oldest first) to a message, or None. What to do
about each is in docs/metrics.md under the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from marlhf.common.errors import say
from marlhf.runs.json_lines import parse_line

History = Sequence[Mapping[str, Any]]
_WINDOW = 5  # updates to average a value over


def kl_runaway(history: History) -> str | None:
    """KL to the reference above 0.5 nats per token and growing while the reward rises."""
    kl, length, score = (
        _series(history, k) for k in ("kl_mean", "response_length_mean", "score_mean")
    )
    if min(map(len, (kl, length, score))) < 2 * _WINDOW:
        return None
    recent, earlier = _last(kl), _last(kl, skip=_WINDOW)
    per_token = recent / max(_last(length), 1.0)
    if per_token < 0.5 or recent < 1.2 * earlier or _last(score) <= _first(score):
        return None
    growth = f"{recent:.3g} nats per response ({per_token:.2f} per token)"
    return f"KL is {growth} and grows with the reward"


def value_not_learning(history: History) -> str | None:
    """A critic that predicts returns no better than a constant after 20 updates."""
    explained = _series(history, "explained_variance")
    if len(explained) < 20 or _last(explained, 10) > 0:
        return None
    return f"the critic explains none of the returns' variance ({_last(explained, 10):.2f})"


def clipping(history: History) -> str | None:
    """A clip fraction of at least 30%."""
    clipped = _series(history, "clip_fraction")
    if len(clipped) < _WINDOW or _last(clipped) < 0.3:
        return None
    return f"{_last(clipped):.0%} of the ratios are clipped: updates are too large"


def entropy_collapse(history: History) -> str | None:
    """Entropy at or below a fifth of its initial value."""
    entropy = _series(history, "entropy")
    if len(entropy) < 2 * _WINDOW or _first(entropy) <= 0:
        return None
    if _last(entropy) > 0.2 * _first(entropy):
        return None
    return f"entropy fell from {_first(entropy):.2f} to {_last(entropy):.2f} nats per token"


def length_exploitation(history: History) -> str | None:
    """Length that grew or shrank by half, and a score that correlates with that change."""
    length = _series(history, "response_length_mean")
    correlation = _series(history, "score_length_correlation")
    if min(len(length), len(correlation)) < 2 * _WINDOW:
        return None
    change, pays = _last(length) / max(_first(length), 1.0), _last(correlation)
    if not (change >= 1.5 and pays >= 0.5) and not (change <= 0.5 and pays <= -0.5):
        return None
    return (
        f"length went from {_first(length):.0f} to {_last(length):.0f} tokens, and score and "
        f"length correlate ({pays:+.2f}): length may be what is rewarded"
    )


def missing_eos(history: History) -> str | None:
    """Finished responses at most half as frequent as at first."""
    finished = _series(history, "eos_fraction")
    if len(finished) < 2 * _WINDOW or _first(finished) < 0.2:
        return None
    if _last(finished) > 0.5 * _first(finished):
        return None
    return f"finished responses fell from {_first(finished):.0%} to {_last(finished):.0%}"


def no_signal(history: History) -> str | None:
    """The same score for all responses of the last updates."""
    spread = _series(history, "score_std")
    if len(spread) < _WINDOW or max(spread[-_WINDOW:]) > 1e-6:
        return None
    return "all responses of the last updates have the same score: there is nothing to learn from"


def policy_stands_still(history: History) -> str | None:
    """A zero policy gradient in the last updates."""
    norms = _series(history, "grad_norm_policy")
    if len(norms) < _WINDOW or max(norms[-_WINDOW:]) > 0:
        return None
    return (
        "the policy's gradient was zero in the last updates: every advantage is 0, as whitening "
        "makes it where an update has a single macro action"
    )


def engine_gap(history: History) -> str | None:
    """Engine-to-policy KL above 0.15 nats per token, or five times its initial value.

    Updates compared are of the same `sampling_lag`, as older weights differ from the policy's.
    """
    lag = history[-1].get("sampling_lag") if history else None
    gaps = _series([row for row in history if row.get("sampling_lag") == lag], "engine_kl")
    if not gaps or gaps[-1] < 0.01 or gaps[-1] < min(0.15, 5 * gaps[0]):
        return None
    return (
        f"the engine samples from another distribution than the policy ({gaps[-1]:.2g} nats per "
        f"token, {gaps[0]:.2g} at first): its weights or dtype may not be the policy's"
    )


RULES: dict[str, Callable[[History], str | None]] = {
    rule.__name__: rule
    for rule in (
        kl_runaway,
        value_not_learning,
        clipping,
        entropy_collapse,
        length_exploitation,
        missing_eos,
        no_signal,
        policy_stands_still,
        engine_gap,
    )
}


def finite(value: Any) -> float | None:
    """`value` as a float where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def fired(history: History) -> dict[str, tuple[int, str]]:
    """Rule -> update at which it first fired in a full history, and its message."""
    first_fired: dict[str, tuple[int, str]] = {}
    for end in range(1, len(history) + 1):
        rows = _ends(history, end)
        for name, rule in RULES.items():
            if name not in first_fired and (message := rule(rows)):
                first_fired[name] = (int(history[end - 1].get("step", end)), message)
    return first_fired


class AlarmSink:
    """A metrics sink that warns on stderr when a rule first fires in a run.

    before   the metrics.jsonl of a run to resume
    """

    def __init__(self, before: Path) -> None:
        lines = before.read_bytes().split(b"\n") if before.is_file() else []
        rows = map(parse_line, lines)
        self._history: list[Mapping[str, Any]] = [row for row in rows if row is not None]
        self._fired = set(fired(self._history))

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row to the history and warn of rules that newly fire."""
        self._history = [*_ends([*self._history, row], len(self._history) + 1)]
        for name, rule in RULES.items():
            if name not in self._fired and (message := rule(self._history)):
                self._fired.add(name)
                say(
                    f"marlhf: warning at update {row['step']}: {message} "
                    f"({name}, see docs/metrics.md)"
                )

    def sync(self) -> None:
        """No-op."""

    def close(self) -> None:
        """No-op."""


def _ends(history: History, end: int) -> History:
    """The rows that rules read: the first 20 and the last 30 before `end`."""
    return history[:end] if end <= 50 else [*history[:20], *history[end - 30 : end]]


def _series(history: History, key: str) -> list[float]:
    """Finite values of a metric, oldest first."""
    values = (finite(row.get(key)) for row in history)
    return [value for value in values if value is not None]


def _last(values: Sequence[float], count: int = _WINDOW, skip: int = 0) -> float:
    chosen = values[len(values) - skip - count : len(values) - skip]
    return sum(chosen) / len(chosen)


def _first(values: Sequence[float]) -> float:
    return sum(values[:_WINDOW]) / _WINDOW
