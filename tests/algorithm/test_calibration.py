"""Accuracy, reliability and histograms of score differences, on cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from marlhf.algorithm.calibration import calibration_error, histogram, pair_metrics, reliability


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_accuracy_counts_a_tie_as_half():
    found = pair_metrics(torch.tensor([2.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 3.0, 4.0]))
    assert found["accuracy"] == 2.5 / 4
    assert (found["chosen_mean"], found["rejected_mean"]) == (2.0, 2.25)
    assert found["difference_mean"] == -0.25


def test_reliability_by_hand():
    """Ten predictions at 0.83, eight right; four at 0.62, one right."""
    sure = [logit(0.83)] * 8 + [-logit(0.83)] * 2
    unsure = [logit(0.62)] + [-logit(0.62)] * 3
    table = reliability(torch.tensor(sure + unsure))
    assert [(row["from"], row["pairs"]) for row in table] == [(0.6, 4), (0.8, 10)]
    assert [row["accuracy"] for row in table] == [0.25, 0.8]
    assert [row["confidence"] for row in table] == pytest.approx([0.62, 0.83])
    error = (4 * (0.62 - 0.25) + 10 * (0.83 - 0.8)) / 14
    assert calibration_error(table) == pytest.approx(error)


def test_a_calibrated_model_has_no_error_and_an_overconfident_one_has():
    generator = torch.Generator().manual_seed(0)
    difference = 2 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    right = torch.rand(20_000, generator=generator, dtype=torch.float64) < torch.sigmoid(difference)
    signed = torch.where(right, difference, -difference)
    assert calibration_error(reliability(signed)) < 0.015
    assert calibration_error(reliability(5 * signed)) > 0.1


def test_certainty_and_its_opposite_have_a_bin():
    table = reliability(torch.tensor([1e6, -1e6, 0.0]))
    assert [(row["from"], row["pairs"], row["accuracy"]) for row in table] == [
        (0.5, 1, 0.5),
        (0.95, 2, 0.5),
    ]


def test_histogram_counts_every_score_once():
    found = histogram(torch.tensor([0.0, 1.0, 10.0]), torch.tensor([-10.0, 0.5]))
    assert (found["edges"][0], found["edges"][-1], len(found["edges"])) == (-10.0, 10.0, 21)
    assert (sum(found["chosen"]), sum(found["rejected"])) == (3, 2)
    assert (found["chosen"][10], found["chosen"][11], found["chosen"][-1]) == (1, 1, 1)
    assert (found["rejected"][0], found["rejected"][10]) == (1, 1)
    same = histogram(torch.ones(2), torch.ones(1))
    assert sum(same["chosen"]) == 2
