"""Losses of policy and critic on a micro-batch of a rollout.

`Learner` calls an objective with a micro-batch and the denominators of losses: response tokens,
macro actions and responses of the full optimiser step, over all ranks.
"""

from __future__ import annotations

from torch import Tensor, nn

from marlhf.algorithm.experience import Experience
from marlhf.algorithm.losses import (
    aggregation,
    entropy_bonus,
    kl_loss,
    policy_loss,
    sft_loss,
    value_loss,
)
from marlhf.algorithm.macro import macro_mask, reduce
from marlhf.config import PPOConfig
from marlhf.runs.metrics import Metrics
from marlhf.training.ptx import TextBatch


def policy_objective(
    policy: nn.Module,
    config: PPOConfig,
    kl_coef: float,
    metrics: Metrics,
    micro_batch: Experience,
    tokens: float,
    macro_actions: float,
    responses: float,
) -> Tensor:
    """The clipped PPO loss, with the KL penalty, entropy and critic's loss where configured.

    The KL penalty, times `kl_coef`, is added where it is part of the loss; the critic's loss, times
    `critic.coef`, where the critic is a head on the policy. The entropy, times `ppo.entropy_coef`,
    is subtracted.
    """
    mask = micro_batch.response_mask
    logprobs, outputs = policy(
        micro_batch.input_ids,
        micro_batch.attention_mask,
        mask,
        **config.logprob_settings,
        extras=(*_head_outputs(config), *(("entropy",) if config.ppo.entropy_coef else ())),
    )
    how, limit = config.ppo.aggregate, config.rollout.max_new_tokens
    averaging, denominator = aggregation(mask, how, tokens, responses, limit)
    _, share = aggregation(mask, how, mask.sum(), len(mask), limit)  # this micro-batch's
    weights = micro_batch.weights
    if weights is not None:
        metrics.mean("loss_weight_mean", weights, mask)
    if averaging is not None:
        weights = averaging if weights is None else averaging * weights
    loss, stats = policy_loss(
        logprobs,
        micro_batch.logprobs,
        micro_batch.advantages,
        mask,
        config.ppo.clip_range,
        config.macro.ratio,
        micro_batch.segment_ids,
        denominator,
        weights,
        config.ppo.dual_clip,
        micro_batch.M,
    )
    if kl_coef > 0:
        assert micro_batch.ref_logprobs is not None
        kl = kl_loss(logprobs, micro_batch.ref_logprobs, mask, denominator, averaging)
        loss = loss + kl_coef * kl
    if config.ppo.entropy_coef > 0:
        bonus = entropy_bonus(outputs["entropy"], mask, denominator, averaging)
        loss = loss - config.ppo.entropy_coef * bonus
    metrics.add("policy_loss", loss.detach() * denominator, share)
    ratios = mask.sum()
    if config.macro.ratio == "macro_product":
        ratios = macro_mask(micro_batch.segment_ids, micro_batch.M).sum()
    metrics.add("clip_fraction", stats["clip_fraction"] * ratios, ratios)
    metrics.add("approx_kl", stats["approx_kl"] * ratios, ratios)
    metrics.maximum("ratio_max", stats["ratio_max"])
    if config.has_head:
        regression = _value_regression(
            outputs["values"], config, metrics, micro_batch, tokens, macro_actions
        )
        loss = loss + config.critic.coef * regression
    return loss


def text_objective(
    policy: nn.Module, config: PPOConfig, metrics: Metrics, micro_batch: TextBatch, tokens: float
) -> Tensor:
    """`ptx.coef` times the cross-entropy of texts, nats per token.

    The critic's head on the policy gets a zero gradient: DeepSpeed needs one in every pass, or it
    adds the head's gradient of a later pass to that of the previous optimiser step.
    """
    assert config.ptx is not None
    logprobs, outputs = policy(
        micro_batch.input_ids,
        micro_batch.attention_mask,
        micro_batch.loss_mask,
        extras=_head_outputs(config),
    )
    loss = sft_loss(logprobs, micro_batch.loss_mask, max(tokens, 1.0))
    metrics.add("ptx_loss", loss.detach() * tokens, micro_batch.loss_mask.sum())
    loss = config.ptx.coef * loss
    return loss + 0.0 * outputs["values"].sum() if config.has_head else loss


def value_objective(
    critic: nn.Module,
    config: PPOConfig,
    metrics: Metrics,
    micro_batch: Experience,
    tokens: float,
    macro_actions: float,
    _responses: float,
) -> Tensor:
    """The clipped regression of values on returns, per token or per macro action."""
    values, _ = critic(micro_batch.input_ids, micro_batch.attention_mask, micro_batch.response_mask)
    return _value_regression(values, config, metrics, micro_batch, tokens, macro_actions)


def _head_outputs(config: PPOConfig) -> tuple[str, ...]:
    """Extra outputs of the policy's pass for a critic that is a head on it."""
    return ("values",) if config.has_head else ()


def _value_regression(
    values: Tensor,
    config: PPOConfig,
    metrics: Metrics,
    micro_batch: Experience,
    tokens: float,
    macro_actions: float,
) -> Tensor:
    assert micro_batch.values is not None
    assert micro_batch.returns is not None
    old_values, returns = micro_batch.values, micro_batch.returns
    mask, count = micro_batch.response_mask, tokens
    if config.macro.value_loss == "macro":
        ids, count = micro_batch.segment_ids, macro_actions
        M, how = micro_batch.M, config.macro.value
        values, old_values = reduce(values, ids, how, M=M), reduce(old_values, ids, how, M=M)
        returns, mask = reduce(returns, ids, "first", M=M), macro_mask(ids, M)
    loss, stats = value_loss(values, old_values, returns, mask, config.ppo.value_clip_range, count)
    entries = mask.sum()
    metrics.add("value_loss", loss.detach() * count, entries)
    metrics.add("value_clip_fraction", stats["value_clip_fraction"] * entries, entries)
    return loss
