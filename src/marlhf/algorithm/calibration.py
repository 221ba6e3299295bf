"""Quality of preferences predicted from scores: accuracy, reliability, histograms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BINS = 10
_HISTOGRAM_BINS = 20


def pair_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """Accuracy (a tie is half right), expected calibration error, and means of the scores.

    chosen, rejected [N]   scores of the two texts of each pair
    """
    difference = chosen - rejected
    correct = (difference > 0).double() + 0.5 * (difference == 0).double()
    return {
        "accuracy": float(correct.mean()),
        "calibration_error": calibration_error(reliability(difference)),
        "chosen_mean": float(chosen.mean()),
        "rejected_mean": float(rejected.mean()),
        "difference_mean": float(difference.mean()),
    }


def reliability(difference: Tensor) -> list[dict[str, Any]]:
    """Accuracy per bin of confidence from 0.5 to 1; bins without pairs are left out.

    The prediction is the text with the higher score, its confidence sigmoid(|difference|): the
    probability of being right under the Bradley-Terry model.
    """
    confidence = torch.sigmoid(difference.double().abs())
    correct = (difference > 0).double() + 0.5 * (difference == 0).double()
    bins = ((confidence - 0.5) * 2 * _BINS).long().clamp(max=_BINS - 1)
    table = []
    for i in range(_BINS):
        in_bin = bins == i
        if in_bin.any():
            table.append(
                {
                    "from": 0.5 + i / (2 * _BINS),
                    "to": 0.5 + (i + 1) / (2 * _BINS),
                    "pairs": int(in_bin.sum()),
                    "confidence": float(confidence[in_bin].mean()),
                    "accuracy": float(correct[in_bin].mean()),
                }
            )
    return table


def calibration_error(table: list[dict[str, Any]]) -> float:
    """Mean over pairs of their bin's |accuracy - confidence|.

    Source: Guo et al. 2017 (arXiv 1706.04599).
    """
    pairs = sum(row["pairs"] for row in table)
    gaps = (row["pairs"] * abs(row["accuracy"] - row["confidence"]) for row in table)
    return sum(gaps) / pairs


def histogram(chosen: Tensor, rejected: Tensor) -> dict[str, list[float]]:
    """Histograms of both kinds of scores over the same `edges`, one more than bins."""
    both = torch.cat([chosen, rejected]).double()
    low, high = float(both.min()), float(both.max())
    high = high if high > low else low + 1.0
    edges = torch.linspace(low, high, _HISTOGRAM_BINS + 1, dtype=torch.float64)

    def counts(scores: Tensor) -> list[float]:
        bins = torch.bucketize(scores.double(), edges, right=True) - 1
        return bins.clamp(0, _HISTOGRAM_BINS - 1).bincount(minlength=_HISTOGRAM_BINS).tolist()

    return {"edges": edges.tolist(), "chosen": counts(chosen), "rejected": counts(rejected)}
