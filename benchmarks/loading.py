"""Memory of each rank while a run loads its models, sampled from outside.

    python benchmarks/loading.py [--millions 250] [--profiles single ddp zero3] [--ranks 1 2 4]
                                 [--models policy | all] [--dtype bfloat16] [--curves]

Writes models of random weights as sharded safetensors to a temporary folder, and builds a PPO run
from them: `policy` alone, or `all`, with reference, critic and a reward model of the same size. The
memory of a process is its anonymous memory (RssAnon in /proc), less what it held before it read
anything; mapped files are not in it. No optimiser has state before the first update. On a machine
with GPUs the table is of host memory, and each rank also prints the peak on its device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROFILES = Path(__file__).parents[1] / "configs" / "accelerate"
WORDS = {f"w{i}": i for i in range(32_765)} | {"<unk>": 32_765, "<pad>": 32_766, "</s>": 32_767}
SHAPES = {250: (1024, 2816, 14), 1000: (2048, 5632, 17)}  # hidden, intermediate, layers
SHARD = 400_000_000  # bytes of a file
PAUSE = 1.0  # seconds before and after loading, for samples at rest


def write(folder: Path, millions: int, dtype: str, is_classifier: bool) -> int:
    """Write a Llama of random weights shard by shard; returns its number of weights."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        LlamaConfig,
        PreTrainedTokenizerFast,
    )

    hidden, intermediate, layers = SHAPES[millions]
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=16,
        pad_token_id=WORDS["<pad>"],
        num_labels=1 if is_classifier else 2,
    )
    auto: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    generator, files, shard, size = torch.Generator().manual_seed(0), {}, {}, 0

    def close() -> None:
        name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, weight in model.state_dict().items():
        random = torch.randn(weight.shape, generator=generator) * 0.02
        shard[name] = random.add_(1.0 if weight.dim() == 1 else 0.0).to(getattr(torch, dtype))
        size += shard[name].nbytes
        if size > SHARD:
            close()
            size = 0
    if shard:
        close()
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(p.numel() for p in model.parameters())


def run_config(folder: Path, models: str) -> Any:
    """The run whose models are loaded."""
    from marlhf.config import PPOConfig
    from marlhf.config.loading import config_from_dict

    alone = models == "policy"
    values = {
        "model": {"path": str(folder / "policy")},
        "output_dir": tempfile.mkdtemp() if "RANK" not in os.environ else str(folder / "run"),
        "overwrite": True,
        "rollout": {"batch_size": 8, "max_new_tokens": 8, "responses_per_prompt": 2},
        "ppo": {"estimator": "grpo"} if alone else {},
        "kl": {"coef": 0.0 if alone else 0.05},
        "critic": {} if alone else {"init": "policy"},
        "reward": {"models": {"name": "length", "target": 8} if alone else str(folder / "reward")},
        "log": {"progress": False, "tensorboard": False},
    }
    return config_from_dict(PPOConfig, values)


def estimated(folder: Path, models: str, profile: Any, ranks: int) -> int:
    """What `marlhf estimate` says that a rank holds while it loads, MB."""
    from marlhf.estimate.command import counter_of
    from marlhf.estimate.memory_model import estimate, is_sharded

    run = counter_of(run_config(folder, models)).run(ranks, is_sharded(profile))
    return round(estimate(run, profile, ranks).loading / 1e6)


