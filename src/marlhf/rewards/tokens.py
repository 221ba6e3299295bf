"""Per-token rewards from the policy's internals: the second reward contract.

A `TokenReward` is called with a rollout and returns a reward per token. `requires` names the
outputs of the policy's log-prob pass that it reads. It may learn from every rollout, and its state
is saved in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from marlhf.algorithm.experience import Rollout
from marlhf.common.errors import UserError, short_repr
from marlhf.common.plugins import copied, numbers, plugin_call, requirements, unchanged
from marlhf.common.registry import Registry, check_call, construct, plugin_name, split_spec
from marlhf.common.types import REF_LOGPROBS, AllReduceSum
from marlhf.rewards.building import free_name, is_pair, weight_of
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

    def __call__(self, rollout: Rollout) -> Tensor:
        """Rewards [B,T] of a `Rollout`; values outside the mask are ignored. Must not modify it."""
        raise NotImplementedError

    def update(self, rollout: Rollout, all_reduce: AllReduceSum) -> dict[str, float]:
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

    def update(self, rollout: Rollout, all_reduce: AllReduceSum) -> dict[str, float]:
        """Update the token reward; return its metrics. Raises RewardError."""
        with _protected(self, rollout) as rollout_copy:
            return numbers(self.reward.update(rollout_copy, all_reduce))


@dataclass(frozen=True)
class CombinedTokenReward:
    """A weighted sum of token rewards; zeros if there are none."""

    rewards: tuple[NamedTokenReward, ...] = ()

    @property
    def requires(self) -> frozenset[str]:
        """Union of their requirements."""
        return frozenset().union(*(named.reward.requires for named in self.rewards))

    def __call__(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """`(rewards [B,T], unweighted sum over each response [B] by name)`.

        Raises RewardError where one raises or returns an invalid value.
        """
        mask = rollout.responses.response_mask
        total, by_name = torch.zeros(mask.shape, device=mask.device), {}
        for named in self.rewards:
            with _protected(named, rollout) as rollout_copy:
                rewards = _checked(named.reward(rollout_copy), mask)
            total = total + named.weight * rewards
            by_name[named.name] = rewards.sum(1)
        return total, by_name

    def to(self, device: Any) -> CombinedTokenReward:
        """Move all to `device`."""
        for named in self.rewards:
            with plugin_call(f"token reward {named.name}"):
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
    for named in map(_build, specs):
        name = free_name(named.name, [*taken, *(r.name for r in rewards)])
        rewards.append(NamedTokenReward(name, named.reward, named.weight))
    return CombinedTokenReward(tuple(rewards))


def _build(spec: Any) -> NamedTokenReward:
    if is_pair(spec):
        named, weight = _build(spec[0]), weight_of(spec[1])
        return NamedTokenReward(named.name, named.reward, named.weight * weight)
    weight, name, reward = 1.0, plugin_name(spec), spec
    if isinstance(spec, str | dict):
        name, arguments = split_spec(spec, "token reward")
        weight = weight_of(arguments.pop("weight", 1.0))
        reward = TOKEN_REWARDS.find(name)
        if isinstance(reward, type) and issubclass(reward, TokenReward):
            reward = construct(reward, arguments, f"token reward {name}")
        name = name.rpartition(".")[2]
    if not isinstance(reward, TokenReward):
        raise UserError(
            f"token reward {name}: given {short_repr(reward)}, must be a subclass of "
            "marlhf.rewards.TokenReward, or an object of one"
        )
    requirements(reward, f"token reward {name}", EXTRAS | REF_LOGPROBS, REF_LOGPROBS)
    if type(reward).__call__ is TokenReward.__call__:
        raise UserError(f"token reward {name}: must have a method __call__(self, rollout)")
    check_call(reward, f"token reward {name}", ["rollout"])
    return NamedTokenReward(name, reward, weight)


@contextmanager
def _protected(named: NamedTokenReward, rollout: Rollout) -> Iterator[Rollout]:
    """Yield a copy of the rollout for a call, and turn faults into a RewardError.

    The extras are not copied, as hidden states are large, but must not be modified.
    """
    name, tokenizer = f"token reward {named.name}", rollout.responses.tokenizer
    extras = {f"rollout.extras[{key!r}]": x for key, x in rollout.extras.items()}
    with plugin_call(name, RewardError):
        rollout_copy = replace(copied(replace(rollout, extras={})), extras=dict(rollout.extras))
        with unchanged(name, RewardError, tokenizer, extras):
            yield rollout_copy


def _checked(rewards: Any, mask: Tensor) -> Tensor:
    """Float32 rewards under the mask, zeros elsewhere. Raises TypeError or ValueError."""
    if not isinstance(rewards, Tensor) or not rewards.is_floating_point():
        raise TypeError("must return a tensor of floats")
    if rewards.shape != mask.shape:
        raise ValueError(
            f"returned the shape {list(rewards.shape)}, must be [B,T] = {list(mask.shape)}"
        )
    rewards = torch.where(mask, rewards.detach().float().to(mask.device), 0.0)
    if not rewards.isfinite().all():
        row = int((~rewards.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"returned rewards for row {row} that are not finite")
    return rewards
