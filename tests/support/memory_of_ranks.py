"""Peak memory of ranks while they save and load a model in training; see `peaks`.

MALLOC_MMAP_THRESHOLD_=65536 python tests/support/memory_of_ranks.py
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from marlhf.config import OptimizerSettings
from marlhf.distributed import Distributed
from marlhf.training.learner import Learner
from support.forked_ranks import ranks

WIDTH, LAYERS = 1024, 24
LARGEST = 4 * WIDTH**2  # bytes of a weight
WEIGHTS = LAYERS * LARGEST  # of all, in bytes: 100 MB


class Texts:
    """A minibatch of one sequence."""

    attention_mask = torch.ones(1, 1, dtype=torch.bool)

    def select(self, index: torch.Tensor) -> Texts:
        return self

    def counts(self) -> torch.Tensor:
        return torch.ones(1, dtype=torch.float64)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


def learner(distributed: Distributed) -> Learner:
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    settings = OptimizerSettings(schedule="constant")
    return Learner(nn.Sequential(*layers), None, 1e-4, settings, 9, distributed)


def take_a_step(made: Learner) -> None:
    def objective(rows: Any, count: float) -> torch.Tensor:
        return made.model(torch.ones(1, WIDTH)).square().mean() / count

    assert made.optimise((Texts(), objective)).finite


def anonymous() -> int:
    """Bytes of this process that are no pages of files."""
    text = Path("/proc/self/status").read_text()
    match = re.search(r"RssAnon:\s+(\d+) kB", text)
    assert match is not None
    return 1024 * int(match[1])


@contextmanager
def peak(into: dict[str, int], name: str) -> Iterator[None]:
    """Record the most memory held in the context, beyond that before it and that kept after it."""
    over, samples, before = threading.Event(), [0], anonymous()

    def watch() -> None:
        while not over.is_set():
            samples.append(anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    into[name] = max(samples) - max(before, anonymous())


def peaks(count: int, zero: Mapping[str, Any], folder: Path) -> list[dict[str, int]]:
    """Of each rank, bytes that saving and loading take beyond what the rank keeps."""

    def work(rank: int) -> str:
        torch.set_num_threads(1)
        distributed, taken = Distributed(), dict[str, int]()
        made = learner(distributed)
        take_a_step(made)
        distributed.barrier()
        with peak(taken, "save"):
            made.save(folder / "learner")
        distributed.barrier()
        del made
        fresh = learner(distributed)
        with peak(taken, "load"):
            fresh.load(folder / "learner")
        take_a_step(fresh)
        return json.dumps(taken)

    return [json.loads(outcome) for outcome in ranks(count, work, folder, zero)]


def main() -> None:
    for stage in (2, 3):
        for count in (2, 4):
            with tempfile.TemporaryDirectory() as folder:
                for rank, taken in enumerate(peaks(count, {"stage": stage}, Path(folder))):
                    figures = {name: f"{size / 1e6:.1f} MB" for name, size in taken.items()}
                    print(f"ZeRO-{stage}, rank {rank} of {count}: {figures}", flush=True)


if __name__ == "__main__":
    main()