def load(folder: Path, models: str) -> None:
    """A rank: build a run, and say when."""
    import torch

    import marlhf.distributed
    import marlhf.training.ppo
    from marlhf.training.ppo import PPOTrainer

    config = run_config(folder, models)
    seed_generators, learner = marlhf.training.ppo.seed_generators, PPOTrainer._learner
    rank = os.environ.get("RANK", "0")

    def started(seed: int) -> None:  # all checks are done, and no weight is read
        print(f"READY {rank} {os.getpid()}", flush=True)
        time.sleep(PAUSE)
        seed_generators(seed)

    def built(*arguments: Any) -> Any:
        print(f"BUILT {rank}", flush=True)
        time.sleep(PAUSE)
        return learner(*arguments)

    marlhf.training.ppo.seed_generators, PPOTrainer._learner = started, built
    trainer = PPOTrainer(config, train_dataset=["w1 w2 w3"] * 8)
    print(f"DONE {trainer.distributed.rank}", flush=True)
    if torch.cuda.is_available():
        print(f"device peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB", file=sys.stderr)
    time.sleep(2 * PAUSE)
    trainer.distributed.barrier()


def anonymous(pid: int) -> int:
    """Anonymous memory of a process, MB; 0 of one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(match[1]) * 1024 // 10**6 if match else 0


def sample(
    folder: Path, models: str, profile: str, ranks: int
) -> tuple[dict[int, list[int]], dict[int, int]]:
    """Anonymous MB of each rank every 20 ms, from before its first weight is read.

    Also the number of samples until policy, reference and critic were there, without optimisers.
    """
    launcher = []
    if profile != "single":
        launcher = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
        launcher += ["--config_file", str(PROFILES / f"{profile}.yaml")]
        launcher += ["--num_processes", str(ranks)]
    child = subprocess.Popen(
        [sys.executable, *launcher, __file__, "--load", str(folder), "--models", models],
        env={"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    pids: dict[int, int] = {}
    curves: dict[int, list[int]] = {}
    built: dict[int, int] = {}
    done, text = 0, ""
    while done < ranks and child.poll() is None:
        text += (child.stdout.read() or b"").decode()
        *lines, text = text.split("\n")
        for line in lines:
            if line.startswith("READY"):
                _, rank, pid = line.split()
                pids[int(rank)] = int(pid)
            if line.startswith("BUILT"):
                rank = int(line.split()[1])
                built.setdefault(rank, len(curves.get(rank, [0])))
            done += line.startswith("DONE")
        for rank, pid in pids.items():
            curves.setdefault(rank, []).append(anonymous(pid))
        time.sleep(0.02)
    for rank, pid in pids.items():
        curves[rank].append(anonymous(pid))
    child.stdout.close()
    child.wait()
    if done < ranks:
        raise SystemExit(f"{profile} with {ranks} ranks failed: exit status {child.returncode}")
    return {r: [n - curve[0] for n in curve] for r, curve in sorted(curves.items())}, built


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, choices=SHAPES, default=250)
    parser.add_argument("--profiles", nargs="+", default=["single", "ddp", "zero3"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--models", choices=["policy", "all"], default="all")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--curves", action="store_true", help="print MB every 0.5 s as well")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load is not None:
        load(options.load, options.models)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = write(folder / "policy", options.millions, options.dtype, is_classifier=False)
        if options.models == "all":
            write(folder / "reward", options.millions, options.dtype, is_classifier=True)
        size = 4 * weights // 10**6
        print(f"{weights / 1e6:.0f} million weights, {size} MB in fp32; files in {options.dtype}")
        print("MB: estimated; of each rank: peak until optimisers are made, peak, and what stays")
        print(f"{'profile':<10}{'ranks':>6}{'estimated':>11}", flush=True)
        for profile in options.profiles:
            for ranks in options.ranks if profile != "single" else [1]:
                curves, built = sample(folder, options.models, profile, ranks)
                cells = "   ".join(
                    f"{max(c[: built[r] + 1]):>6} {max(c):>6} {c[-1]:>6}" for r, c in curves.items()
                )
                said = estimated(folder, options.models, profile, ranks)
                print(f"{profile:<10}{ranks:>6}{said:>11}   {cells}", flush=True)
                for rank, curve in curves.items() if options.curves else ():
                    print(f"    rank {rank}: {' '.join(map(str, curve[::25]))}")


if __name__ == "__main__":
    main()
