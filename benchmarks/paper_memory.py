"""`marlhf estimate` for the paper's set-ups: Gemma 2B and 7B, and Gemma 2 27B, on 8 GPUs of 80 GB.

    python benchmarks/paper_memory.py [2b 7b 27b] [-- key.sub=value --gpus 16 ...]

The shapes are written to a temporary folder as config.json; no weights are needed. Words after `--`
go to the command.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from marlhf.cli import main as marlhf

CONFIGS = Path(__file__).parents[1] / "configs" / "paper"
GEMMA = {
    "model_type": "gemma",
    "vocab_size": 256000,
    "head_dim": 256,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "2b": GEMMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    },
    "7b": GEMMA
    | {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "27b": GEMMA
    | {
        "model_type": "gemma2",
        "head_dim": 128,
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
    },
}


def main(words: list[str]) -> None:
    cut = words.index("--") if "--" in words else len(words)
    for size in words[:cut] or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            policy, reward = write_shapes(SHAPES[size], Path(folder))
            paths = [f"model.path={policy}", f"reward.models={reward}"]
            config = str(CONFIGS / f"ppo_tldr_{size}.yaml")
            machine = ["--gpus", "8", "--gpu-memory", "80"]
            print(f"\n{Path(config).name}\n", flush=True)
            marlhf(["estimate", config, *paths, *machine, *words[cut + 1 :]])


def write_shapes(shape: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Folders with the config.json of a policy and of its reward model."""
    from transformers import AutoConfig

    AutoConfig.for_model(**shape).save_pretrained(folder / "policy")
    AutoConfig.for_model(**shape, num_labels=1).save_pretrained(folder / "reward")
    return folder / "policy", folder / "reward"


if __name__ == "__main__":
    main(sys.argv[1:])
