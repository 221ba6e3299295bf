"""Advantages over macro actions: GAE with a critic, or a comparison of responses without one.

Pure functions; reductions over ranks are arguments.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from marlhf.common.types import AllReduceSum


def gae(
    rewards_BM: Tensor,
    values_BM: Tensor,
    mask_BM: Tensor,
    discounts_BM: Tensor,
    lam: float | Tensor,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over macro actions.

        delta_k = R_k + disc_k * V_(k+1) - V_k
        A_k     = delta_k + disc_k * lam * A_(k+1)
        G_k     = A_k + V_k

    rewards_BM     R_k, reward collected during macro action k
    values_BM      V_k, value of the state in which macro action k starts
    mask_BM        bool, a prefix of True in each row
    discounts_BM   disc_k, from the start of macro action k to the start of the next
    lam            GAE lambda per macro action: a number, or [B,M] with that of macro action k at k
    bootstrap_B    V after the last macro action; None for 0 (a finished response)

    Returns (advantages_BM, returns_BM), 0 outside the mask; inputs there are ignored, even NaN.
    Source: Schulman et al. 2016 (arXiv 1506.02438) eq. 16; over options: arXiv 2410.02743.
    """
    assert rewards_BM.shape == values_BM.shape == mask_BM.shape == discounts_BM.shape
    assert rewards_BM.dtype == values_BM.dtype
    assert mask_BM.dtype == torch.bool
    zeros = torch.zeros_like(values_BM)
    rewards = torch.where(mask_BM, rewards_BM, zeros)
    values = torch.where(mask_BM, values_BM, zeros)
    discounts = torch.where(mask_BM, discounts_BM.to(values.dtype), zeros)

    next_values = torch.cat([values[:, 1:], zeros[:, :1]], 1)
    if bootstrap_B is not None:
        is_last = mask_BM & ~torch.cat([mask_BM[:, 1:], torch.zeros_like(mask_BM[:, :1])], 1)
        bootstrap = bootstrap_B.to(values.dtype)[:, None].expand_as(values)
        next_values = torch.where(is_last, bootstrap, next_values)

    deltas = rewards + discounts * next_values - values
    decays = discounts * (lam.to(values.dtype) if isinstance(lam, Tensor) else lam)
    advantages = torch.zeros_like(values)
    advantage = values.new_zeros(values.shape[0])
    for k in reversed(range(values.shape[1])):
        advantage = deltas[:, k] + decays[:, k] * advantage
        advantages[:, k] = advantage
    return advantages, torch.where(mask_BM, advantages + values, zeros)


def group_relative(
    returns_B: Tensor,
    group_size: int,
    estimator: Literal["rloo", "grpo", "reinforce"],
    all_reduce: AllReduceSum = lambda x: x,
) -> Tensor:
    """One advantage per response, relative to other responses, without a critic.

    rloo       return minus the mean return of the group's other responses (Ahmadian et al. 2024)
    grpo       (return - group mean) / group standard deviation (Shao et al. 2024), the unbiased
               estimate; 0 where all returns of a group are the same
    reinforce  return minus the mean return of the full batch, over all ranks

    returns_B holds groups of `group_size` consecutive responses to one prompt. Returns [B].
    """
    if estimator == "reinforce":
        count = torch.tensor(float(returns_B.numel()), dtype=torch.float64)
        total = all_reduce(torch.stack([returns_B.double().sum().cpu(), count]))
        return returns_B - (total[0] / total[1]).to(returns_B)
    if estimator not in ("rloo", "grpo"):
        raise ValueError(f"estimator: given {estimator!r}, must be 'rloo', 'grpo' or 'reinforce'")
    if group_size < 2 or returns_B.numel() % group_size:
        raise ValueError(
            f"group_size: given {group_size}, must be at least 2 and divide the "
            f"{returns_B.numel()} responses"
        )
    groups = returns_B.reshape(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if estimator == "rloo":
        return (centred * (group_size / (group_size - 1))).reshape(-1)
    return (centred / group_std(groups)).reshape(-1)


def group_std(returns_GK: Tensor) -> Tensor:
    """Standard deviation of each group, [G,1]; infinite where its returns are all the same."""
    std = returns_GK.std(1, keepdim=True)
    resolution = 1e-6 * returns_GK.abs().amax(1, keepdim=True)  # equal scores differ by rounding
    return torch.where(std > resolution, std, torch.full_like(std, torch.inf))


def whiten(x: Tensor, weights: Tensor, all_reduce: AllReduceSum = lambda x: x) -> Tensor:
    """Scale to mean 0 and variance 1 under non-negative weights, over all ranks.

    x, weights    the same shape; weight 0 leaves an entry out and sets it to 0
    all_reduce    sums a small float64 tensor over ranks

    A constant batch becomes 0, as 1e-8 is added to the variance.
    """
    assert x.shape == weights.shape
    weights = weights.double()
    kept = torch.where(weights > 0, x.double(), torch.zeros_like(weights))
    total, count = all_reduce(torch.stack([(weights * kept).sum(), weights.sum()])).unbind()
    mean = total / count.clamp(min=1e-300)
    centred = torch.where(weights > 0, kept - mean, torch.zeros_like(kept))
    variance = all_reduce((weights * centred**2).sum()) / count.clamp(min=1e-300)
    return (centred * torch.rsqrt(variance + 1e-8)).to(x.dtype)
