"""`sft` and `reward` with a base in 4 bits on two ranks under ZeRO, against one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.launches import (
    PROFILES,
    accelerate,
    first_error,
    metrics,
    run,
    sharding_everything,
)
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm

WORDS = ["you", "and me", "all of them", "nobody", "I"]
COLUMNS = {"sft": ("completion",), "reward": ("chosen", "rejected")}


def final(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of `final/`."""
    return load_file(folder / "final" / "model.safetensors")


def two_steps(folder: Path, job: str, name: str, launcher: Sequence[str]) -> Path:
    """Two optimiser steps of two micro-batches on each rank, with an evaluation after each."""
    config = {
        "model": {"path": "model", "lora": {"r": 4}, "quantization": {"bits": 4}},
        "data": {"path": "rows.jsonl", "eval_rows": 4},
        "output_dir": name,
        "steps": 2,
        "batch_size": 4,
        "max_length": 48,
        "optimizer": {"learning_rate": 0.02, "micro_batch_size": 1, "eps": 0.1},
        "log": {"progress": False, "tensorboard": False, "eval_every": 1},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    done = run([*launcher, "-m", "marlhf", job, f"{name}.yaml"], folder=folder)
    assert done.returncode == 0, first_error(done)
    return folder / name


@pytest.mark.parametrize("job", COLUMNS)
def test_a_base_in_4_bits_is_trained_on_as_in_one_process(job: str, tmp_path: Path) -> None:
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(tmp_path / "model")
    byte_tokenizer(add_bos=True).save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": "hello" * (i % 3 + 1)}
        | {column: f" {WORDS[(i + k) % 5]}" for k, column in enumerate(COLUMNS[job])}
        for i in range(16)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = two_steps(tmp_path, job, "alone", [])
    losses = [row["eval_loss"] for row in metrics(alone) if "eval_loss" in row]
    assert max(losses) - min(losses) > 1e-2  # it learns
    assert list((alone / "final" / "adapter").glob("*/quantization_config.json"))
    profiles = {"zero2": PROFILES / "zero2.yaml", "zero3": sharding_everything(tmp_path)}
    for name, profile in profiles.items():
        folder = two_steps(tmp_path, job, name, accelerate(profile))
        assert (folder / "checkpoints" / "step-2" / "rank-1.pt").exists()
        for row, expected in zip(metrics(folder), metrics(alone), strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-5), name
        weights = final(folder)
        for part, weight in final(alone).items():
            torch.testing.assert_close(weights.pop(part), weight, atol=1e-5, rtol=0, msg=part)
        assert not weights
