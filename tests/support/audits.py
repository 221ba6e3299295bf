"""A tiny finished run on disk that can be audited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from marlhf.cli import main
from marlhf.config import PPOConfig
from marlhf.config.loading import config_from_dict, merge
from marlhf.training.ppo import PPOTrainer
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm

PROMPTS = [f"{a}{b}" for a in "abcdefghij" for b in ("", " x", " yes")]


def build_model(folder: Path) -> Path:
    """A policy and prompts in a folder."""
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(folder / "model")
    byte_tokenizer(add_bos=True).save_pretrained(folder / "model")
    rows = [{"prompt": text} for text in PROMPTS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(
    folder: Path,
    name: str = "run",
    change: Callable[[Any], None] | None = None,
    **changes: Any,
) -> Path:
    """A run of one update on the model in a folder, of four tokens a response.

    change   what happens to the trainer before its checkpoint is written
    """
    values: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "data.jsonl"), "eval_rows": 20},
        "output_dir": str(folder / name),
        "steps": 1,
        "segmenter": {"name": "ngram", "n": 2},
        "reward": {"models": "support.audits.letters"},
        "rollout": {"batch_size": 8, "max_new_tokens": 4, "top_k": 2, "min_new_tokens": 4},
        "kl": {"coef": 0.1},
        "critic": {"init": "policy"},
        "optimizer": {"learning_rate": 1e-3, "micro_batch_size": 4},
        "checkpoint": {"every": 1},
        "log": {"eval_every": 0, "tensorboard": False, "progress": False, "samples": 0},
    }
    trainer = PPOTrainer(config_from_dict(PPOConfig, merge(values, changes)))
    trainer.run_dir.open(trainer.config, 1)
    trainer.step(trainer.stream.batch(0, 8))
    if change is not None:
        with torch.no_grad():
            change(trainer)
    trainer.state.save(trainer.run_dir.checkpoints, 1, None)
    trainer.engine.close()
    trainer.run_dir.close()
    return folder / name


def letters(prompts: list[str], completions: list[str]) -> list[float]:
    """A number that every character of the response decides on, the later the less."""
    return [sum((ord(c) % 7 - 3) / (i + 1) for i, c in enumerate(text)) for text in completions]


def audit(run: Path, *words: str) -> dict[str, Any]:
    """Audit a run by the command; returns audit.json."""
    main(["audit", str(run), *words])
    output = words[words.index("--output") + 1] if "--output" in words else run / "audit"
    return json.loads((Path(output) / "audit.json").read_text())


def return_to_go(inputs: Any) -> Any:
    """An estimator of an outsider: the discounted return from each macro action on."""
    from marlhf import Credit
    from marlhf.algorithm.advantages import gae

    zeros = torch.zeros_like(inputs.rewards_BM)
    to_go, _ = gae(inputs.rewards_BM, zeros, inputs.mask_BM, inputs.discounts_BM, 1.0)
    return Credit(to_go)
