"""A machine's best rates, and the operations of an update's passes."""

from __future__ import annotations

import math
import pydoc_data.topics
import random
import time
from collections.abc import Callable
from typing import Any

import torch

Phases = dict[str, float]


def best_seconds(run: Callable[[], Any], rounds: int = 10) -> float:
    """Least wall-clock seconds of several runs."""
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_rate(dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a large matrix product."""
    a = torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / best_seconds(lambda: a @ a)


def read_rate() -> float:
    """Bytes per second from memory, far beyond the caches."""
    x = torch.randn(2**27)
    return x.nbytes / best_seconds(x.max)


def update_flops(model: Any, rows: int, prompt: int, new: int, epochs: int = 1) -> Phases:
    """Operations of policy, reference and critic in each phase of an update.

    For full fine-tuning; a backward pass counts as two forward passes. Logits are computed for
    response tokens only.
    """
    config = model.config
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    head = config.vocab_size * config.hidden_size
    matrices -= 0 if config.tie_word_embeddings else head
    length = prompt + new
    wide = config.num_hidden_layers * config.num_attention_heads * model_head_size(config)
    backbone = rows * (2 * matrices * length + 2 * wide * length**2)
    logits = rows * 2 * head * new
    return {
        "generate": backbone + logits,
        "score": 3 * backbone + 2 * logits,
        "train": epochs * 3 * (2 * backbone + logits),
    }


def model_head_size(config: Any) -> int:
    """Of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def generation_bytes(model: Any, rows: int, prompt: int, new: int) -> float:
    """Least bytes that sampling reads: the weights and the KV cache, for each token."""
    config = model.config
    size = config.num_hidden_layers * config.num_key_value_heads * model_head_size(config) * 2
    seen = sum(prompt + t for t in range(new))
    weights = sum(p.numel() for p in model.parameters())  # a tied head is read as a head
    return 4.0 * (weights * new + rows * size * seen)


def english(tokenizer: Any, rows: int, length: int, seed: int = 0) -> list[list[int]]:
    """Token ids of English prose, `length` per row: the reference that comes with Python."""
    ids: list[int] = []
    topics = list(pydoc_data.topics.topics.values())
    random.Random(seed).shuffle(topics)
    while len(ids) < rows * length:
        for topic in topics:
            ids += tokenizer(topic, add_special_tokens=False)["input_ids"]
    return [ids[i * length : (i + 1) * length] for i in range(rows)]
