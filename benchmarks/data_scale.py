"""Memory per rank and seconds to the first step, for data of a million rows.

    python benchmarks/data_scale.py [--rows N] [--ranks R] [CASE ...]

Each case is a run of the command line on a tiny model. Its memory is sampled from outside, ten
times a second, on the rank where it is highest: `anonymous` is what the rank itself holds, and
`resident` also counts the mapped pages of files, which ranks share. Seconds are from the start of
the process to the first row of metrics, with those of the CPU behind them.

    ppo           prompts of 300 characters
    ppo-bound     limits above the model's positions; the prompts' bytes say that all fit
    ppo-longest   limits so near the model's positions that every prompt is tokenised at the start
    sft, sft-packed, reward     300 characters of prompt, and answers of 100

A case runs twice: without a cache, and with the one that the first run left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

WORDS = "".join(chr(97 + (7 * i) % 26) for i in range(5000))
ANSWERS = {"ppo": (), "sft": ("completion",), "reward": ("chosen", "rejected")}
CASES = ("ppo", "ppo-bound", "ppo-longest", "sft", "sft-packed", "reward")


def words(draw: random.Random, size: int) -> str:
    """Text of `size` characters, in words as frequent as those of a language."""
    text = ""
    while len(text) < size:
        rank = int(20000 ** draw.random())
        text += WORDS[rank % 4900 : rank % 4900 + 2 + rank % 9] + " "
    return text[:size]


def write_data(file: Path, rows: int, case: str) -> None:
    """Rows of what the case reads."""
    draw = random.Random(0)
    pool = [words(draw, 4000) for _ in range(500)]

    def piece(size: int) -> str:
        start = draw.randrange(3600)
        return draw.choice(pool)[start : start + size]

    with file.open("w") as out:
        for number in range(rows):
            row = {"prompt": f"{number} {piece(300)}"[:300]}
            row |= {name: " " + piece(99) for name in ANSWERS[case.partition("-")[0]]}
            out.write(json.dumps(row) + "\n")


def write_model(folder: Path) -> None:
    """A Llama of one layer with a byte-level BPE of 4,096 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    draw = random.Random(1)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator((words(draw, 2000) for _ in range(200)), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def config_of(case: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """`(job, configuration)` of a case."""
    job = case.partition("-")[0]
    config: dict[str, Any] = {
        "model": {"path": str(folder / "lm")},
        "data": {"path": str(folder / "data.jsonl"), "eval_rows": 0},
        "output_dir": str(folder / "run"),
        "overwrite": True,
        "checkpoint": {"every": 0},
        "log": {"progress": False, "tensorboard": False, "eval_every": 0},
        "optimizer": {"micro_batch_size": 8},
    }
    if job == "ppo":
        limits = {"ppo": 256, "ppo-bound": 500, "ppo-longest": 512}
        new = {"ppo": 16, "ppo-bound": 16, "ppo-longest": 250}[case]
        rollout = {"batch_size": 16, "max_prompt_length": limits[case], "max_new_tokens": new}
        reward = {"models": {"name": "length", "target": 20}}
        return job, config | {"steps": 1, "rollout": rollout, "reward": reward}
    steps = {"steps": 1, "batch_size": 16, "max_length": 256}
    return job, config | steps | ({"packing": True} if case == "sft-packed" else {})


def run(job: str, config: dict[str, Any], folder: Path, ranks: int) -> dict[str, float]:
    """Run a job to its end; returns gigabytes and seconds."""
    file, metrics = folder / f"{job}.json", folder / "run" / "metrics.jsonl"
    file.write_text(json.dumps(config))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "marlhf", job, str(file)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
    metrics.unlink(missing_ok=True)
    start = time.perf_counter()
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    result = {"anonymous": 0.0, "resident": 0.0, "seconds": 0.0, "cpu": 0.0}
    while process.poll() is None:
        cpu = 0.0
        for rank in _ranks(process.pid, ranks):
            held = _memory(rank.pid)
            for name, gigabytes in held.items():
                result[name] = max(result[name], gigabytes)
            times = rank.cpu_times()
            cpu = max(cpu, times.user + times.system)
        if not result["seconds"] and metrics.exists() and metrics.read_text().count("\n") >= 1:
            result["seconds"], result["cpu"] = time.perf_counter() - start, cpu
        time.sleep(0.1)
    if process.returncode != 0:
        raise SystemExit((folder / "log").read_text()[-2000:])
    return result


def _ranks(pid: int, ranks: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return process.children() if ranks > 1 else [process]
    except psutil.NoSuchProcess:
        return []


def _memory(pid: int) -> dict[str, float]:
    """Resident gigabytes of a process, all and its own."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    names = {"anonymous": "RssAnon", "resident": "VmRSS"}
    return {name: int(sizes.get(key, 0)) * 1024 / 1e9 for name, key in names.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("cases", nargs="*", default=CASES)
    options = parser.parse_args()
    print("| case | cache | anonymous GB | resident GB | seconds | of a CPU |")
    print("|---|---|---|---|---|---|", flush=True)
    for case in options.cases or CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(folder / "lm")
            write_data(folder / "data.jsonl", options.rows, case)
            for cache in ("none", "there"):
                job, config = config_of(case, folder)
                r = run(job, config, folder, options.ranks)
                memory = f"{r['anonymous']:.2f} | {r['resident']:.2f}"
                print(f"| {case} | {cache} | {memory} | {r['seconds']:.0f} | {r['cpu']:.0f} |")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
