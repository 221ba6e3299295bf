"""A tiny run in a child process that is killed (kill -9) at a chosen point.

The child is forked, so that it costs no start-up; a fault is injected by wrapping a function.
"""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from marlhf.config.loading import merge
from marlhf.training.ppo import PPOTrainer
from support.runs import tiny_trainer, vowels

TIMES = ("_seconds", "tokens_per_second", "peak_memory_gb")
SECTIONS: dict[str, Any] = {
    "steps": 7,
    "overwrite": False,
    "resume": "auto",
    "log": {"eval_every": 2, "samples": 2, "tensorboard": True, "progress": False},
    "checkpoint": {"every": 2, "keep": 2},
    "rollout": {"max_new_tokens": 6},
    "ppo": {"epochs": 1},
    "reward": {"tokens": {"name": "curiosity", "weight": 0.5, "learning_rate": 0.01, "width": 8}},
    "kl": {"coef": 0.05, "target": 3.0, "horizon": 100},
    "optimizer": {"weight_decay": 0.1, "warmup_steps": 2},
}


class DrawingReward:
    """A reward that draws from every global generator and has a state of its own."""

    fails_at: int | None = None

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prompts: Any, completions: Any) -> list[float]:
        import random

        import numpy as np
        import torch

        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("the scorer is out of order")
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return [score + noise + self.calls for score in vowels(prompts, completions)]

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def trainer(folder: Path, **sections: Any) -> PPOTrainer:
    """Seven updates with everything that has a state, and held-out prompts."""
    made = tiny_trainer(folder, score=DrawingReward(), **merge(SECTIONS, sections))
    made.eval_prompts = list(made.stream.prompts[:3])
    return made


def train(folder: Path, **sections: Any) -> None:
    trainer(folder, **sections).train()


def in_child(work: Callable[[], Any]) -> int:
    """Run in a forked child; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def contents(folder: Path) -> dict[str, Any]:
    """What runs are compared by: lines of both files without times, and TensorBoard's scalars."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in metrics]
    return {
        "metrics": timeless,
        "samples": (folder / "samples.jsonl").read_text(),
        "tensorboard": scalars(folder / "tensorboard"),
    }


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # without purging: what is not cut off must show
    events = EventAccumulator(str(folder), {"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    # sorted: two files of one second and one process come in the order of their names
    return {
        tag: sorted((event.step, event.value) for event in events.Scalars(tag))
        for tag in events.Tags()["scalars"]
        if not tag.endswith(TIMES)
    }
