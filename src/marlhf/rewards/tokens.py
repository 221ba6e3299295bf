"""Per-token rewards from the policy's internals: the second reward contract.

A `TokenReward` is called with a rollout and returns a reward per token. It declares what it
`requires` of the policy's log-prob pass, may learn from every rollout, and has a state that is
saved in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from marlhf.common.errors import UserError, shown
from marlhf.common.plugins import called, copied, names_required, numbers, unchanged
from marlhf.common.registry import Registry, construct, split_spec
from marlhf.common.types import REF_LOGPROBS, AllReduceSum
from marlhf.rewards.base import free_name, is_pair, weight_of
from marlhf.rewards.calls import RewardError

EXTRAS = frozenset({"hidden_states", "token_embeddings", "token_ranks"})

TOKEN_REWARDS = Registry(
    kind="token reward",
    group="marlhf.token_rewards",
    factories={"curiosity": "marlhf.rewards.curiosity.Curiosity"},
)


class TokenReward:
    """A reward per token of a rollout. Subclasses define `__call__`; the rest is optional.

    requires   names out of EXTRAS, which `rollout.extras` then holds (see `models.Policy.forward`),
               and `ref_logprobs`, which `rollout.responses` then has: a run whose `kl.coef` is 0
               omits them where nothing requires them. Default: `ref_logprobs`.
    """

    requires: ClassVar[frozenset[str]] = REF_LOGPROBS

    def __call__(self, rollout: Any) -> Tensor:
        """Rewards [B,T] of a `Rollout`; values outside the mask are ignored. Must not modify it."""
        raise NotImplementedError

    def update(self, rollout: Any, all_reduce: AllReduceSum) -> dict[str, float]:
        """Learn from the rollout just rewarded; return metrics, equal on every rank.

        all_reduce sums a tensor over ranks: with it, two ranks should learn the same as one.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State changed by `update`, as plain data and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict()`."""

    def to(self, device: Any) -> None:
        """Compute on `device` from now on."""


@dataclass(frozen=True)
class NamedTokenReward:
    """A token reward, its weight, and its name in messages and metrics."""

    name: str
    reward: TokenReward
    weight: float = 1.0


@dataclass(frozen=True)
class CombinedTokenReward:
    """A weighted sum of token rewards; zeros if there are none."""

    rewards: tuple[NamedTokenReward, ...] = ()

    @property
    def requires(self) -> frozenset[str]:
        """Union of their requirements."""
        return frozenset().union(*(named.reward.requires for named in self.rewards))

    def __call__(self, rollout: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """`(rewards [B,T], unweighted sum over each response [B] by name)`.

        Raises RewardError where one raises or returns an invalid value.
        """
        mask = rollout.responses.response_mask
        total, by_name = torch.zeros(mask.shape, device=mask.device), {}
        for named in self.rewards:
            with _handed(named, rollout) as own:
                rewards = _checked(named.reward(own), mask)
            total = total + named.weight * rewards
            by_name[named.name] = rewards.sum(1)
        return total, by_name

    def update(self, rollout: Any, all_reduce: AllReduceSum) -> dict[str, dict[str, float]]:
        """Update every token reward; return their metrics by name. Raises RewardError."""
        metrics: dict[str, dict[str, float]] = {}
        for named in self.rewards:
            with _handed(named, rollout) as own:
                metrics[named.name] = numbers(named.reward.update(own, all_reduce))
        return metrics

    def to(self, device: Any) -> CombinedTokenReward:
        """Move all to `device`."""
        for named in self.rewards:
            with called(f"token reward {named.name}"):
                named.reward.to(device)
        return self


def build_token_rewards(spec: Any, taken: Sequence[str] = ()) -> CombinedTokenReward:
    """Build token rewards from a configuration's `reward.tokens`, or from Python objects.

    spec: a name, an import path, a mapping with `name`, arguments and `weight`, a TokenReward, a
    `(token reward, weight)` pair, or a list of these. taken: names of other rewards, to be avoided
    because metrics of one name would be added up. Raises UserError.
    """
    specs = [spec] if not isinstance(spec, list | tuple) or is_pair(spec) else list(spec)
    rewards: list[NamedTokenReward] = []
    for each in specs:
        named = _build(each)
        name = free_name(named.name, [*taken, *(r.name for r in rewards)])
        rewards.append(NamedTokenReward(name, named.reward, named.weight))
    return CombinedTokenReward(tuple(rewards))


def _build(spec: Any) -> NamedTokenReward:
    if is_pair(spec):
        inner = _build(spec[0])
        return NamedTokenReward(inner.name, inner.reward, inner.weight * weight_of(spec[1]))
    weight, name, found = 1.0, getattr(spec, "__name__", type(spec).__name__), spec
    if isinstance(spec, str | dict):
        name, arguments = split_spec(spec, "token reward")
        weight = weight_of(arguments.pop("weight", 1.0))
        found = TOKEN_REWARDS.find(name)
        if isinstance(found, type) and issubclass(found, TokenReward):
            found = construct(found, arguments, f"token reward {name}")
        name = name.rpartition(".")[2]
    if not isinstance(found, TokenReward):
        raise UserError(
            f"token reward {name}: given {shown(found)}, must be a subclass of "
            "marlhf.rewards.TokenReward, or an object of one"
        )
    try:
        names_required(found.requires, EXTRAS | REF_LOGPROBS)
    except UserError as error:
        raise UserError(f"token reward {name}: {error}") from None
    return NamedTokenReward(name, found, weight)


@contextmanager
def _handed(named: NamedTokenReward, rollout: Any) -> Iterator[Any]:
    """Context of a call: yields a copy of the rollout, and turns faults into a RewardError.

    The extras are not copied, as hidden states are large, but must not be modified.
    """
    name, tokenizer = f"token reward {named.name}", rollout.responses.tokenizer
    extras = {f"rollout.extras[{key!r}]": x for key, x in rollout.extras.items()}
    with called(name, RewardError):
        own = replace(copied(replace(rollout, extras={})), extras=dict(rollout.extras))
        with unchanged(name, RewardError, tokenizer, extras):
            yield own


def _checked(rewards: Any, mask: Tensor) -> Tensor:
    """Float32 rewards under the mask, zeros elsewhere. Raises TypeError or ValueError."""
    if not isinstance(rewards, Tensor) or not rewards.is_floating_point():
        raise TypeError("must return a tensor of floats")
    if rewards.shape != mask.shape:
        given, wanted = list(rewards.shape), list(mask.shape)
        raise ValueError(f"returned the shape {given}, must be [B,T] = {wanted}")
    rewards = torch.where(mask, rewards.detach().float().to(mask.device), 0.0)
    if not rewards.isfinite().all():
        row = int((~rewards.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"returned rewards for row {row} that are not finite")
    return rewards
