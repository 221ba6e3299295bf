"""The study's task with a known optimum: say a code of 8 letters, then continue for 40 more.

    python scripts/study/recall_task.py --out runs/study/recall

The reward, given once, after the last of 48 letters, is the share of the first 8 that are the
code's, which only the reward knows. The policy to start from has learned, from demonstrations whose
code is right at half of its places and whose other letters are drawn evenly, to be right about half
of the time; the best possible reward is 1.

With one value for all states GAE gives a letter's part in the reward a weight of lambda to the
power of the number of macro actions after its own: of the code about 0.1 under token-level PPO at
lambda 0.95, where the last letters, which do nothing for the reward, have 1. With n-grams of 5 the
code's weight is 0.64.
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

PROMPT = ":"
LETTERS = "abcdefgh"
LENGTH = 48
CODE = random.Random(0).sample(LETTERS, k=8)
CONFIG = Path(__file__).parents[2] / "configs" / "study" / "sft_recall.yaml"


def share_of_code(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The share of the code's letters that a completion begins with."""
    return [sum(map(str.__eq__, text.split(), CODE)) / len(CODE) for text in completions]


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
        write(out / "prompts.jsonl", [{"prompt": PROMPT}] * 4096)
        write_random_model(out / "random")
        paths = [f"model.path={out}/random", f"data.path={out}/demonstrations.jsonl"]
        words = ["sft", str(CONFIG), *paths, f"output_dir={out}/base", "resume=auto"]
        subprocess.run([sys.executable, "-m", "marlhf", *words], check=True)
    print(out / "base" / "final")


def demonstration(draw: random.Random, right: float) -> dict[str, str]:
    """A completion with this share of the code; all other letters are drawn evenly."""
    code = [
        letter if draw.random() < right else draw.choice(LETTERS.replace(letter, ""))
        for letter in CODE
    ]
    rest = draw.choices(LETTERS, k=LENGTH - len(CODE))
    return {"prompt": PROMPT, "completion": " " + " ".join(code + rest)}


def write_random_model(folder: Path) -> None:
    """A tokenizer of letters, and a GPT-2 with random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<eos>", "<pad>", ":", *LETTERS]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(  # with learned positions: what is to be learned is a letter for each
        vocab_size=len(words),
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Rows as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
