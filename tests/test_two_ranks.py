"""Two real processes against one: the same samples, metrics and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parent / "two_ranks.py"
TIMES = ("_seconds", "tokens_per_second", "peak_memory_gb")
BASE: dict[str, Any] = {
    "steps": 3,
    "log": {"eval_every": 2, "samples": 2},
    "optimizer": {"micro_batch_size": 2, "eps": 0.1},
}
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
        "optimizer": {"micro_batch_size": 2, "learning_rate": 0.02},
    },
    "token rewards": {
        "reward": {"tokens": [{"name": "curiosity", "weight": 0.5, "learning_rate": 0.01}]},
    },
    "lora": {"model": {"lora": {"r": 4}}},
}


def launch(folder: Path, ranks: int, sections: dict[str, Any]) -> list[dict[str, Any]]:
    folder.mkdir()
    if "ptx" in sections:
        texts = folder / "texts.jsonl"
        texts.write_text("".join(f'{{"text": "text {"more " * i}"}}\n' for i in range(9)))
        sections = {**sections, "ptx": {**sections["ptx"], "path": str(texts)}}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), str(SCRIPT)]
    done = subprocess.run(
        [*command, str(folder), json.dumps({**BASE, **sections})],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "world_size").read_text() == str(ranks)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(TIMES)} for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_do_what_one_does(case: str, tmp_path: Path) -> None:
    alone = launch(tmp_path / "one", 1, CASES[case])
    together = launch(tmp_path / "two", 2, CASES[case])
    assert [row["step"] for row in together] == [0, 1, 2, 3]
    for row, wanted in zip(together, alone, strict=True):
        numbers = {name: value for name, value in wanted.items() if value is not None}
        assert {name for name in row if row[name] is not None} == set(numbers)
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)
    one, two = (
        {
            **AutoModelForCausalLM.from_pretrained(tmp_path / name / "final").state_dict(),
            **{f"critic.{k}": v for k, v in torch.load(tmp_path / name / "critic.pt").items()},
        }
        for name in ("one", "two")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0, msg=name)
