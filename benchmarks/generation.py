"""Sampling: tokens per second, compared with transformers' `generate` with its default cache.

    python benchmarks/generation.py --model PATH [--batch 8] [--prompt 64] [--new 48] [--rounds 5]
                                    [--cases NAME ...] [--precision fp32|bf16] [--cpu-clock]
                                    [--json FILE]

Three cases: responses of full length; four responses to each prompt; and responses of mixed length
(geometric, mean a quarter of the limit, which is twice `--new`), at the same lengths on both sides.
Measures of ours are also left out, one at a time. Sides take turns within every round,
the first round is not counted, and the best of each is what it can do. On a
machine that others use, `--cpu-clock` with OMP_NUM_THREADS=1 counts the process's own time.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from marlhf.config import RolloutSettings
from marlhf.models import decoding
from marlhf.models.policy import Policy
from marlhf.rollout import packed_weights, transformers_engine


class EndAt(StoppingCriteria):
    """Ends each row at a length known beforehand."""

    def __init__(self, lengths: torch.Tensor, prompt: int) -> None:
        self.lengths, self.prompt = lengths, prompt

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids.shape[1] - self.prompt >= self.lengths


def transformers_side(model: Any, prompts: torch.Tensor, lengths: torch.Tensor) -> None:
    """Its `generate`, sampling from all tokens."""
    limit = int(lengths.max())
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=limit, pad_token_id=0)
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([EndAt(lengths, prompts.shape[1])]),
    )


def our_side(model: Any, tokenizer: Any, prompts: torch.Tensor, lengths: torch.Tensor) -> None:
    """`marlhf.rollout.transformers_engine.generate`."""
    rows = prompts.tolist()
    active = list(range(len(rows)))  # rows in the batch, as `generate` keeps them

    def ends(sampler: Any, response_ids: torch.Tensor) -> torch.Tensor:
        t = response_ids.shape[1]
        if len(response_ids) < len(active):
            active[:] = [row for row in active if lengths[row] > t - 1]
        return lengths[active] <= t

    settings = RolloutSettings(max_new_tokens=int(lengths.max()))
    with patch.object(transformers_engine.Sampler, "ends", ends):
        seeds = range(len(rows))
        sampled = transformers_engine.generate(Policy(model), tokenizer, rows, seeds, settings)
    assert torch.equal(sampled.lengths, lengths)


def growing_cache(cache: Any, indices: torch.Tensor, room: int) -> None:
    """transformers' own layers, which concatenate at every token, instead of preallocated ones."""
    cache.reorder_cache(indices)


@contextmanager
def separate_products() -> Iterator[None]:
    """Layers with the same input, each as a product of its own."""
    packed = packed_weights.packed
    apart = lambda groups, *rest: packed([[x] for g in groups for x in g], *rest)  # noqa: E731
    with patch.object(transformers_engine, "packed", apart):
        yield


WITHOUT: dict[str, Callable[[], Any]] = {
    "packed weights": lambda: patch.object(packed_weights, "FEWEST_TOKENS", math.inf),
    "shared products": separate_products,
    "preallocated cache": lambda: patch.object(decoding, "preallocate", growing_cache),
}


NOT_COMPACTED = {
    "compaction": lambda: patch.object(transformers_engine, "_COMPACT_AT", math.inf),
}


def best(sides: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, float]:
    """Least seconds of each side."""
    clock = time.process_time if options.cpu_clock else time.perf_counter
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16")
    seconds = dict.fromkeys(sides, math.inf)
    for round_ in range(options.rounds + 1):
        for name, side in sides.items():
            start = clock()
            with autocast:
                side()
            if round_:
                seconds[name] = min(seconds[name], clock() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="directory or hub name")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens of each response")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", help="of these alone")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--cpu-clock", action="store_true", help="CPU seconds; with one thread")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    print(f"{'case':12} {'side':26} {'seconds':>8} {'tokens/s':>9} {'ratio':>6}")
    results = measure(model, tokenizer, options)
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": None} | results, indent=1))


def measure(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, tokens per second and speed-up over transformers, by case and side; printed."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.prompt)
    prompts = torch.randint(10, model.config.vocab_size, shape, generator=generator)
    full = torch.full((options.batch,), options.new)
    uniform = torch.rand(options.batch, generator=generator, dtype=torch.float64)
    mixed = (uniform.log() / math.log1p(-2 / options.new)).ceil().long()
    cases = {
        "full length": (prompts, full, WITHOUT),
        "4 per prompt": (prompts[: -(-options.batch // 4)].repeat(4, 1), full, {}),
        "mixed length": (prompts, mixed.clamp(1, 2 * options.new), NOT_COMPACTED),
    }
    results: dict[str, Any] = {}
    for case in options.cases or cases:
        rows, lengths, without = cases[case]
        lengths = lengths[: len(rows)]
        ours = partial(our_side, model, tokenizer, rows, lengths)
        sides = {"transformers": partial(transformers_side, model, rows, lengths), "marlhf": ours}
        for name, how in without.items():
            sides[f"without {name}"] = partial(left_out, how, ours)
        tokens, seconds = int(lengths.sum()), best(sides, options)
        results[case] = {}
        for name, s in seconds.items():
            rate, ratio = tokens / s, seconds["transformers"] / s
            results[case][name] = {"seconds": s, "tokens_per_second": rate, "ratio": ratio}
            print(f"{case:12} {name:26} {s:8.2f} {rate:9.1f} {ratio:6.2f}", flush=True)
    return results


def left_out(how: Callable[[], Any], run: Callable[[], None]) -> None:
    """Run without one of the measures."""
    with how():
        run()


if __name__ == "__main__":
    main()
