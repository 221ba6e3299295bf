"""Laws of rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

from marlhf.common.registry import Spec
from marlhf.rewards import build_rewards
from marlhf.testing.segmenters import TEXTS


def check_reward(
    reward: Spec | Any,
    prompts: Sequence[str] | None = None,
    completions: Sequence[str] = (*TEXTS, TEXTS[0]),
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    deterministic: bool = True,
    tolerance: float = 1e-5,
) -> None:
    """Check the laws of a reward. Raises AssertionError, naming law and completion.

    contract     a finite number or None for each completion, arguments unchanged: what
                 `marlhf ppo` refuses by itself
    repetition   the same completions get the same rewards
    company      a completion has the same reward alone, and with others in another order

    prompts         of the completions; None: fixed ones, another for each
    columns         further columns of the data that the reward reads
    deterministic   whether the last two laws are claimed
    tolerance       difference of two rewards that counts as none, relative where they exceed 1
    """
    prompts = list(prompts or [f"Say {i} things." for i in range(len(completions))])
    rows = {name: list(values) for name, values in (columns or {}).items()}
    combined = build_rewards(reward)
    combined.check_columns(list(rows))

    def rewards_of(order: Sequence[int]) -> list[tuple[float | None, Any]]:
        picked = {name: [values[i] for i in order] for name, values in rows.items()}
        results = combined([prompts[i] for i in order], [completions[i] for i in order], picked)
        (values,) = results.by_name.values()
        return list(zip(values, results.spans, strict=True))

    every = list(range(len(completions)))
    first = rewards_of(every)
    if not deterministic:
        return

    def compare(actual: Sequence[Any], order: Sequence[int], law: str) -> None:
        for i, now in zip(order, actual, strict=True):
            assert _equal(now, first[i], tolerance), (
                f"{law}: the reward of {completions[i]!r} is {now[0]}, was {first[i][0]}"
            )

    compare(rewards_of(every), every, "repetition: the same completions again")
    compare(rewards_of(every[::-1]), every[::-1], "company: the completions from last to first")
    for i in every:
        compare(rewards_of([i]), [i], "company: a completion alone")


def _equal(one: Any, other: Any, tolerance: float) -> bool:
    (x, spans), (y, others) = one, other
    if x is None or y is None:
        return x is y
    ends = [end for end, _ in spans] == [end for end, _ in others]
    pairs = [(x, y), *((a, b) for (_, a), (_, b) in zip(spans, others, strict=False))]
    return ends and all(isclose(a, b, rel_tol=tolerance, abs_tol=tolerance) for a, b in pairs)
