"""Kill runs of the command line at random moments, resume them, compare what they have written.

    python tests/support/kill_and_resume.py --kills 50
    python tests/support/kill_and_resume.py --kills 20 --ranks 2
    python tests/support/kill_and_resume.py --kills 20 --profile configs/accelerate/zero2.yaml
    python tests/support/kill_and_resume.py --kills 20 model.lora.r=4

A tiny random model is trained by `marlhf ppo ... resume=auto`. A run is killed (kill -9, all
its processes) after a random time between 0 and what a whole run takes, started again, and so
on until it comes to its end; then metrics.jsonl, samples.jsonl, TensorBoard's scalars and the final
weights must be those of a run that was never killed. New runs follow until there were enough kills.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import yaml

from support.launches import accelerate, torchrun
from support.runs import PROMPTS
from support.runs_that_die import contents
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm


def prepare(work: Path) -> Path:
    """A model, prompts and a configuration; the configuration's path."""
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(work / "model")
    byte_tokenizer(add_bos=True).save_pretrained(work / "model")
    rows = [json.dumps({"prompt": f"{text} {i}"}) for i in range(6) for text in PROMPTS]
    (work / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    config = {
        "model": {"path": str(work / "model")},
        "data": {"path": str(work / "prompts.jsonl"), "eval_rows": 6},
        "reward": {"models": {"name": "length", "target": 5}},
        "rollout": {"batch_size": 8, "max_new_tokens": 8, "max_prompt_length": 24},
        "ppo": {"minibatches": 2, "epochs": 2},
        "kl": {"target": 2.0, "horizon": 100},
        "optimizer": {"learning_rate": 1e-3, "micro_batch_size": 2},
        "log": {"eval_every": 3, "samples": 2, "progress": False},
        "checkpoint": {"every": 4, "keep": 2},
        "steps": 60,
        "resume": "auto",
    }
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    return work / "config.yaml"


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, f"output_dir={folder}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill(pid: int) -> None:
    """A process and all that it has started: a launcher's ranks would live on."""
    launcher = psutil.Process(pid)
    for process in [launcher, *launcher.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def step_reached(folder: Path) -> int:
    """Whole rows of metrics.jsonl after step 0."""
    file = folder / "metrics.jsonl"
    return max(0, file.read_bytes().count(b"\n") - 1) if file.exists() else 0


def weights(folder: Path) -> dict[str, bytes]:
    """Of the model, or of its adapter, in `final/`."""
    found = {file.name: file.read_bytes() for file in (folder / "final").glob("*.safetensors")}
    assert found
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, help="of accelerate, instead of --ranks")
    parser.add_argument("overrides", nargs="*", help="keys of the run, such as model.lora.r=4")
    options = parser.parse_args()
    launcher = torchrun(options.ranks) if options.ranks > 1 else []
    launcher = accelerate(options.profile) if options.profile else launcher
    draw = random.Random(options.seed)
    work = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    job = ["-m", "marlhf", "ppo", str(prepare(work)), *options.overrides]
    command, began = [sys.executable, *launcher, *job], time.monotonic()
    whole = start(command, work / "whole")
    assert whole.wait() == 0, whole.stderr and whole.stderr.read()
    seconds = time.monotonic() - began
    wanted = contents(work / "whole")
    print(f"a whole run: {seconds:.0f} s, {len(wanted['metrics'])} rows", flush=True)
    kills, runs, when = 0, 0, Counter[str]()
    while kills < options.kills:
        folder = work / f"run-{runs}"
        while True:
            began, limit = time.monotonic(), draw.uniform(0, seconds)
            process = start(command, folder)
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                kill(process.pid)
                process.wait()
                reached, kills = step_reached(folder), kills + 1
                partial = list(folder.glob("checkpoints/*.partial"))
                kind = "in a checkpoint" if partial else "in updates" if reached else "before any"
                when[kind] += 1
                print(f"kill {kills}: after {limit:.1f} s, row {reached}, {kind}", flush=True)
                continue
            assert status == 0, process.stderr and process.stderr.read()
            break
        found = contents(folder)
        for part, value in wanted.items():
            assert found[part] == value, f"{part} of {folder} differ from {work / 'whole'}"
        assert weights(folder) == weights(work / "whole"), f"weights of {folder} differ"
        runs += 1
        print(f"run {runs} is what it would have been after {kills} kills", flush=True)
    print(f"{kills} kills in {runs} runs: no difference ({dict(when)})")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
