"""`marlhf estimate` for models of 2B to 27B on 1 x 24, 1 x 80 and 8 x 80 GB, as a table.

    python benchmarks/what_fits.py [2b 7b 8b 27b]

PPO in bf16 with checkpointing: 64 responses of 512 tokens to prompts of 512 on each GPU, sampled 16
at a time, micro-batches of one. `full` trains policy and critic, and has a reward model of the same
size; with adapters the reward model is one too, and adds nothing to speak of. Per machine the first
profile in the order of `marlhf estimate` that fits; peaks of a GPU, and of the node's host, GB.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from paper_memory import SHAPES, write_shapes

GB = 10**9
ALL_SHAPES: dict[str, dict[str, Any]] = SHAPES | {
    "8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
}
MACHINES = ((1, 24), (1, 80), (8, 80))
LORA = {"lora": {"r": 16}}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": LORA,
    "LoRA, 4 bits": LORA | {"quantization": {"bits": 4}},
}


def main() -> None:
    """Print one row for each model and variant."""
    print("| model | | 1 x 24 GB | 1 x 80 GB | 8 x 80 GB |")
    print("|---|---|---|---|---|")
    for size in sys.argv[1:] or ALL_SHAPES:
        with tempfile.TemporaryDirectory() as name:
            policy, reward = write_shapes({**ALL_SHAPES[size], "dtype": "bfloat16"}, Path(name))
            for variant, model in VARIANTS.items():
                cells = [cell(policy, reward, model, *machine) for machine in MACHINES]
                print(f"| {size.upper()} | {variant} | {' | '.join(cells)} |", flush=True)


def cell(policy: Path, reward: Path, model: dict[str, Any], gpus: int, memory: int) -> str:
    """The profile that fits, with peaks; or the lowest peak there is."""
    from marlhf.config import PPOConfig
    from marlhf.config.loading import config_from_dict
    from marlhf.estimate.command import counter_of, estimates

    values = {
        "model": {
            "path": str(policy),
            "precision": "bf16",
            "gradient_checkpointing": True,
            "final_dtype": "checkpoint",
            **model,
        },
        "reward": {"models": {"name": "length", "target": 99} if model else str(reward)},
        "rollout": {
            "batch_size": 64 * gpus,
            "max_prompt_length": 512,
            "max_new_tokens": 512,
            "engine": {"name": "transformers", "batch_size": 16},
        },
        "optimizer": {"micro_batch_size": 1},
    }
    by_profile = estimates(counter_of(config_from_dict(PPOConfig, values)), gpus)
    if gpus == 1:
        by_profile = {name: by_profile[name] for name in ("single", "zero3_offload")}
    fits = [name for name, needed in by_profile.items() if needed.peak <= memory * GB]
    chosen = fits[0] if fits else min(by_profile, key=lambda name: by_profile[name].peak)
    needed = by_profile[chosen]
    host = gpus * needed.host + max(needed.reading, needed.saving)
    tight = " (tight)" if fits and needed.peak > 0.9 * memory * GB else ""
    words = f"`{chosen}` {needed.peak / GB:.0f}{tight}, host {host / GB:.0f}"
    return words if fits else f"no: {words}"


if __name__ == "__main__":
    main()
