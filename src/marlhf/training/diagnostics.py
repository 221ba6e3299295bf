"""The report of a PPO update: metrics of the rollout, and samples to read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from marlhf.algorithm.experience import MacroBatch, Rollout
from marlhf.algorithm.losses import k1, k3
from marlhf.algorithm.macro import segment_ids
from marlhf.runs.metrics import Metrics, Timer, memory_row
from marlhf.views.terminal import macro_pieces

# In every row of metrics; null where nothing was trained: no critic, or critic warm-up.
_UPDATE_METRICS = (
    "policy_loss",
    "value_loss",
    "clip_fraction",
    "value_clip_fraction",
    "approx_kl",
    "ratio_max",
    "explained_variance",
    "advantage_std",
    "grad_norm_policy",
    "grad_norm_value",
)


def measure(rollout: Rollout, batch: MacroBatch, kl_coef: float, metrics: Metrics) -> None:
    """Add metrics of the rollout, which do not depend on the optimiser steps."""
    generation, responses = rollout.generation, rollout.responses
    log_ratio, objective = rollout.log_ratio, rollout.task_rewards.sum(1)
    metrics.mean("score_mean", rollout.scores)
    metrics.deviation("score_std", rollout.scores)
    pairs = moments(rollout.scores, generation.lengths.to(rollout.scores.device))
    metrics.statistic("score_length_correlation", pairs, correlation)
    metrics.mean("kl_mean", None if log_ratio is None else k1(log_ratio).sum(1))
    metrics.mean("kl_k3_mean", None if log_ratio is None else k3(log_ratio).sum(1))
    if log_ratio is not None:
        objective = objective - kl_coef * log_ratio.sum(1)
    metrics.mean("objective_mean", objective)
    metrics.mean("entropy", responses.entropy, responses.response_mask)
    if generation.logprobs is not None:
        assert responses.logprobs is not None
        gap = responses.logprobs - generation.logprobs  # log(policy / engine)
        metrics.mean("engine_kl", k3(-gap), responses.response_mask)
        metrics.maximum("engine_ratio_max", gap[responses.response_mask].exp().max())
    if rollout.lag is not None:
        metrics.add("sampling_lag", rollout.lag)
    metrics.mean("response_length_mean", generation.lengths)
    metrics.mean("eos_fraction", generation.finished)
    metrics.mean("prompt_truncated_fraction", rollout.truncated)
    metrics.mean("macro_length_mean", batch.lengths_BM, batch.mask_BM)
    metrics.mean("macro_count_mean", batch.mask_BM.sum(1))
    if batch.returns_BM is not None and batch.values_BM is not None:
        returns, values = batch.returns_BM[batch.mask_BM], batch.values_BM[batch.mask_BM]
        metrics.deviation("advantage_std", returns - values)  # not whitened
        pairs = moments(returns, returns - values)
        metrics.statistic("explained_variance", pairs, explained_variance)
    for name, values in rollout.rewards.by_name.items():
        applicable = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
        metrics.mean(f"reward_{name}_mean", applicable)


def measure_held_out(rollout: Rollout, counted: int, metrics: Metrics) -> None:
    """Add metrics of the first `counted` held-out responses."""
    log_ratio = rollout.log_ratio
    metrics.mean("eval_score_mean", rollout.scores[:counted])
    metrics.mean("eval_kl_mean", None if log_ratio is None else log_ratio.sum(1)[:counted])
    metrics.mean("eval_response_length_mean", rollout.generation.lengths[:counted])


def row(
    step: int, reduced: Mapping[str, Any], responses: int, learning_rate: float, timer: Timer
) -> dict[str, Any]:
    """One line of metrics.jsonl.

    step        the update
    responses   in the update, over all ranks
    """
    seconds = timer.total()
    return {
        "step": step,
        **dict.fromkeys(_UPDATE_METRICS),
        **reduced,
        "learning_rate": learning_rate,
        "step_seconds": seconds,
        **{f"{phase}_seconds": spent for phase, spent in timer.seconds.items()},
        "tokens_per_second": responses * reduced["response_length_mean"] / seconds,
        **memory_row(),
    }


def moments(x: Tensor, y: Tensor) -> Tensor:
    """Sums of 1, x, y, x^2, y^2 and xy, float64 [6]."""
    x, y = x.double(), y.double()
    return torch.stack([torch.ones_like(x), x, y, x**2, y**2, x * y]).sum(1)


def correlation(sums: list[float]) -> float | None:
    """Correlation of x and y by their `moments`; None where either does not vary."""
    n, *totals = sums
    x, y, xx, yy, xy = (total / n for total in totals)
    spread = math.sqrt(max(0.0, xx - x**2)) * math.sqrt(max(0.0, yy - y**2))
    # constant scores or lengths have no correlation, only rounding errors
    return (xy - x * y) / spread if spread > 1e-6 else None


def explained_variance(sums: list[float]) -> float | None:
    """1 - Var(error) / Var(returns) by their `moments`; None where returns do not vary."""
    n, y1, e1, y2, e2, _ = sums
    variance = y2 / n - (y1 / n) ** 2 if n else 0.0
    if variance <= 1e-12:
        return None
    return 1 - (e2 / n - (e1 / n) ** 2) / variance


def samples(
    rollout: Rollout, starts: Tensor, limit: int, batch: MacroBatch | None = None
) -> Iterator[dict[str, Any]]:
    """Lines of samples.jsonl: the first responses, each as the texts of its macro actions.

    batch   adds the advantage of every macro action: as in the policy's loss or, for held-out
            responses, not whitened (None without a critic)
    """
    responses, log_ratio = rollout.responses, rollout.log_ratio
    ids = segment_ids(starts, responses.response_mask)
    for i in range(min(limit, len(ids))):
        macro_ids = ids[i, : responses.lengths[i]]
        begins = torch.nn.functional.pad(macro_ids, (1, 0), value=-1).diff() > 0
        text = responses.texts[i]
        sample = {
            "row": responses.rows[i],
            "prompt": rollout.prompt_texts[i],
            "response": text,
            "macro_actions": macro_pieces(text, responses.offsets[i], begins.tolist()),
            "macro_lengths": macro_ids.unique_consecutive(return_counts=True)[1].tolist(),
            "score": float(rollout.scores[i]),
            "kl": None if log_ratio is None else float(log_ratio[i].sum()),
            "finished": bool(rollout.generation.finished[i]),
        }
        if batch is not None:
            sample["macro_advantages"] = batch.advantages_BM[i][batch.mask_BM[i]].tolist()
        yield sample
