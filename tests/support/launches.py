"""Runs of `two_ranks.py` in processes of their own, and the comparison of two of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from support import warm_python
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm

SCRIPT = Path(__file__).parent / "two_ranks.py"
PROFILES = Path(__file__).parents[2] / "configs" / "accelerate"
TIMES = ("_seconds", "_per_second", "peak_memory_gb")
BASE: dict[str, Any] = {
    "steps": 3,
    "log": {"eval_every": 2, "samples": 2},
    "optimizer": {"micro_batch_size": 2, "eps": 0.1},
}


def torchrun(ranks: int) -> list[str]:
    """What starts that many ranks, without accelerate's configuration."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


def accelerate(profile: Path) -> list[str]:
    """What starts the ranks of an accelerate profile."""
    launcher = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    return [*launcher, "--config_file", str(profile)]


def sharding_everything(folder: Path, **keys: Any) -> Path:
    """A ZeRO-3 profile that shards the small weights too, all that a tiny model has; `keys` are
    further ones of DeepSpeed's section."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **keys}
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    profile = yaml.safe_load((PROFILES / "zero3.yaml").read_text())
    profile["deepspeed_config"] = {"deepspeed_config_file": str(folder / "zero.json")}
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile))
    return folder / "profile.yaml"


def ppo_folder(folder: Path, reward: str, **keys: Any) -> Path:
    """A folder with `my_run.yaml`: one update of 4 prompts, rewarded by the `score` of `reward`."""
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(folder / "model")
    byte_tokenizer(add_bos=True).save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text('{"prompt": "hello"}\n' * 8)
    (folder / "rewarding.py").write_text(reward)
    config = {
        "model": {"path": "model"},
        "data": {"path": "prompts.jsonl", "eval_rows": 0},
        "output_dir": "run",
        "steps": 1,
        "rollout": {"batch_size": 4, "max_new_tokens": 4},
        "reward": {"models": "rewarding.score"},
        "log": {"tensorboard": False, "progress": False},
        "checkpoint": {"every": 0},
    }
    (folder / "my_run.yaml").write_text(yaml.safe_dump({**config, **keys}))
    return folder


def run(
    command: Sequence[str],
    timeout: float = 240,
    folder: Path | None = None,
    warm: bool = True,
) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` in a folder, its output kept.

    warm   all its processes fork from one that has imported everything (`warm_python`)
    """
    python = warm_python.command() if warm else sys.executable
    return subprocess.run(
        [python, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python},
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=folder,
    )


def first_error(done: subprocess.CompletedProcess[str]) -> str:
    """What a launch says from its first error on: what torchrun and the other ranks add comes
    after that, and may be as long as it likes."""
    text = done.stderr
    signs = ("Traceback", "marlhf: ", "terminate called", "Fatal Python error")
    places = [place for sign in signs if (place := text.find(sign)) >= 0]
    return f"exit status {done.returncode}: {text[min(places, default=0) :][:6000]}"


def launch(
    folder: Path, launcher: Sequence[str], sections: dict[str, Any], warm: bool = True
) -> dict[str, Any]:
    """Run two_ranks.py to its end; returns what it says of the launch."""
    folder.mkdir()
    if "ptx" in sections:
        texts = folder / "texts.jsonl"
        texts.write_text("".join(f'{{"text": "text {"more " * i}"}}\n' for i in range(9)))
        sections = {**sections, "ptx": {**sections["ptx"], "path": str(texts)}}
    arguments = [str(folder), json.dumps({**BASE, **sections})]
    done = run([*launcher, str(SCRIPT), *arguments], warm=warm)
    assert done.returncode == 0, first_error(done)
    return json.loads((folder / "launch.json").read_text())


def assert_the_same(folder: Path, wanted: Path) -> None:
    """Two runs gave the same samples, the same metrics but for times, and the same weights."""
    assert responses(folder) == responses(wanted)
    pairs = list(zip(metrics(folder), metrics(wanted), strict=True))
    assert len(pairs) > 1
    for row, wanted_row in pairs:
        numbers = {name: value for name, value in wanted_row.items() if value is not None}
        assert {name for name in row if row[name] is not None} == set(numbers)
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)
    found, expected = weights(folder), weights(wanted)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)


def responses(folder: Path) -> list[tuple[int, int, str]]:
    """`(step, row, response)` of the samples of the updates."""
    samples = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    found = [(s["step"], s["row"], s["response"]) for s in samples if not s["held_out"]]
    assert found
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times and memory."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of `final/`, read with plain transformers, and the critic's."""
    policy = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
    critic = torch.load(folder / "critic.pt")
    return {**policy, **{f"critic.{name}": value for name, value in critic.items()}}
