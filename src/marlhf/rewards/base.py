"""The reward contract, and the weighted sum of several rewards.

A reward is any callable

    reward(prompts: list[str], completions: list[str], **columns) -> list

with one entry per row: a number, None ("not applicable to this row"), or a list of
`(end_char, number)` pairs, rewards inside the response that land on the token that writes the
response's character `end_char - 1`. `columns` holds the dataset's other columns, each a list with
one entry per row; a callable without `**kwargs` gets only the columns that its signature names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from marlhf.common.errors import UserError
from marlhf.common.plugins import plugin_call
from marlhf.common.types import RewardResult
from marlhf.distributed import Placement
from marlhf.rewards.calls import (
    Columns,
    PlacedRewards,
    RewardError,
    RewardFn,
    check_signature,
    evaluate,
    is_finite,
    needed_columns,
    text_parameters,
)


@runtime_checkable
class Placeable(Protocol):
    """A reward whose model is loaded once for all ranks, and may be sharded."""

    def use_placement(self, placement: Placement) -> None:
        """Load the model by `placement`, on all ranks together."""


@dataclass(frozen=True)
class NamedReward:
    """A reward, its weight, and its name in messages and metrics."""

    name: str
    function: RewardFn
    weight: float = 1.0


@dataclass(frozen=True)
class CombinedReward:
    """A weighted sum of rewards.

    A response to which no reward applies (all return None) scores 0.0 and does not stop the run:
    mixtures of datasets have such rows. `RewardResult.unscored` lists them.
    """

    rewards: tuple[NamedReward, ...]

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Columns | None = None
    ) -> RewardResult:
        """Score B responses.

        Raises RewardError where a reward raises or returns an invalid value, and UserError where
        it needs a missing column.
        """
        prompts, completions, columns = list(prompts), list(completions), dict(columns or {})
        self.check_columns(columns)
        scores = [0.0] * len(prompts)
        spans: list[PlacedRewards] = [[] for _ in prompts]
        by_name: dict[str, list[float | None]] = {}
        for reward in self.rewards:
            values = evaluate(reward.name, reward.function, prompts, completions, columns)
            by_name[reward.name] = [_total(value) for value in values]
            for row, value in enumerate(values):
                if isinstance(value, list):
                    spans[row] += [(end, reward.weight * x) for end, x in value]
                elif value is not None:
                    scores[row] += reward.weight * value
        for row, score in enumerate(scores):
            if not is_finite(score):
                raise RewardError(
                    f"reward: row {row}: the weighted sum is {score:g}, must be finite"
                )
        return RewardResult(scores, spans, by_name)

    def check_columns(self, available: Iterable[str]) -> None:
        """Check that rewards' parameters fit the texts and the data's columns.

        Raises UserError for a missing column, for a column named like the parameter that receives
        prompts or completions, and for a reward that no call fits.
        """
        available = sorted(available)
        for reward in self.rewards:
            for column in text_parameters(reward.function):
                if column in available:
                    raise UserError(
                        f"reward {reward.name}: its parameter {column!r} is given prompts or "
                        f"completions, but the data has a column {column!r} too; call the two "
                        "`prompts` and `completions`"
                    )
            for column in needed_columns(reward.function):
                if column not in available:
                    raise UserError(
                        f"reward {reward.name}: needs the column {column!r}; the data's other "
                        f"columns are {', '.join(available) or 'none'}"
                    )
            check_signature(reward.name, reward.function, available)

    def load(self, placement: Placement | None = None) -> CombinedReward:
        """Load every model now rather than at first use. Raises UserError.

        placement   where models live, of rewards that are `Placeable`
        """
        for reward in self.rewards:
            if placement is not None and isinstance(reward.function, Placeable):
                reward.function.use_placement(placement)
            with plugin_call(f"reward {reward.name}"):
                if callable(load := getattr(reward.function, "load", None)):
                    try:
                        load()
                    except UserError as error:
                        raise UserError(f"reward {reward.name}: {error}") from error
        return self

    def share_base(self, policy: Any, base: str) -> None:
        """Share the policy's frozen base with reward models that are adapters of it.

        policy   a PEFT model around the base, or any other model
        base     path that the base was loaded from
        """
        for reward in self.rewards:
            if callable(share_base := getattr(reward.function, "share_base", None)):
                share_base(policy, base)

    def to(self, device: Any) -> CombinedReward:
        """Move every reward that runs a model to `device`."""
        for reward in self.rewards:
            with plugin_call(f"reward {reward.name}"):
                if callable(to := getattr(reward.function, "to", None)):
                    to(device)
        return self


def _total(value: float | PlacedRewards | None) -> float | None:
    return sum((x for _, x in value), 0.0) if isinstance(value, list) else value
