"""Engines: tokens per second, and what an update of their weights costs.

    python benchmarks/engines.py --model PATH [--engines transformers vllm] [--dtypes fp32 bf16]
        [--sequences 8 32 128] [--tokens 64 256] [--prompt 64] [--rounds 2] [--json FILE]

Each engine and dtype runs in a process of its own, on the policy in PATH. Responses have full
length (EOS is never drawn), prompts are random tokens, and the first round is not counted. "sync"
is the time that `update_weights` takes for all weights, and its share of sync and sampling
together. vLLM needs its environment (`make test-vllm`); without it, give `--engines transformers`.
`generate_batch` is transformers' continuous batching, for comparison: it takes no seed for each
response, and so is no engine of ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULT = "RESULT "


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="directory, of a GGUF file too, or hub name")
    add("--engines", nargs="+", default=["transformers", "vllm"])
    add("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    add("--sequences", nargs="+", type=int, default=[8, 32, 128])
    add("--tokens", nargs="+", type=int, default=[64, 256], help="of each response")
    add("--prompt", type=int, default=64, help="tokens of each prompt")
    add("--rounds", type=int, default=2)
    add("--cache-gb", type=float, default=4.0, help="KV cache of vLLM on a CPU, GiB")
    add("--json", type=Path, help="also write the figures here")
    add("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(*options.one, options)
        return
    print(f"{'engine':<15}{'dtype':<7}{'sequences':>9}{'tokens':>8}{'tokens/s':>10}{'sync s':>8}")
    rows = []
    for engine in options.engines:
        for dtype in options.dtypes:
            rows += in_process(engine, dtype)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def in_process(engine: str, dtype: str) -> list[dict[str, Any]]:
    """All sizes of one engine, in a process of its own; prints a line for each."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", engine, dtype]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    rows, seen = [], []
    for line in child.stdout:
        seen.append(line)
        if not line.startswith(RESULT):
            continue
        row = json.loads(line.removeprefix(RESULT))
        rows.append(row)
        print(
            f"{engine:<15}{dtype:<7}{row['sequences']:>9}{row['tokens']:>8}"
            f"{row['tokens_per_second']:>10.1f}{row['sync_seconds']:>8.2f}"
            f"  ({row['sync_share']:.0%} of sync and sampling)",
            flush=True,
        )
    if child.wait():
        print(f"{engine:<15}{dtype:<7} failed: {''.join(seen).strip()[-400:]}")
    return rows


def measure(engine_name: str, dtype: str, options: argparse.Namespace) -> None:
    """Time one engine in one dtype, at every size."""
    import torch

    from marlhf.config import ModelSettings, RolloutSettings
    from marlhf.distributed import Distributed
    from marlhf.models import loading
    from marlhf.models.policy import Policy
    from marlhf.rollout.engine import EngineContext, build_engine, start_engine
    from marlhf.rollout.policy_weights import policy_weights

    distributed = Distributed(dtype)
    settings = ModelSettings(path=options.model)
    lm: Any = loading.load_causal_lm(settings).eval()
    tokenizer: Any = loading.load_tokenizer(settings)
    lm.generation_config.eos_token_id = tokenizer.eos_token_id = None
    if engine_name == "generate_batch":
        continuous_batching(lm, distributed, options)
        return
    policy = Policy(lm.to(distributed.device))
    spec: Any = engine_name
    if engine_name == "vllm":
        spec = {"name": "vllm", "cache_gb": options.cache_gb, "options": {"enforce_eager": True}}
    longest = options.prompt + max(options.tokens)
    engine = start_engine(
        build_engine(spec), EngineContext(policy, tokenizer, distributed, longest)
    )
    generator = torch.Generator().manual_seed(0)
    sync = []
    for _ in range(options.rounds + 1):
        start = time.perf_counter()
        engine.update_weights(policy_weights(policy))
        sync.append(time.perf_counter() - start)
    vocabulary = lm.config.get_text_config().vocab_size
    for sequences in options.sequences:
        shape = (sequences, options.prompt)
        prompts = torch.randint(10, vocabulary, shape, generator=generator).tolist()
        for tokens in options.tokens:
            rollout = RolloutSettings(max_new_tokens=tokens, min_new_tokens=tokens)
            seconds = []
            for round_ in range(options.rounds + 1):
                seeds = range(round_ * sequences, (round_ + 1) * sequences)
                start = time.perf_counter()
                generation = engine.generate(prompts, seeds, rollout)
                seconds.append(time.perf_counter() - start)
                assert generation.lengths.tolist() == [tokens] * sequences
            tell(engine_name, dtype, sequences, tokens, min(seconds[1:]), min(sync[1:]))
    engine.close()


def tell(engine: str, dtype: str, sequences: int, tokens: int, seconds: float, sync: float) -> None:
    """Print one row for the parent process."""
    row = {
        "engine": engine,
        "dtype": dtype,
        "sequences": sequences,
        "tokens": tokens,
        "tokens_per_second": sequences * tokens / seconds,
        "sync_seconds": sync,
        "sync_share": sync / (sync + seconds),
    }
    print(f"\n{RESULT}{json.dumps(row)}", flush=True)


def continuous_batching(lm: Any, distributed: Any, options: argparse.Namespace) -> None:
    """Time transformers' `generate_batch`, which samples from the model itself."""
    import torch
    from transformers import GenerationConfig

    dtype = torch.bfloat16 if distributed.precision == "bf16" else torch.float32
    lm = lm.to(distributed.device, dtype)
    generator = torch.Generator().manual_seed(0)
    for sequences in options.sequences:
        shape = (sequences, options.prompt)
        prompts = torch.randint(10, lm.config.vocab_size, shape, generator=generator).tolist()
        for tokens in options.tokens:
            settings = GenerationConfig(
                do_sample=True, top_k=0, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0
            )
            seconds = []
            for _ in range(options.rounds + 1):
                start = time.perf_counter()
                outputs = lm.generate_batch(prompts, generation_config=settings, progress_bar=False)
                seconds.append(time.perf_counter() - start)
                assert len(outputs) == sequences
            tell("generate_batch", options.one[1], sequences, tokens, min(seconds[1:]), 0.0)


if __name__ == "__main__":
    main()
