"""Folders of runs written by hand, for reports about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def write_run(folder: Path, rows: Any = (), samples: Any = (), **config: Any) -> Path:
    """A run's folder, made by hand. Rows are objects, or texts that are written as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name, lines in (("metrics", rows), ("samples", samples)):
        texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
        (folder / f"{name}.jsonl").write_text("".join(texts), encoding="utf-8")
    return folder


def learning(rate: float, steps: int = 20, noise: float = 0.0) -> list[dict[str, Any]]:
    """Rows of a run whose held-out reward rises by `rate` a step, evaluated every second step."""
    rows: list[dict[str, Any]] = [{"step": 0, "eval_score_mean": 0.0, "eval_kl_mean": 0.0}]
    for step in range(1, steps + 1):
        row = {"step": step, "score_mean": rate * step + noise, "kl_mean": 0.1 * step}
        row |= {"step_seconds": 2.0, "generate_seconds": 1.0, "entropy": 2.0}
        if step % 2 == 0:
            row |= {"eval_score_mean": rate * step + noise, "eval_kl_mean": 0.1 * step}
        rows.append(row)
    return rows


def sample(step: int, row: int, held_out: bool = True, **more: Any) -> dict[str, Any]:
    pieces = ["<b>One</b> two", ",\nthree", ""]
    return {
        "step": step,
        "held_out": held_out,
        "row": row,
        "prompt": f"prompt {row} " + "long " * 100 * (row == 1),
        "response": "".join(pieces),
        "macro_actions": pieces,
        "macro_lengths": [3, 2, 1],
        "macro_advantages": [0.5, -1.0, 0.0],
        "score": 0.25 * step,
        "kl": 1.5,
        "finished": row != 2,
    } | more


def some_runs(folder: Path, seeds: int = 3) -> list[str]:
    """Two configurations over seeds, the macro one twice as fast."""
    paths = []
    for name, spec, rate in (("token", "token", 0.02), ("ngram", {"name": "ngram", "n": 5}, 0.04)):
        for seed in range(seeds):
            samples = [sample(step, row) for step in (0, 20) for row in range(3)]
            samples += [sample(20, row, held_out=False) for row in range(2)]
            path = write_run(
                folder / f"{name}-{seed}",
                learning(rate, noise=0.01 * seed),
                samples,
                seed=seed,
                output_dir=f"elsewhere/{name}-{seed}",
                steps=20,
                segmenter=spec,
                kl={"coef": 0.05},
                log={"samples": seed},
            )
            paths.append(str(path))
    return paths
