"""The study's task with a known optimum: say the prompt's letter 48 times.

    python scripts/study/recall_task.py --out runs/study/recall

A prompt is a letter and a colon. The reward, given once, at the end, is the share of response
tokens that are that letter: every token counts alike. The policy to start from has learned, from
demonstrations that are right at half of their places, to be right about half of the time; the best
possible reward is 1.

With one value for all states GAE gives a token's own part in the reward a weight of lambda to the
power of the number of macro actions after its own. Token-level PPO at lambda 0.95 hears of the last
letters 11 times as loud as of the first; with n-grams of 5 it is 1.6 times.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LETTERS = "abcdefgh"
LENGTH = 48
CONFIG = Path(__file__).parents[2] / "configs" / "study" / "sft_recall.yaml"


def share_right(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The share of letters that are the prompt's."""
    return [
        completion.replace(" ", "").count(prompt[0]) / LENGTH
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def main() -> None:
    """Make the data and the policy to start from, unless they are there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study/recall"))
    parser.add_argument("--right", type=float, default=0.5, help="share of right demonstrations")
    args = parser.parse_args()
    out: Path = args.out
    if not (out / "base" / "final").exists():
        out.mkdir(parents=True, exist_ok=True)
        draw = random.Random(0)
        rows = [demonstration(draw, args.right) for _ in range(2000)]
        write(out / "demonstrations.jsonl", rows)
        write(out / "prompts.jsonl", [{"prompt": f"{draw.choice(LETTERS)} :"} for _ in range(4096)])
        write_random_model(out / "random")
        paths = [f"model.path={out}/random", f"data.path={out}/demonstrations.jsonl"]
        words = ["sft", str(CONFIG), *paths, f"output_dir={out}/base", "resume=auto"]
        subprocess.run([sys.executable, "-m", "marlhf", *words], check=True)
    print(out / "base" / "final")


def demonstration(draw: random.Random, right: float) -> dict[str, str]:
    """A prompt and a completion with this share of right letters, the others drawn evenly."""
    letter = draw.choice(LETTERS)
    others = LETTERS.replace(letter, "")
    said = [letter if draw.random() < right else draw.choice(others) for _ in range(LENGTH)]
    return {"prompt": f"{letter} :", "completion": " " + " ".join(said)}


def write_random_model(folder: Path) -> None:
    """A tokenizer of letters, and a Llama with random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<eos>", "<pad>", ":", *LETTERS]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Rows as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
