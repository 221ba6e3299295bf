"""Under ZeRO-3 the optimiser steps a rank's shards themselves: they exist once."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_ranks import ranks
from torch import Tensor, nn

from marlhf.compat.deepspeed import partitions
from marlhf.distributed import Distributed

WIDTH = 32
EVERY_WEIGHT = {"stage3_param_persistence_threshold": 0}


@pytest.fixture(scope="module", autouse=True)
def deepspeed() -> None:
    """Imports DeepSpeed once, for all ranks that are forked."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    importlib.import_module("deepspeed")


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.1)


def memory_of(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def held_and_trained() -> dict[str, Any]:
    """Where shards and what is stepped are in memory, and how far two steps moved the weights."""
    distributed = Distributed("bf16")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    start = [p.detach().clone() for p in module.parameters()]
    learner = distributed.prepare(module, adamw(module), None)
    for _ in range(2):
        with distributed.autocast():
            loss = learner.model(torch.ones(1, WIDTH)).sum()
        learner.backward(loss)
        learner.step()
    stepped = [memory_of(flat) for _, _, _, flat, _ in partitions(learner.model)]
    shards = [memory_of(parameter.ds_tensor) for parameter, *_ in partitions(learner.model)]
    with distributed.gathered(module):
        pairs = zip(module.parameters(), start, strict=True)  # in bf16
        moved = [float((p - before).abs().max()) for p, before in pairs]
    return {"same": stepped == shards, "moved": min(moved)}


@pytest.mark.parametrize("sub_group_size", [10**9, 500], ids=["one part", "several parts"])
def test_what_the_optimiser_steps_is_the_shard(sub_group_size: int, tmp_path: Path) -> None:
    """By DeepSpeed 0.19.8 alone it is a copy of it: 4 bytes more per weight of a rank."""
    zero = {"stage": 3, "sub_group_size": sub_group_size, **EVERY_WEIGHT}
    for outcome in ranks(2, lambda _: json.dumps(held_and_trained()), tmp_path, zero):
        result = json.loads(outcome)
        assert result["same"], result
        assert result["moved"] > 0.1
