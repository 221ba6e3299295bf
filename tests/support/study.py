"""Runs of the study made by hand, whose numbers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

ARMS = {
    "token": {"segmenter": "token"},
    "fast": {"segmenter": {"name": "ngram", "n": 5}},
    "slow": {"segmenter": "sequence"},
}
RATES = {"token": 0.02, "fast": 0.04, "slow": 0.005}  # of held-out reward an update
KLS = {"token": 2.0, "fast": 2.1, "slow": 3.0}
STEPS, EVERY = 20, 2
SHARES = {
    "arm": "token, lambda 1",
    "noise": 30.64,
    "noise_half": 8.0,
    "weighted": 14.3,
    "weighted_half": 3.0,
    "lam": 0.95,
    "groups": [
        {"from": 0, "signal": 0.875, "signal_half": 0.1, "noise": 0.04, "noise_half": 0.004},
        {"from": 1, "signal": 0.125, "signal_half": 0.1, "noise": 0.26, "noise_half": 0.02},
        {"from": 4, "signal": None, "signal_half": None, "noise": 0.7, "noise_half": 0.02},
    ],
}


def rows(rate: float, kl: float, seed: int) -> list[dict[str, Any]]:
    """Reward rises evenly, a little higher for later seeds; an update takes 2 seconds."""
    noise = 0.01 * seed
    found: list[dict[str, Any]] = [{"step": 0, "eval_score_mean": noise, "eval_kl_mean": 0.0}]
    for step in range(1, STEPS + 1):
        row = {"step": step, "step_seconds": 2.0, "advantage_std": 0.5, "value_loss": 1 / 3}
        row |= {"explained_variance": step / STEPS, "macro_length_mean": 1.0 + step}
        row |= {"unwanted": 1.0, "score_mean": rate * step}
        if step % EVERY == 0:
            row |= {"eval_score_mean": rate * step + noise, "eval_kl_mean": kl + noise}
        found.append(row)
    return found


def write_task(folder: Path) -> Path:
    """A task of three arms and three seeds as `run.py` leaves it; returns its file."""
    for arm in ARMS:
        for seed in (8, 9):
            label = f"{arm}, optimizer.learning_rate=0.1"
            write_trial(folder / "toy" / "search" / arm / f"seed-{seed}", label, arm, seed)
        for seed in range(3):
            write_trial(folder / "toy" / "final" / arm / f"seed-{seed}", arm, arm, seed)
    (folder / "toy" / "final.yaml").write_text("threads: 2\n")
    (folder / "toy" / "chosen.json").write_text(json.dumps({"token": {"learning_rate": 0.1}}))
    (folder / "toy" / "gradient.json").write_text(
        json.dumps({"token": {"noise": 4.0, "noise_half": 1.0, "cosine": None}})
    )
    (folder / "toy" / "shares.json").write_text(json.dumps(SHARES))
    settings = {"learning_rates": [0.1], "arms": ARMS, "curves": ["token", "fast"], "optimum": 0.5}
    (folder / "toy.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return folder / "toy.yaml"


def write_trial(folder: Path, label: str, arm: str, seed: int) -> None:
    folder.mkdir(parents=True)
    config = {
        "model": {"path": "/home/somebody/model"},
        "optimizer": {"learning_rate": 0.1},
        "kl": {"coef": 0.05},
        "seed": seed,
        "output_dir": str(folder),
        **ARMS[arm],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    status = {"arm": label, "state": "done", "seconds": 90.0}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(status))
    lines = [json.dumps(row) + "\n" for row in rows(RATES[arm], KLS[arm], seed)]
    (folder / "metrics.jsonl").write_text("".join(lines))
