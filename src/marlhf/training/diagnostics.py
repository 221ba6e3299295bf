"""The report of an update: metrics of the rollout, and samples to read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from marlhf.algorithm.experience import MacroBatch, explained_variance
from marlhf.algorithm.losses import k1, k3
from marlhf.algorithm.macro import segment_ids
from marlhf.common.types import AllReduceSum
from marlhf.rollout.worker import Rollout
from marlhf.runs.metrics import Metrics, Timer, peak_memory_gb
from marlhf.views.terminal import macro_pieces

# In every row of metrics; null where nothing was trained: no critic, or critic warm-up.
_OF_THE_UPDATE = (
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
    """Add the metrics of the rollout, which the update does not change."""
    generation, mask = rollout.generation, batch.segment_ids >= 0
    log_ratio, objective = rollout.log_ratio, rollout.task_rewards.sum(1)
    metrics.mean("score_mean", rollout.scores)
    metrics.mean("score_square", rollout.scores.double() ** 2)
    lengths = generation.lengths.double().cpu()
    metrics.mean("length_square", lengths**2)
    metrics.mean("score_length", rollout.scores.double().cpu() * lengths)
    metrics.mean("kl_mean", None if log_ratio is None else k1(log_ratio).sum(1))
    metrics.mean("kl_k3_mean", None if log_ratio is None else k3(log_ratio).sum(1))
    if log_ratio is not None:
        objective = objective - kl_coef * log_ratio.sum(1)
    metrics.mean("objective_mean", objective)
    metrics.mean("entropy", rollout.entropy, mask)
    metrics.mean("response_length_mean", generation.lengths)
    metrics.mean("eos_fraction", generation.finished)
    metrics.mean("prompt_truncated_fraction", rollout.truncated)
    metrics.mean("macro_length_mean", batch.lengths_BM, batch.mask_BM)
    metrics.mean("macro_count_mean", batch.mask_BM.sum(1))
    if batch.returns_BM is not None and batch.values_BM is not None:
        advantages = (batch.returns_BM - batch.values_BM)[batch.mask_BM].double()  # not whitened
        metrics.mean("advantage_mean", advantages)
        metrics.mean("advantage_square", advantages**2)
    for name, values in rollout.rewards.by_name.items():
        given = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
        metrics.mean(f"reward_{name}_mean", given)


def row(
    step: int,
    reduced: Mapping[str, Any],
    batch: MacroBatch,
    learning_rate: float,
    timer: Timer,
    all_reduce: AllReduceSum,
) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    values = dict(reduced)
    score, length = values["score_mean"], values["response_length_mean"]
    values["score_std"] = _std(score, values.pop("score_square"))
    spread = values["score_std"] * _std(length, values.pop("length_square"))
    covariance = values.pop("score_length") - score * length
    # constant scores or lengths have no correlation, only rounding errors
    values["score_length_correlation"] = covariance / spread if spread > 1e-6 else None
    if "advantage_square" in values:
        error = values.pop("advantage_mean")
        values["advantage_std"] = _std(error, values.pop("advantage_square"))
    if batch.returns_BM is not None and batch.values_BM is not None:
        values["explained_variance"] = explained_variance(
            batch.returns_BM, batch.values_BM, batch.mask_BM, all_reduce
        )
    for name in _OF_THE_UPDATE:
        values.setdefault(name, None)
    values["learning_rate"] = learning_rate
    tokens = float(all_reduce(torch.tensor(float(batch.lengths_BM.sum()))))
    seconds = timer.total()
    values["step_seconds"] = seconds
    for phase in ("generate", "score", "segment", "train"):
        values[f"{phase}_seconds"] = timer.seconds.get(phase, 0.0)
    values["tokens_per_second"] = tokens / seconds
    values["peak_memory_gb"] = peak_memory_gb()
    return {"step": step, **values}


def _std(mean: float, mean_square: float) -> float:
    return math.sqrt(max(0.0, mean_square - mean**2))


def samples(
    rollout: Rollout, starts: Tensor, limit: int, batch: MacroBatch | None = None
) -> Iterator[dict[str, Any]]:
    """Lines of samples.jsonl: the first responses, cut into the text of each macro action.

    batch   adds the advantage of each macro action: as in the policy's loss or, for held-out
            responses, not whitened (None without a critic)
    """
    responses, log_ratio = rollout.responses, rollout.log_ratio
    ids = segment_ids(starts, responses.response_mask)
    for i in range(min(limit, len(ids))):
        row_ids = ids[i, : responses.lengths[i]]
        begins = torch.nn.functional.pad(row_ids, (1, 0), value=-1).diff() > 0
        text = responses.texts[i]
        sample = {
            "row": responses.rows[i],
            "prompt": rollout.prompt_texts[i],
            "response": text,
            "macro_actions": macro_pieces(text, responses.offsets[i], begins.tolist()),
            "macro_lengths": row_ids.unique_consecutive(return_counts=True)[1].tolist(),
            "score": float(rollout.scores[i]),
            "kl": None if log_ratio is None else float(log_ratio[i].sum()),
            "finished": bool(rollout.generation.finished[i]),
        }
        if batch is not None:
            sample["macro_advantages"] = batch.advantages_BM[i][batch.mask_BM[i]].tolist()
        yield sample
