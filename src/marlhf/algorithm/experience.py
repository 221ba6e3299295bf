"""From a scored rollout and its macro actions to the experience of an update.

    starts -> segment ids -> reduce -> GAE -> whiten -> expand

Pure functions on tensors; every formula is in `macro` and `advantages`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from marlhf.algorithm.advantages import gae, group_relative, whiten
from marlhf.algorithm.macro import (
    discounts,
    expand,
    macro_lengths,
    macro_mask,
    reduce,
    segment_ids,
)
from marlhf.common.types import AllReduceSum, kept_columns
from marlhf.config import MacroSettings, PPOSettings


@dataclass(frozen=True)
class TokenData:
    """Per-token data of a rollout, before macro actions.

    response_mask   [B,T] bool
    kl_rewards      [B,T] -kl_coef * (logprobs - ref_logprobs); zeros when KL is in the loss
    task_rewards    [B,T] scores on last tokens, and rewards inside responses
    values          [B,T], None without a critic
    last_values     [B] value after the last token, None without a critic
    finished        [B] bool: not cut at the length limit
    """

    response_mask: Tensor
    kl_rewards: Tensor
    task_rewards: Tensor
    values: Tensor | None
    last_values: Tensor | None
    finished: Tensor


@dataclass(frozen=True)
class MacroBatch:
    """Advantages and returns per macro action (BM) and per token (BT).

    advantages_BT   whitened if configured; the same for all tokens of a macro action
    returns_BM      targets of the values, None without a critic
    values_BM       values of the macro actions at sampling, None without a critic
    """

    segment_ids: Tensor
    mask_BM: Tensor
    lengths_BM: Tensor
    advantages_BM: Tensor
    advantages_BT: Tensor
    returns_BM: Tensor | None
    returns_BT: Tensor | None
    values_BM: Tensor | None


def macro_batch(
    starts: Tensor,
    tokens: TokenData,
    macro: MacroSettings,
    ppo: PPOSettings,
    group_size: int = 1,
    all_reduce: AllReduceSum = lambda x: x,
) -> MacroBatch:
    """The core of the library: `starts [B,T]` and token rewards -> macro advantages.

    group_size   consecutive responses to one prompt, for estimators that compare them
    all_reduce   sums over ranks, for whitening
    """
    mask = tokens.response_mask
    ids = segment_ids(starts, mask)
    mask_BM = macro_mask(ids)
    rewards_BM = macro_rewards(tokens, ids, macro, ppo.gamma)

    values_BM = returns_BM = returns_BT = None
    if ppo.estimator == "gae":
        assert tokens.values is not None
        assert tokens.last_values is not None
        values_BM = reduce(tokens.values, ids, macro.value)
        bootstrap = None
        if ppo.bootstrap_truncated:
            cut = ~tokens.finished
            bootstrap = torch.where(cut, tokens.last_values, torch.zeros_like(tokens.last_values))
        advantages_BM, returns_BM = gae(
            rewards_BM,
            values_BM,
            mask_BM,
            discounts(ids, ppo.gamma, macro.discount),
            ppo.lam,
            bootstrap,
        )
        returns_BT = expand(returns_BM, ids)
    else:
        returns_B = (tokens.kl_rewards + tokens.task_rewards).where(mask, 0.0).sum(1)
        relative_B = group_relative(returns_B, group_size, ppo.estimator, all_reduce)
        advantages_BM = torch.where(mask_BM, relative_B[:, None], torch.zeros_like(rewards_BM))

    lengths_BM = macro_lengths(ids)
    how = macro.whiten if macro.whiten != "auto" else "macro" if ppo.estimator == "gae" else "none"
    if how != "none":
        weights = mask_BM if how == "macro" else lengths_BM
        advantages_BM = whiten(advantages_BM, weights, all_reduce)
    advantages_BT = expand(advantages_BM, ids)
    return MacroBatch(
        ids, mask_BM, lengths_BM, advantages_BM, advantages_BT, returns_BM, returns_BT, values_BM
    )


def macro_rewards(tokens: TokenData, ids: Tensor, macro: MacroSettings, gamma: float) -> Tensor:
    """Reward of each macro action, [B,M].

    sum    the discounted sum of its tokens' rewards
    mean   its KL rewards averaged like its values, plus the sum of its task rewards (the paper's
           released code)
    """
    if macro.reward == "sum":
        return reduce(tokens.kl_rewards + tokens.task_rewards, ids, "sum", gamma)
    return reduce(tokens.kl_rewards, ids, macro.value) + reduce(tokens.task_rewards, ids, "sum")


@dataclass(frozen=True)
class Experience:
    """Sequences of a rollout, with all tensors that the losses need.

    input_ids, attention_mask [B,P+T]; the others [B,T]. None without a reference, or without a
    critic.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    segment_ids: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    values: Tensor | None
    returns: Tensor | None

    def __len__(self) -> int:
        return len(self.response_mask)

    def rows(self, index: Tensor) -> Experience:
        """The sequences at `index`, without columns that are padding in all of them."""
        whole, response = kept_columns(self.attention_mask[index], self.response_mask[index])
        columns = {"input_ids": whole, "attention_mask": whole}
        picked: dict[str, Any] = {}
        for field in fields(self):
            x = getattr(self, field.name)
            picked[field.name] = (
                None if x is None else x[index][:, columns.get(field.name, response)]
            )
        return Experience(**picked)

    def counts(self) -> Tensor:
        """Numbers of response tokens and of macro actions, float64 [2]."""
        tokens, macro_actions = self.response_mask.sum(), macro_mask(self.segment_ids).sum()
        return torch.stack([tokens, macro_actions]).double()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, None left out."""
        return {name: x for name, x in vars(self).items() if x is not None}


def explained_variance(
    returns: Tensor, values: Tensor, mask: Tensor, all_reduce: AllReduceSum = lambda x: x
) -> float | None:
    """1 - Var(returns - values) / Var(returns) over all ranks; None where returns do not vary."""
    y, error = returns[mask].double(), (returns - values)[mask].double()
    one = torch.ones_like(y)
    moments = torch.stack([z.sum() for z in (one, y, y**2, error, error**2)])
    n, y1, y2, e1, e2 = all_reduce(moments).tolist()
    variance = y2 / n - (y1 / n) ** 2 if n else 0.0
    if variance <= 1e-12:
        return None
    return 1 - (e2 / n - (e1 / n) ** 2) / variance
