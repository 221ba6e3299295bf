"""Tiny models and prompts that vLLM takes, and how far its log-probabilities are from ours."""

from __future__ import annotations

import torch

from marlhf.common.types import Generation, Sequences
from marlhf.models.policy import Policy, forward

# vLLM's kernels have no heads of 8, as the other tests' models do
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
TOKENS = [[5, 6, 7], [9], [40, 41, 42, 43, 44, 45], [8, 8]]


def gap(policy: Policy, generation: Generation, temperature: float = 1.0) -> float:
    """Largest difference of log-probabilities between the engine and the policy."""
    with torch.no_grad():
        ours = forward(policy, Sequences.of(generation), temperature=temperature).logprobs
    assert generation.logprobs is not None
    return float((ours - generation.logprobs)[generation.response_mask].abs().max())
