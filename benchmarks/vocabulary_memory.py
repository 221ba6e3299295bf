"""Peak memory of scoring and training passes by the size of the vocabulary.

    python benchmarks/vocabulary_memory.py [--rows 8] [--tokens 128]

A small random Llama (two layers of 128) reads 8 prompts of 64 tokens and responses of 128. Counted
are the bytes that a pass allocates in addition to the weights, at its peak. In training the
embedding is frozen, since its gradient grows as the weights do. The last column is the size of one
array of all logits.
"""

from __future__ import annotations

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from marlhf.estimate.allocations import LiveBytes
from marlhf.models.policy import Policy

VOCABULARIES = (32_768, 65_536, 131_072, 262_144)
PROMPT_TOKENS = 64


def peak_mb(policy: Policy, rows: int, tokens: int, vocabulary: int, training: bool) -> float:
    """Of a pass, with the entropy in scoring, in MB (1e6 bytes)."""
    ids = torch.randint(vocabulary, (rows, PROMPT_TOKENS + tokens))
    attention, mask = torch.ones_like(ids).bool(), torch.ones(rows, tokens).bool()
    known = [*policy.parameters(), *policy.buffers()]
    with torch.set_grad_enabled(training), LiveBytes(known) as count:
        logprobs, _ = policy(ids, attention, mask, extras=() if training else ("entropy",))
        if training:
            logprobs.sum().backward()
    return count.peak / 1e6


def main() -> None:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    results = []
    print(f"{'vocabulary':>10}{'scoring MB':>12}{'training MB':>13}{'all logits MB':>15}")
    for vocabulary in VOCABULARIES:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
        lm = AutoModelForCausalLM.from_config(config)
        lm.get_input_embeddings().requires_grad_(False)
        scoring, training = (
            peak_mb(Policy(lm), args.rows, args.tokens, vocabulary, training)
            for training in (False, True)
        )
        logits = args.rows * args.tokens * vocabulary * 4 / 1e6
        print(f"{vocabulary:>10}{scoring:>12.0f}{training:>13.0f}{logits:>15.0f}", flush=True)
        results.append({"vocabulary": vocabulary, "scoring": scoring, "training": training})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
