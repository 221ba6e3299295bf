"""A custom segmenter in five lines: macro actions are clauses.

    python examples/custom_segmenter.py
    python examples/custom_segmenter.py --tokenizer PATH --text "Some text, of your own."
    python examples/custom_segmenter.py --segmenter sentence

Prints each macro action on its own line with the number of its tokens. In a training run the same
function is named in YAML, by import path: `segmenter: my_package.my_module.clauses`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from itertools import pairwise

import torch

from marlhf.common.types import ResponseBatch
from marlhf.segmenters import build_segmenter, from_text, validate

TEXT = "When it rains, the streets are empty; nobody sings.\nStill, some of us dance: gladly 😀!"


@from_text
def clauses(text: str) -> list[int]:
    """Clauses start after a comma, a semicolon, a colon or a line break."""
    return [match.end() for match in re.finditer(r"[,;:] |\n", text)]


def byte_level_tokenizer():
    """A small byte-level BPE tokenizer, trained on the text above: nothing to download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def macro_actions(segmenter, tokenizer, text: str) -> list[tuple[str, int]]:
    """The text and the number of tokens of each macro action of one response."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    batch = ResponseBatch(ids, torch.ones_like(ids, dtype=torch.bool), tokenizer=tokenizer)
    starts = validate(segmenter(batch), batch, "example")[0].nonzero().flatten().tolist()
    edges = [*starts, ids.shape[1]]
    ends = [end for _, end in batch.offsets[0]]
    actions, position = [], 0
    for first, last in pairwise(edges):
        actions.append((batch.texts[0][position : ends[last - 1]], last - first))
        position = ends[last - 1]
    return actions


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and print the macro actions."""
    parser = argparse.ArgumentParser(description="Show where a segmenter cuts a text.")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument(
        "--tokenizer", help="a directory or hub name; a tiny one is built if absent"
    )
    parser.add_argument("--segmenter", help="a name or import path; the one above if absent")
    options = parser.parse_args(arguments)
    if options.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    else:
        tokenizer = byte_level_tokenizer()
    segmenter = build_segmenter(options.segmenter or clauses)
    for piece, tokens in macro_actions(segmenter, tokenizer, options.text):
        print(f"{tokens:3d} tokens  {piece!r}")


if __name__ == "__main__":
    main()
