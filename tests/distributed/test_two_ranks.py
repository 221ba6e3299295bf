"""Two real processes against one: the same samples, metrics and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.launches import assert_the_same, launch, metrics, torchrun

CASES: dict[str, dict[str, Any]] = {
    "gae": {},
    "token whitening, macro losses": {
        "macro": {"whiten": "token", "ratio": "macro_product", "value_loss": "macro"},
        "reward": {"whiten": True},
    },
    "grpo": {"ppo": {"estimator": "grpo"}, "rollout": {"responses_per_prompt": 2}},
    "reinforce": {"ppo": {"estimator": "reinforce"}},
    "kl target, target_kl and ptx": {
        "ptx": {"batch_size": 6, "coef": 0.5, "max_length": 32},
        "kl": {"target": 0.5, "horizon": 8},
        "ppo": {"epochs": 4, "target_kl": 0.01},
        "optimizer": {"micro_batch_size": 2, "learning_rate": 0.01},
    },
    "token rewards": {
        "reward": {"tokens": [{"name": "curiosity", "weight": 0.5, "learning_rate": 0.01}]},
    },
    "lora": {"model": {"lora": {"r": 4}}},
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_do_what_one_does(case: str, tmp_path: Path) -> None:
    launch(tmp_path / "one", [], CASES[case])
    assert launch(tmp_path / "two", torchrun(2), CASES[case])["ranks"] == 2
    assert [row["step"] for row in metrics(tmp_path / "two")] == [0, 1, 2, 3]
    assert_the_same(tmp_path / "two", tmp_path / "one")
