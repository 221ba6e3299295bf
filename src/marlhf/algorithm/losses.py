"""Losses on log-probabilities and values, and estimators of the KL divergence.

Every loss is a sum over the mask divided by `denominator`. The trainer passes the number of valid
entries of the full optimiser step, over micro-batches and ranks, so that no split of the batch
changes the gradient; None stands for the mask's own count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from marlhf.algorithm.macro import expand, reduce

Ratio = Literal["token", "macro_mean", "macro_product"]
Aggregate = Literal["token", "response", "constant"]
Stats = dict[str, Tensor]


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_range: float | Sequence[float],
    ratio: Ratio = "token",
    segment_ids: Tensor | None = None,
    denominator: Tensor | float | None = None,
    weights_BT: Tensor | None = None,
    dual_clip: float | None = None,
    M: int | None = None,
) -> tuple[Tensor, Stats]:
    """PPO's clipped objective, negated: max(-A r, -A clip(r, 1 - clip_range, 1 + clip_range)).

    advantages_BT   the advantage of each token's macro action
    clip_range      one number, or two: how far below and above 1 (Yu et al. 2025, DAPO, arXiv
                    2503.14476)
    ratio           what r is, with l_t = logprobs - old_logprobs:
        token           exp(l_t)
        macro_mean      exp(mean of l over the macro action), for each of its tokens; with one
                        macro action per response this is GSPO's (Zheng et al. 2025), whose clip
                        range is near 1e-3
        macro_product   exp(sum of l over the macro action), once per macro action (the
                        formula of MA-RLHF, arXiv 2410.02743)
    segment_ids     [B,T], needed by the two macro ratios
    denominator     tokens to divide by, in all three
    weights_BT      of each token's term; macro_product takes that of a macro action's first token
    dual_clip       where A < 0, a term is at most -A dual_clip, above 1 (Ye et al. 2020, arXiv
                    1912.09729 eq. 5); None: unbounded
    M               the most macro actions of a response, as in `reduce`

    At r = 1 all three have the same gradient. Returns (loss, stats): `clip_fraction` and
    `approx_kl` (k3 of the old policy against the new), means over the entries of r, tokens or
    (macro_product) macro actions, and `ratio_max`.
    Source: Schulman et al. 2017 (arXiv 1707.06347) eq. 7.
    """
    assert logprobs_BT.shape == old_logprobs_BT.shape == advantages_BT.shape == mask_BT.shape
    zeros = torch.zeros_like(logprobs_BT)
    log_ratio = torch.where(mask_BT, logprobs_BT - old_logprobs_BT, zeros)
    advantages = torch.where(mask_BT, advantages_BT.to(logprobs_BT.dtype), zeros)
    mask = mask_BT
    if ratio != "token":
        if segment_ids is None:
            raise ValueError(f"segment_ids: must be given for ratio={ratio!r}")
        if ratio == "macro_mean":
            T = segment_ids.shape[1]
            log_ratio = expand(reduce(log_ratio, segment_ids, "equal", M=T), segment_ids)
        elif ratio == "macro_product":
            log_ratio = reduce(log_ratio, segment_ids, "sum", M=M)
            advantages = reduce(advantages, segment_ids, "first", M=M)
            if weights_BT is not None:
                weights_BT = reduce(weights_BT, segment_ids, "first", M=M)
            mask = reduce(mask_BT.to(log_ratio.dtype), segment_ids, "first", M=M) > 0
        else:
            raise ValueError(
                f"ratio: given {ratio!r}, must be 'token', 'macro_mean' or 'macro_product'"
            )
    # within the range of exp, so that a clipped entry has gradient 0 and not 0 * inf
    log_ratio = log_ratio.clamp(max=math.log(torch.finfo(log_ratio.dtype).max) / 2)
    r = log_ratio.exp()
    low, high = (clip_range, clip_range) if isinstance(clip_range, float | int) else clip_range
    clipped = r.clamp(1 - low, 1 + high)
    losses = torch.maximum(-advantages * r, -advantages * clipped)
    if dual_clip is not None:
        bounded = torch.minimum(losses, -advantages * dual_clip)
        losses = torch.where(advantages < 0, bounded, losses)
    if weights_BT is not None:
        losses = losses * weights_BT.to(r.dtype)
    loss = torch.where(mask, losses, torch.zeros_like(losses)).sum()
    loss = loss / _denominator(mask_BT, denominator)

    with torch.no_grad():
        is_clipped = -advantages * clipped > -advantages * r
        stats = {
            "clip_fraction": _mean(is_clipped.to(r.dtype), mask),
            "approx_kl": _mean(k3(-log_ratio), mask),
            "ratio_max": torch.where(mask, r, torch.zeros_like(r)).amax()
            if r.numel()
            else r.new_zeros(()),
        }
    return loss, stats


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    clip_range: float | None,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """0.5 max((V - G)^2, (clip(V, V_old - clip_range, V_old + clip_range) - G)^2).

    Works on tokens [B,T] or on macro actions [B,M] alike. clip_range None: no clipping.
    Returns (loss, stats) with `value_clip_fraction`, a mean over the mask.
    Source: the PPO implementation of Dhariwal et al. 2017 (OpenAI Baselines).
    """
    assert values_BT.shape == old_values_BT.shape == returns_BT.shape == mask_BT.shape
    zeros = torch.zeros_like(values_BT)
    values = torch.where(mask_BT, values_BT, zeros)
    old_values = torch.where(mask_BT, old_values_BT.to(values.dtype), zeros)
    returns = torch.where(mask_BT, returns_BT.to(values.dtype), zeros)
    squared = (values - returns) ** 2
    stats = {"value_clip_fraction": values.new_zeros(())}
    if clip_range is not None:
        clipped = values.clamp(old_values - clip_range, old_values + clip_range)
        squared_clipped = (clipped - returns) ** 2
        with torch.no_grad():
            is_clipped = squared_clipped > squared
            stats["value_clip_fraction"] = _mean(is_clipped.to(values.dtype), mask_BT)
        squared = torch.maximum(squared, squared_clipped)
    return 0.5 * squared.sum() / _denominator(mask_BT, denominator), stats


def kl_loss(
    logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    mask_BT: Tensor,
    denominator: Tensor | float | None = None,
    weights_BT: Tensor | None = None,
) -> Tensor:
    """The k3 estimate of KL(policy || reference) per token, differentiable in `logprobs_BT`.

    weights_BT   of each token's term; None for 1
    """
    difference = torch.where(mask_BT, logprobs_BT - ref_logprobs_BT, torch.zeros_like(logprobs_BT))
    losses = k3(difference)
    if weights_BT is not None:
        losses = losses * weights_BT.to(losses.dtype)
    return losses.sum() / _denominator(mask_BT, denominator)


def entropy_bonus(
    entropy_BT: Tensor,
    mask_BT: Tensor,
    denominator: Tensor | float | None = None,
    weights_BT: Tensor | None = None,
) -> Tensor:
    """Mean entropy of the policy before each token, nats, differentiable in `entropy_BT`.

    weights_BT   of each token's term; None for 1
    Source: Williams & Peng 1991; in PPO, arXiv 1707.06347 eq. 9.
    """
    entropy = torch.where(mask_BT, entropy_BT, torch.zeros_like(entropy_BT))
    if weights_BT is not None:
        entropy = entropy * weights_BT.to(entropy.dtype)
    return entropy.sum() / _denominator(mask_BT, denominator)


def aggregation(
    mask_BT: Tensor, how: Aggregate, tokens: Tensor | float, responses: float, limit: int
) -> tuple[Tensor | None, Tensor | float]:
    """Weights [B,T] of a loss's terms, None for 1, and the denominator of their sum.

    token       mean over all tokens (DAPO, arXiv 2503.14476)
    response    mean over the tokens of each response, then over responses (GRPO, arXiv 2402.03300)
    constant    sum over each response, divided by `limit`, its longest length; mean over responses
                (Dr. GRPO, arXiv 2503.20783)

    tokens, responses   of the full optimiser step, over all ranks
    """
    if how == "token":
        return None, tokens
    if how == "constant":
        return None, responses * limit
    lengths_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
    return (1 / lengths_B1.double()).expand(mask_BT.shape), responses


def sft_loss(
    logprobs_BT: Tensor, mask_BT: Tensor, denominator: Tensor | float | None = None
) -> Tensor:
    """Cross-entropy of the tokens under the mask, nats per token."""
    kept = torch.where(mask_BT, logprobs_BT, torch.zeros_like(logprobs_BT))
    return -kept.sum() / _denominator(mask_BT, denominator)


def pairwise_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    margin_B: Tensor | None = None,
    centring: float = 0.0,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Bradley-Terry: -log sigmoid(chosen - rejected - margin), nats per pair.

    chosen_B, rejected_B   scores of the two texts of each pair
    margin_B    by how much the chosen one should win (Touvron et al. 2023, arXiv 2307.09288)
    centring    weight of (chosen + rejected)^2, which keeps scores around 0 (Eisenstein et al.
                2023, arXiv 2312.09244)
    denominator pairs to divide by
    """
    assert chosen_B.shape == rejected_B.shape
    difference = chosen_B - rejected_B
    if margin_B is not None:
        difference = difference - margin_B
    losses = -torch.nn.functional.logsigmoid(difference)
    if centring:
        losses = losses + centring * (chosen_B + rejected_B) ** 2
    return losses.sum() / (len(chosen_B) if denominator is None else denominator)


def k1(log_ratio: Tensor) -> Tensor:
    """log(p/q) of samples from p: unbiased for KL(p || q), can be negative.

    Source of k1 and k3: Schulman 2020, "Approximating KL divergence".
    """
    return log_ratio


def k3(log_ratio: Tensor) -> Tensor:
    """q/p - 1 - log(q/p) for log_ratio = log(p/q), samples from p: unbiased, never negative."""
    return torch.expm1(-log_ratio) + log_ratio


def _denominator(mask: Tensor, denominator: Tensor | float | None) -> Tensor | float:
    return mask.sum().clamp(min=1) if denominator is None else denominator


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, torch.zeros_like(x)).sum() / mask.sum().clamp(min=1)
