"""Statistics of an update's report, against torch's own."""

from __future__ import annotations

import pytest
import torch

from marlhf.training.diagnostics import correlation, explained_variance, moments


def test_explained_variance() -> None:
    returns, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.0, 2.0])
    error = returns - values
    wanted = 1 - error.var(correction=0) / returns.var(correction=0)
    sums = moments(returns, error)
    assert explained_variance(sums.tolist()) == pytest.approx(float(wanted))
    constant = torch.ones(3)
    assert explained_variance(moments(constant, constant - values).tolist()) is None
    assert explained_variance([0.0] * 6) is None


def test_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 50, generator=generator)
    y = y + x
    wanted = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert correlation(moments(x, y).tolist()) == pytest.approx(wanted)
    assert correlation(moments(x, -y).tolist()) == pytest.approx(-wanted)
    assert correlation(moments(x, torch.ones(50)).tolist()) is None


def test_sums_of_parts_add_up_to_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 20, generator=generator)
    whole = correlation(moments(x, y).tolist())
    parts = moments(x[:7], y[:7]) + moments(x[7:], y[7:])
    assert correlation(parts.tolist()) == pytest.approx(whole)
