"""Draw the picture at the top of the README: docs/macro_actions.png.

    python scripts/readme_picture.py --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct

Left: one response, cut by five segmenters. Right: held-out reward on the task with a known optimum,
from the runs of the study in docs/study/recall.jsonl.xz. Needs `pip install 'marlhf[demo]'`.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from marlhf.config import ModelSettings
from marlhf.models.loading import load_tokenizer
from marlhf.segmenters import NGram, Parsing, Sentence, Sequence, Token
from marlhf.views.inspector import Segmented, segment_texts

DOCS = Path(__file__).parent.parent / "docs"
TEXT = "When it rains, nobody sings. The quick brown fox waits under the old bridge."
FILLS = ("#cfe3f7", "#fbd9c0", "#d3edd5", "#e9d7f2")
CURVES = {
    "token": ("token-level PPO", "#0072b2", "-"),
    "token, lambda 0.95^(1/5)": ("token-level PPO, lambda 0.99", "#7aa6c2", "--"),
    "n-gram 5": ("macro actions: n-grams of 5", "#d55e00", "-"),
}


def draw_segments(axes: Any, segmented: Segmented, labels: list[str]) -> None:
    """One line of text per segmenter, a coloured box per macro action."""
    renderer = axes.figure.canvas.get_renderer()
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(len(labels), 0))
    for row, label in enumerate(labels):
        axes.text(0, row + 0.22, label, fontsize=9, color="#444444", va="center")
        x = 0.0
        for i, tokens in enumerate(segmented.macro_actions(row)):
            text = axes.text(
                x + 0.004,
                row + 0.6,
                segmented.written(tokens).strip(),
                fontsize=9.5,
                va="center",
                bbox={"boxstyle": "square,pad=0.25", "fc": FILLS[i % len(FILLS)], "ec": "none"},
            )
            box = text.get_window_extent(renderer).transformed(axes.transData.inverted())
            x = box.x1 + 0.014


def draw_curves(axes: Any) -> None:
    """Mean held-out reward over seeds, with a band of one standard error, of three arms."""
    with lzma.open(DOCS / "study" / "recall.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][1:]
    for arm, (label, colour, style) in CURVES.items():
        runs = [row for row in rows if row["phase"] == "final" and row["arm"] == arm]
        scores = np.array(
            [
                [np.nan if x is None else x for x in run["columns"]["eval_score_mean"]]
                for run in runs
            ]
        )
        measured = ~np.isnan(scores).all(0)
        steps = np.array(runs[0]["step"])[measured]
        mean = scores[:, measured].mean(0)
        error = scores[:, measured].std(0, ddof=1) / np.sqrt(len(runs))
        axes.plot(steps, mean, style, color=colour, label=label, linewidth=2)
        axes.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
    axes.set(xlabel="update", ylabel="held-out reward (optimum: 1)", xlim=(0, 100), ylim=(0, 1.05))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="hub name or directory")
    parser.add_argument("--pipeline", default="en_core_web_sm", help="spaCy pipeline")
    options = parser.parse_args()
    segmenters = {
        "token": Token(),
        "ngram": NGram(5),
        "parsing": Parsing(5, pipeline=options.pipeline),
        "sentence": Sentence(),
        "sequence": Sequence(),
    }
    tokenizer = load_tokenizer(ModelSettings(path=options.tokenizer))
    (segmented,) = segment_texts([TEXT], list(segmenters.values()), tokenizer)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.1), width_ratios=(1.75, 1), layout="constrained"
    )
    draw_curves(right)
    figure.canvas.draw()  # places the axes, in which texts are measured
    figure.set_layout_engine("none")
    draw_segments(left, segmented, list(segmenters))
    figure.savefig(DOCS / "macro_actions.png", dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
