"""From a scored rollout and its macro actions to the experience of an update.

    starts -> segment ids -> reduce -> estimator -> whiten -> expand

Every formula is in `macro`, `advantages` and `estimators`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marlhf.algorithm.advantages import whiten
from marlhf.algorithm.estimators import (
    CreditInputs,
    Estimator,
    build_estimator,
    estimate_credit,
    estimator_requires,
)
from marlhf.algorithm.importance import importance_weights
from marlhf.algorithm.lambdas import build_lambdas, macro_lambdas
from marlhf.algorithm.losses import Ratio
from marlhf.algorithm.macro import (
    discounts,
    expand,
    macro_lengths,
    macro_mask,
    reduce,
    segment_ids,
)
from marlhf.common.types import (
    AllReduceSum,
    Generation,
    ResponseBatch,
    RewardResult,
    Sequences,
    kept_columns,
)
from marlhf.config import MacroSettings, PPOSettings, RolloutSettings


@dataclass(frozen=True)
class TokenData:
    """Per-token data of a rollout, before macro actions.

    response_mask   [B,T] bool
    kl_rewards      [B,T] -kl_coef * (logprobs - ref_logprobs); zeros when KL is in the loss
    task_rewards    [B,T] scores on last tokens, and rewards inside responses
    values          [B,T], None without a critic
    last_values     [B] value after the last token, None without a critic
    finished        [B] bool: by EOS or a stop string, not truncated at the length limit
    token_ids       [B,T] of the responses; None where no estimator reads them
    continuation_values   [B,T] mean return of continuations from a token on, NaN where none were
                    sampled; None where no estimator reads them
    """

    response_mask: Tensor
    kl_rewards: Tensor
    task_rewards: Tensor
    values: Tensor | None
    last_values: Tensor | None
    finished: Tensor
    token_ids: Tensor | None = None
    continuation_values: Tensor | None = None


@dataclass(frozen=True)
class MacroBatch:
    """Advantages and returns per macro action (BM) and per token (BT).

    advantages_BT   whitened if configured; the same for all tokens of a macro action
    returns_BM      targets of the values, None without a critic
    values_BM       values of the macro actions at sampling, None without a critic
    weights_BT      weights of the estimator in the policy loss, None for 1
    """

    segment_ids: Tensor
    mask_BM: Tensor
    lengths_BM: Tensor
    advantages_BM: Tensor
    advantages_BT: Tensor
    returns_BM: Tensor | None
    returns_BT: Tensor | None
    values_BM: Tensor | None
    weights_BT: Tensor | None = None


def macro_batch(
    starts: Tensor,
    tokens: TokenData,
    macro: MacroSettings,
    ppo: PPOSettings,
    group_size: int = 1,
    all_reduce: AllReduceSum = lambda x: x,
    estimator: Estimator | None = None,
) -> MacroBatch:
    """Compute advantages of macro actions from `starts [B,T]` and token rewards.

    This is the core of the library.

    group_size   consecutive responses to one prompt, for estimators that compare them
    all_reduce   sums over ranks, for whitening
    estimator    instead of `ppo.estimator`
    """
    mask = tokens.response_mask
    ids = segment_ids(starts, mask)
    mask_BM = macro_mask(ids)
    rewards_BM = macro_rewards(tokens, ids, macro, ppo.gamma)

    estimator = build_estimator(ppo.estimator) if estimator is None else estimator
    reads_values = "values" in estimator_requires(estimator)
    values_BM = bootstrap_B = None
    if reads_values:
        assert tokens.values is not None
        assert tokens.last_values is not None
        values_BM = reduce(tokens.values, ids, macro.value)
        cut = ~tokens.finished & ppo.bootstrap_truncated
        bootstrap_B = torch.where(cut, tokens.last_values, torch.zeros_like(tokens.last_values))
    continuation_values_BM = None
    if tokens.continuation_values is not None:
        continuation_values_BM = reduce(tokens.continuation_values, ids, "first")
    lam_BM = critic_lam_BM = macro_lambdas(build_lambdas(ppo.lam), ids, "ppo.lam")
    if ppo.critic_lam is not None:
        critic_lam_BM = macro_lambdas(build_lambdas(ppo.critic_lam), ids, "ppo.critic_lam")
    inputs = CreditInputs(
        segment_ids=ids,
        mask_BM=mask_BM,
        rewards_BM=rewards_BM,
        discounts_BM=discounts(ids, ppo.gamma, macro.discount),
        lam_BM=lam_BM,
        critic_lam_BM=critic_lam_BM,
        returns_B=(tokens.kl_rewards + tokens.task_rewards).where(mask, 0.0).sum(1),
        values_BM=values_BM,
        bootstrap_B=bootstrap_B,
        finished_B=tokens.finished,
        group_size=group_size,
        token_ids=tokens.token_ids,
        all_reduce=all_reduce,
        continuation_values_BM=continuation_values_BM,
    )
    credit = estimate_credit(estimator, inputs)

    advantages_BM, lengths_BM = credit.advantages_BM, macro_lengths(ids)
    how = macro.whiten if macro.whiten != "auto" else "macro" if reads_values else "none"
    if how != "none":
        weights = mask_BM if how == "macro" else lengths_BM
        advantages_BM = whiten(advantages_BM, weights, all_reduce)
    return MacroBatch(
        segment_ids=ids,
        mask_BM=mask_BM,
        lengths_BM=lengths_BM,
        advantages_BM=advantages_BM,
        advantages_BT=expand(advantages_BM, ids),
        returns_BM=credit.returns_BM,
        returns_BT=None if credit.returns_BM is None else expand(credit.returns_BM, ids),
        values_BM=values_BM,
        weights_BT=None if credit.weights_BM is None else expand(credit.weights_BM, ids),
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

    input_ids, attention_mask [B,P+T]; the others [B,T]. None without a reference, without a critic,
    or without importance weights.

    logprobs   of the policy that sampled, the denominator of the ratio
    weights    of each token's term in the policy loss
    M          the most macro actions of a response; None before `select`, which reads it
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
    weights: Tensor | None = None
    M: int | None = None

    def __len__(self) -> int:
        return len(self.response_mask)

    def select(self, index: Tensor) -> Experience:
        """The sequences at `index`, without columns that are padding in all of them."""
        index = index.to(self.input_ids.device)  # once, and not for every field
        full_width, response, (M,) = kept_columns(
            self.attention_mask[index],
            self.response_mask[index],
            self.segment_ids[index].max() + 1,
        )
        columns = {"input_ids": full_width, "attention_mask": full_width}
        selected = {**vars(self), "M": M}
        for name, x in self.tensors().items():
            selected[name] = x[index][:, columns.get(name, response)]
        return Experience(**selected)

    def counts(self) -> Tensor:
        """Numbers of response tokens, of macro actions and of responses, float64 [3]."""
        tokens, macro_actions = self.response_mask.sum(), macro_mask(self.segment_ids, self.M).sum()
        return torch.stack([tokens, macro_actions, torch.full_like(tokens, len(self))]).double()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, None left out."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}


@dataclass(frozen=True)
class Rollout:
    """Sampled responses with their log-probs, values and rewards, before macro actions.

    prompt_texts    what the policy continued, in its chat template for conversations
    sequences       prompts and responses, concatenated
    responses       token ids, mask, logprobs, entropy, row ids, step, seed; ref_logprobs with a
                    reference
    values          [B,T] and last_values [B], or None without a critic
    rewards         results of the reward functions
    scores          [B] float32, weighted sum of all rewards of a response, unprocessed
    task_rewards    [B,T] processed scores on the last tokens, and rewards inside responses
    truncated       [B] bool: the prompt was truncated on its left
    extras          outputs of the log-prob pass that token rewards require, see `models.Policy`
    continuation_values   [B,T] see `TokenData`
    lag             updates between the weights that sampled and the policy's; None: not ahead
    """

    prompt_texts: list[str]
    generation: Generation
    sequences: Sequences
    responses: ResponseBatch
    values: Tensor | None
    last_values: Tensor | None
    rewards: RewardResult
    scores: Tensor
    task_rewards: Tensor
    truncated: Tensor
    extras: dict[str, Tensor]
    continuation_values: Tensor | None = None
    lag: int | None = None

    @property
    def log_ratio(self) -> Tensor | None:
        """log(policy / reference) [B,T] of the sampled tokens, nats, 0 outside the mask.

        None without a reference.
        """
        if self.responses.ref_logprobs is None:
            return None
        assert self.responses.logprobs is not None
        return self.responses.logprobs - self.responses.ref_logprobs

    def token_data(self, kl_coef: float) -> TokenData:
        """Rewards and values per token; the KL penalty has the weight `kl_coef` in the rewards."""
        ratio = self.log_ratio
        return TokenData(
            response_mask=self.responses.response_mask,
            kl_rewards=torch.zeros_like(self.task_rewards) if ratio is None else -kl_coef * ratio,
            task_rewards=self.task_rewards,
            values=self.values,
            last_values=self.last_values,
            finished=self.generation.finished,
            token_ids=self.responses.token_ids,
            continuation_values=self.continuation_values,
        )

    def experience(
        self, batch: MacroBatch, settings: RolloutSettings, ratio: Ratio = "token"
    ) -> Experience:
        """Training data of the update, with the advantages of the macro actions.

        ratio   of the policy loss, which has an importance weight per term
        """
        logprobs, sampled_with = self.responses.logprobs, self.generation.logprobs
        assert logprobs is not None
        weights = batch.weights_BT
        if settings.importance is not None:
            assert sampled_with is not None
            mask, cap = self.responses.response_mask, settings.importance.cap
            ids = batch.segment_ids
            importance = importance_weights(logprobs, sampled_with, mask, cap, ratio, ids)
            weights = importance if weights is None else weights * importance
        if settings.old_logprobs == "engine":
            assert sampled_with is not None
            logprobs = sampled_with
        return Experience(
            input_ids=self.sequences.input_ids,
            attention_mask=self.sequences.attention_mask,
            response_mask=self.sequences.response_mask,
            segment_ids=batch.segment_ids,
            logprobs=logprobs,
            ref_logprobs=self.responses.ref_logprobs,
            advantages=batch.advantages_BT,
            values=self.values,
            returns=batch.returns_BT,
            weights=weights,
        )
