"""Peak memory of a rank: one process, and one and two ranks of accelerate profiles.

    python benchmarks/zero_memory.py [PROFILE ...]         default: ddp zero2 zero3

A random model of about 100 million weights makes two PPO updates with a critic of its size. The
peak is of the process on a CPU (its resident memory, less what it held before the models were
made; the C library gives freed memory back) or of the GPU, on the rank where it is highest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RESULT = "PEAK "
PROFILES = Path(__file__).parents[1] / "configs" / "accelerate"


def measure() -> None:
    """Two updates; the first rank prints weights of the model and peaks of all ranks."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from marlhf.config import PPOConfig
    from marlhf.config.loading import config_from_dict
    from marlhf.runs.metrics import memory_row
    from marlhf.training.ppo import PPOTrainer

    torch.manual_seed(0)
    before = 0.0 if torch.cuda.is_available() else memory_row()["peak_memory_gb"]
    lm_config = LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=13,
        num_attention_heads=12,
        tie_word_embeddings=True,
    )
    words = {f"w{i}": i for i in range(4090)} | {"<unk>": 4090, "<pad>": 4091, "</s>": 4092}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = config_from_dict(
        PPOConfig,
        {
            "model": {"path": "made here"},
            "output_dir": tempfile.mkdtemp(),
            "segmenter": {"name": "ngram", "n": 5},
            "rollout": {"batch_size": 4, "max_new_tokens": 8},
            "optimizer": {"micro_batch_size": 1},
            "checkpoint": {"every": 0},
            "log": {"progress": False, "tensorboard": False},
        },
    )
    lm = AutoModelForCausalLM.from_config(lm_config)
    count = sum(p.numel() for p in lm.parameters())
    trainer = PPOTrainer(
        config,
        reward=lambda prompts, completions: [float(len(text)) for text in completions],
        train_dataset=["w1 w2 w3"] * 4,
        model=lm,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
    )
    del lm
    for _ in range(2):
        trainer.step(["w1 w2 w3"] * 4)
    peaks = trainer.distributed.gather_objects([memory_row()["peak_memory_gb"] - before])
    if trainer.distributed.is_main:
        print(RESULT + json.dumps([count, peaks]), flush=True)


def run(launcher: list[str]) -> tuple[int, list[float]]:
    """What `measure` prints in processes of its own."""
    done = subprocess.run(
        [sys.executable, *launcher, __file__, "--measure"],
        env={"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", **os.environ},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    line = next(x for x in done.stdout.splitlines() if x.startswith(RESULT))
    return json.loads(line.removeprefix(RESULT))


def main() -> None:
    """Print a table."""
    if "--measure" in sys.argv:
        measure()
        return
    accelerate = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    count, alone = run([])
    print(f"{count / 1e6:.0f} million weights")
    print(f"{'profile':<16}{'ranks':>6}{'peak of a rank':>18}")
    print(f"{'one process':<16}{1:>6}{alone[0]:>15.2f} GB", flush=True)
    for name in sys.argv[1:] or ["ddp", "zero2", "zero3"]:
        for ranks in ("1", "2"):
            _, peaks = run([*accelerate, str(PROFILES / f"{name}.yaml"), "--num_processes", ranks])
            print(f"{name:<16}{ranks:>6}{max(peaks):>15.2f} GB", flush=True)


if __name__ == "__main__":
    main()
