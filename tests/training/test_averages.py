"""Averages of the policy loss in a run: no split into micro-batches changes the update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import PROMPTS, tiny_config, tiny_trainer

OPTIONS: dict[str, dict[str, Any]] = {
    "response": {"ppo": {"aggregate": "response"}, "kl": {"where": "loss"}},
    "constant": {"ppo": {"aggregate": "constant", "clip_range": [0.1, 0.3], "dual_clip": 3.0}},
    "response, by macro actions": {
        "ppo": {"aggregate": "response"},
        "macro": {"ratio": "macro_product"},
    },
}


@pytest.mark.parametrize("case", OPTIONS)
def test_micro_batches_do_not_matter(case: str, tmp_path: Path) -> None:
    outcomes = []
    for size in (8, 3):
        sections = OPTIONS[case] | {"optimizer": {"micro_batch_size": size, "eps": 0.1}}
        trainer = tiny_trainer(tmp_path / str(size), **sections)
        row = trainer.step(PROMPTS)
        outcomes.append((row["policy_loss"], dict(trainer.policy.model.named_parameters())))
    (loss, weights), (other_loss, other_weights) = outcomes
    assert loss == pytest.approx(other_loss, abs=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("ppo", "line"),
    [
        ({"clip_range": [0.2]}, "clip_range"),
        ({"clip_range": [0.2, -0.1]}, "clip_range"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"aggregate": "sequence"}, "aggregate"),
    ],
)
def test_bad_options_are_refused_by_name(ppo: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=line):
        tiny_config(tmp_path, ppo=ppo)
