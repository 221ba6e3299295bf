"""The models and the data of the study's task on summaries, one stage after another.

    python scripts/study/summaries_task.py --data summaries.jsonl --out runs/study/summaries

The data has rows with a `document` and a human `summary`. A small Llama learns the language of the
documents (small_llama.py); it is fine-tuned for a few steps on summaries of the first words of
documents, so that it has seen what a summary looks like and is not good at it; of what it then
writes, and of people's summaries, preference pairs are made, and of these a reward model (all this
by examples/summaries_pipeline.py). Started again, it resumes where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from small_llama import documents, pretrain

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "examples" / "summaries_pipeline.py"


def main() -> None:
    """Run every stage that is not done, and say how good the reward model is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="JSONL: document, summary")
    parser.add_argument("--out", type=Path, default=Path("runs/study/summaries"))
    parser.add_argument("--rows", type=int, default=9000, help="rows to use of the data")
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=100, help="rows of SFT and reward model")
    parser.add_argument("pretraining", nargs="*", help="keys of configs/study/pretrain.yaml")
    args = parser.parse_intermixed_args()
    base = args.out / "base"
    if not (base / "final").exists():
        pretrain(documents(args.data), base, args.pretraining)
    options: dict[str, object] = {
        "--data": args.data,
        "--model": base / "final",
        "--configs": ROOT / "configs" / "study",
        "--out": args.out,
        "--rows": args.rows,
        "--first-words": 20,
        "--test-rows": args.test_rows,
        "--held-out": args.held_out,
        "--sft-epochs": 0.11,  # 6 steps
    }
    words = [str(word) for option in options.items() for word in option]
    words += ["--samples-only", "--no-ppo"]
    subprocess.run([sys.executable, str(PIPELINE), *words], check=True)
    print(f"reward model: {accuracy(args.out / 'reward'):.1%} of held-out pairs right")


def accuracy(run: Path) -> float:
    """The last held-out accuracy of a reward model."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["eval_accuracy"] for row in rows if "eval_accuracy" in row][-1]


if __name__ == "__main__":
    main()
