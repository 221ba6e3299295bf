"""The whole pipeline on real text, from a random model to policies compared on held-out rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data" / "debian_summaries.jsonl"
OVERRIDES = ["epochs=1", "log.progress=false"]


def python(script: str, *words: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole pipeline."""
    if not DATA.exists():
        pytest.skip(f"needs {DATA.name}, which is kept outside the repository")
    folder = tmp_path_factory.mktemp("pipeline")
    python("scripts/study/small_llama.py", "--data", DATA, "--out", folder / "base", *OVERRIDES)
    python(
        "examples/summaries_pipeline.py",
        *("--data", DATA, "--out", folder, "--model", folder / "base" / "final"),
        *("--configs", ROOT / "configs" / "study", "--words", 80, "--rows", 2500),
        *("--sft-epochs", 4, "--steps", 40, "--batch-size", 32),
    )
    return folder


@pytest.mark.slow
def test_the_reward_model_knows_held_out_pairs(out: Path) -> None:
    rows = [json.loads(line) for line in (out / "reward" / "metrics.jsonl").open()]
    assert rows[-1]["eval_accuracy"] > 0.75


@pytest.mark.slow
def test_both_policies_beat_the_sft_model(out: Path) -> None:
    results: dict[str, Any] = json.loads((out / "evaluation" / "results.json").read_text())
    against_sft = {found["policy"]: found["differences"] for found in results["comparisons"]}
    assert set(against_sft) == {"ppo", "ma_ppo"}
    for differences in against_sft.values():
        assert differences["score"]["low"] > 0
        assert "rouge_l" in differences
