"""The quickstart over several seeds, as the table of the README.

    python scripts/quickstart_seeds.py [--seeds 0 1 2] [--folder runs/seeds] [key.sub=value ...]

A seed whose run is complete in the folder is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/seeds"))
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_intermixed_args()
    table = []
    for seed in options.seeds:
        run = options.folder / f"seed{seed}"
        if not (run / "final").is_dir():
            command = [sys.executable, "-m", "marlhf", "quickstart"]
            arguments = ["--seed", str(seed), "--output", str(run), *options.overrides]
            subprocess.run([*command, *arguments], check=True)
        table.append(row(run))
    print("| seed | score before | score after | KL after (nats) | minutes of training |")
    print("|---|---|---|---|---|")
    for seed, values in zip(options.seeds, table, strict=True):
        print(f"| {seed} | " + " | ".join(shown(values)) + " |")
    print("| mean | " + " | ".join(shown([mean(c) for c in zip(*table, strict=True)])) + " |")


def row(run: Path) -> list[float]:
    """Held-out score before and after, KL after, and minutes in updates."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    evaluated = [r for r in rows if "eval_score_mean" in r]
    minutes = sum(r.get("step_seconds", 0.0) for r in rows) / 60
    first, last = evaluated[0], evaluated[-1]
    return [first["eval_score_mean"], last["eval_score_mean"], last["eval_kl_mean"], minutes]


def shown(values: list[float]) -> list[str]:
    before, after, kl, minutes = values
    return [f"{before:.3f}", f"{after:.3f}", f"{kl:.2f}", f"{minutes:.1f}"]


if __name__ == "__main__":
    main()
