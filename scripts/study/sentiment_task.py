"""The model of the study's task on sentiment: SmolLM2-135M, out of its package.

python scripts/study/sentiment_task.py --out runs/study/sentiment
"""

from __future__ import annotations

import argparse
from pathlib import Path

import smollm2


def main() -> None:
    """Write the model, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study/sentiment"))
    parser.add_argument("--model", type=Path, help="a folder with another .gguf file")
    args = parser.parse_args()
    print(smollm2.write(args.out / "base", args.model))


if __name__ == "__main__":
    main()
