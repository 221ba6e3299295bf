"""Rewards of a rollout: their data columns, and scores as rewards per token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from marlhf.algorithm.advantages import whiten
from marlhf.algorithm.experience import Rollout
from marlhf.common.errors import UserError, one_line
from marlhf.common.plugins import plugin_call
from marlhf.common.types import AllReduceSum, Generation
from marlhf.config import RewardSettings
from marlhf.data.prompts import Prompt, kinds_of, survey_of
from marlhf.distributed import Distributed
from marlhf.rewards import CombinedReward, CombinedTokenReward
from marlhf.runs.metrics import Metrics

_MESSAGES = "messages"  # the column with conversations, for rewards


def check_rewards(reward: CombinedReward, sets: Sequence[Sequence[Prompt]]) -> None:
    """Check that prompts have the columns that rewards need, before any model is loaded.

    A reward with a method `check_values(**columns)` checks the values of all sets too. Raises
    UserError.
    """
    surveys = [survey_of(prompts) for prompts in sets]
    names = dict.fromkeys(name for survey in surveys for name in survey["columns"])
    chats = any(prompt.messages is not None for prompt in kinds_of(*sets))
    present = [*(name for name in names if name != _MESSAGES), *([_MESSAGES] if chats else [])]
    reward.check_columns(present)
    columns = {name: _Column(sets, name) for name in present}
    for named in reward.rewards:
        check = getattr(named.function, "check_values", None)
        if callable(check):
            with plugin_call(f"reward {named.name}: check_values"):
                try:
                    check(**columns)
                except (TypeError, ValueError) as error:
                    raise UserError(f"reward {named.name}: {one_line(error)}") from error


class _Column(Sequence[Any]):
    """A lazy view of one column of all prompts."""

    def __init__(self, sets: Sequence[Sequence[Prompt]], name: str) -> None:
        self._sets, self._name = sets, name

    def __len__(self) -> int:
        return sum(map(len, self._sets))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        for prompts in self._sets:
            if index < len(prompts):
                return self._value(prompts[index])
            index -= len(prompts)
        raise AssertionError

    def __iter__(self) -> Iterator[Any]:
        return (self._value(prompt) for prompts in self._sets for prompt in prompts)

    def _value(self, prompt: Prompt) -> Any:
        return prompt.messages if self._name == _MESSAGES else prompt.columns.get(self._name)


def reward_columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The prompts' other columns as lists, and `messages` where prompts are conversations.

    A data column named `messages` is omitted: rewards would mistake it for the prompt.
    """
    names = dict.fromkeys(n for p in prompts for n in p.columns if n != _MESSAGES)
    columns: dict[str, list[Any]] = {n: [p.columns.get(n) for p in prompts] for n in names}
    if any(p.messages is not None for p in prompts):
        columns[_MESSAGES] = [p.messages for p in prompts]
    return columns


def score_to_rewards(
    scores: Tensor, generation: Generation, settings: RewardSettings, all_reduce: AllReduceSum
) -> Tensor:
    """Scores [B] -> rewards [B,T], non-zero on the last response token alone.

    Scores are clipped, penalised for a missing EOS and whitened, as configured. The score of an
    empty response is dropped.
    """
    scores = scores.to(generation.response_ids.device)
    if settings.clip is not None:
        scores = scores.clamp(-settings.clip, settings.clip)
    scores = scores - settings.missing_eos_penalty * (~generation.finished).to(scores.dtype)
    if settings.whiten:
        scores = whiten(scores, torch.ones_like(scores), all_reduce)
    positions = torch.arange(generation.response_ids.shape[1], device=scores.device)
    is_last = positions == generation.lengths[:, None] - 1
    return torch.where(is_last, scores[:, None], torch.zeros_like(scores)[:, None])


def add_token_rewards(
    rollout: Rollout, reward: CombinedTokenReward, distributed: Distributed, metrics: Metrics
) -> Rollout:
    """Add token rewards to `task_rewards` and drop `extras`.

    Then update the token rewards and log their metrics.
    """
    if not reward.rewards:
        return rollout
    rewards, by_name = distributed.fail_together(lambda: reward(rollout))
    for name, values in by_name.items():
        metrics.mean(f"reward_{name}_mean", values)
    for named in reward.rewards:
        label = f"token reward {named.name}"
        learned = distributed.reduce_together(label, partial(named.update, rollout))
        learned = {f"{named.name}_{metric}": value for metric, value in learned.items()}
        metrics.add_foreign(learned, label)
    return replace(rollout, task_rewards=rollout.task_rewards + rewards, extras={})
