"""Where an update's time goes: tokens per second by phase, compared with the arithmetic floor.

    python benchmarks/phases.py --model PATH [--shapes 4x32 16x32 64x32 16x128 ...] [--prompt 64]
                                [--updates 2] [--json FILE]

A shape is responses x tokens, all of full length. Every phase is timed by the trainer itself, full
fine-tuning with a critic, and the best of the counted updates stands. Its floor is the operations
of its passes (a backward pass counts as two) at this machine's best rate of matrix products; that
of sampling is memory bandwidth where that takes longer: each token reads all weights. `share` is
floor / seconds. Segmenting has no passes, so no floor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from floors import english, generation_bytes, matmul_rate, read_rate, update_flops
from transformers import AutoModelForCausalLM, AutoTokenizer

from marlhf import PPOTrainer
from marlhf.config import PPOConfig
from marlhf.config.loading import config_from_dict

SHAPES = ["4x32", "16x32", "64x32", "4x128", "16x128", "4x512"]
PHASES = ("generate", "score", "segment", "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="directory or hub name")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="responses x tokens")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--updates", type=int, default=2, help="counted updates of each shape")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model)
    print(f"{'shape':8} {'phase':9} {'seconds':>8} {'tokens/s':>9} {'floor s':>8} {'share':>6}")
    rows = [row for shape in options.shapes for row in measure(model, shape, options)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(model: Any, shape: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds, response tokens per second and share of the floor of every phase; prints them."""
    B, T = map(int, shape.split("x"))
    # the machine's rates are measured again: on a shared one they change
    flops, rate, memory = update_flops(model, B, options.prompt, T), matmul_rate(), read_rate()
    floors = {phase: work / rate for phase, work in flops.items()}
    read = update_flops(model, B, options.prompt, 0)["generate"]
    stepped = (flops["generate"] - read) / rate
    traffic = generation_bytes(model, B, options.prompt, T) / memory
    floors["generate"] = read / rate + max(stepped, traffic)

    rows = []
    for phase, seconds in timed(B, T, options).items():
        floor = floors.get(phase)
        row = {"shape": shape, "phase": phase, "seconds": seconds, "tokens_per_second": 0.0}
        row |= {"floor": floor, "share": None if floor is None else floor / seconds}
        row["tokens_per_second"] = B * T / seconds if seconds else None
        floor_text = "" if floor is None else f"{floor:8.2f} {floor / seconds:6.0%}"
        print(f"{shape:8} {phase:9} {seconds:8.3f} {B * T / max(seconds, 1e-9):9.0f} {floor_text}")
        rows.append(row)
    return rows


def timed(B: int, T: int, options: argparse.Namespace) -> dict[str, float]:
    """Least seconds of every phase over some updates, the first not counted."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = english(tokenizer, B, options.prompt + 8)  # longer prompts are cut to size
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "model": {"path": options.model},
            "output_dir": folder,
            "steps": options.updates + 1,
            "rollout": {
                "batch_size": B,
                "max_prompt_length": options.prompt,
                "max_new_tokens": T,
                "min_new_tokens": T,
            },
            "data": {"eval_rows": 0},
            "log": {"eval_every": 0, "progress": False, "tensorboard": False},
            "checkpoint": {"every": 0},
            "ppo": {"epochs": 1, "minibatches": 1},
        }
        trainer = PPOTrainer(
            config_from_dict(PPOConfig, values),
            reward=lambda prompts, completions, **_: [float(len(c)) for c in completions],
            train_dataset=tokenizer.batch_decode(ids),
        )
        steps = [trainer.step(trainer.stream.batch(i, B)) for i in range(options.updates + 1)]
    return {phase: min(step[f"{phase}_seconds"] for step in steps[1:]) for phase in PHASES}


if __name__ == "__main__":
    main()
