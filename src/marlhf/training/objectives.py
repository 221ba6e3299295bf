"""Losses of policy and critic on a micro-batch of a rollout.

`Learner` calls an objective with a micro-batch and the denominators of losses: response tokens and
macro actions of the full optimiser step, over all ranks.
"""

from __future__ import annotations

from torch import Tensor, nn

from marlhf.algorithm.experience import Experience
from marlhf.algorithm.losses import kl_loss, policy_loss, sft_loss, value_loss
from marlhf.algorithm.macro import macro_mask, reduce
from marlhf.config import PPOConfig
from marlhf.runs.metrics import Metrics
from marlhf.training.ptx import TextRows


def policy_objective(
    policy: nn.Module,
    config: PPOConfig,
    kl_coef: float,
    metrics: Metrics,
    rows: Experience,
    tokens: float,
    macro_actions: float,
) -> Tensor:
    """The clipped PPO loss, plus the KL penalty and the critic's loss where configured.

    The KL penalty, times `kl_coef`, is added where it is part of the loss; the critic's loss, times
    `critic.coef`, where the critic is a head on the policy.
    """
    mask = rows.response_mask
    logprobs, found = policy(
        rows.input_ids,
        rows.attention_mask,
        mask,
        **config.sampled_from,
        extras=_of_head(config),
    )
    loss, stats = policy_loss(
        logprobs,
        rows.logprobs,
        rows.advantages,
        mask,
        config.ppo.clip_range,
        config.macro.ratio,
        rows.segment_ids,
        tokens,
    )
    if kl_coef > 0:
        assert rows.ref_logprobs is not None
        loss = loss + kl_coef * kl_loss(logprobs, rows.ref_logprobs, mask, tokens)
    metrics.add("policy_loss", loss.detach() * tokens, mask.sum())
    ratios = macro_mask(rows.segment_ids) if config.macro.ratio == "macro_product" else mask
    metrics.add("clip_fraction", stats["clip_fraction"] * ratios.sum(), ratios.sum())
    metrics.add("approx_kl", stats["approx_kl"] * ratios.sum(), ratios.sum())
    metrics.maximum("ratio_max", stats["ratio_max"])
    if config.has_head:
        of_values = _regression(found["values"], config, metrics, rows, tokens, macro_actions)
        loss = loss + config.critic.coef * of_values
    return loss


def text_objective(
    policy: nn.Module, config: PPOConfig, metrics: Metrics, rows: TextRows, tokens: float
) -> Tensor:
    """`ptx.coef` times the cross-entropy of texts, nats per token.

    A critic's head on the policy gets a gradient of 0: without a gradient in every pass, DeepSpeed
    would add the head's gradient of a later pass to that of the previous optimiser step.
    """
    assert config.ptx is not None
    logprobs, found = policy(
        rows.input_ids, rows.attention_mask, rows.loss_mask, extras=_of_head(config)
    )
    loss = sft_loss(logprobs, rows.loss_mask, max(tokens, 1.0))
    metrics.add("ptx_loss", loss.detach() * tokens, rows.loss_mask.sum())
    loss = config.ptx.coef * loss
    return loss + 0.0 * found["values"].sum() if config.has_head else loss


def value_objective(
    critic: nn.Module,
    config: PPOConfig,
    metrics: Metrics,
    rows: Experience,
    tokens: float,
    macro_actions: float,
) -> Tensor:
    """The clipped regression of values on returns, per token or per macro action."""
    values, _ = critic(rows.input_ids, rows.attention_mask, rows.response_mask)
    return _regression(values, config, metrics, rows, tokens, macro_actions)


def _of_head(config: PPOConfig) -> tuple[str, ...]:
    """Extra outputs of the policy's pass for a critic that is a head on it."""
    return ("values",) if config.has_head else ()


def _regression(
    values: Tensor,
    config: PPOConfig,
    metrics: Metrics,
    rows: Experience,
    tokens: float,
    macro_actions: float,
) -> Tensor:
    assert rows.values is not None
    assert rows.returns is not None
    old, returns = rows.values, rows.returns
    mask, count = rows.response_mask, tokens
    if config.macro.value_loss == "macro":
        ids, how = rows.segment_ids, config.macro.value
        values, old = reduce(values, ids, how), reduce(old, ids, how)
        returns, mask, count = reduce(returns, ids, "first"), macro_mask(ids), macro_actions
    loss, stats = value_loss(values, old, returns, mask, config.ppo.value_clip_range, count)
    here = mask.sum()
    metrics.add("value_loss", loss.detach() * count, here)
    metrics.add("value_clip_fraction", stats["value_clip_fraction"] * here, here)
    return loss
