"""A model being trained: its optimiser and schedule, and one exact optimiser step."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from marlhf.common.cpu_memory import trim_heap, trim_heap_before_embedding_gradients
from marlhf.common.errors import ReportedError, UserError, one_line, short_repr
from marlhf.common.state_files import read_numbers
from marlhf.config import AdamWSettings
from marlhf.distributed import Distributed
from marlhf.distributed.trained import FRAGMENTS, REPLICATED, Sharded
from marlhf.models.adapters import trainable_parameters
from marlhf.rollout.batching import micro_batches
from marlhf.runs.metrics import Metrics

Objective = Callable[..., Tensor]


class Minibatch(Protocol):
    """A minibatch that losses are computed on: `Experience`, `TextBatch` or `Share`."""

    @property
    def attention_mask(self) -> Tensor:
        """[B,L] bool."""
        ...

    def select(self, index: Tensor) -> Any:
        """The micro-batch at `index`."""
        ...

    def counts(self) -> Tensor:
        """float64 [K], the denominators of losses, such as tokens."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, saved for debugging when training diverges."""
        ...


Term = tuple[Minibatch, Objective]


@dataclass(frozen=True)
class Gradient:
    """The gradient of an optimiser step: its norm, and whether it is finite.

    norm     L2 norm before clipping; NaN where the loss or the gradient is not finite
    finite   on every rank, the loss included; otherwise the step is skipped
    """

    norm: float
    finite: bool


class DivergedError(ReportedError):
    """Too many consecutive non-finite losses or gradients.

    batches   the minibatches of the last one
    """

    def __init__(self, message: str, batches: list[Minibatch]) -> None:
        super().__init__(message)
        self.batches = batches


class Learner:
    """A model in training, policy or critic, with its AdamW and schedule.

    adapter   train this LoRA adapter (and the critic's head) only; None for all trainable weights
    steps     updates in the full run, for the schedule
    """

    def __init__(
        self,
        module: nn.Module,
        adapter: str | None,
        learning_rate: float,
        settings: AdamWSettings,
        steps: int,
        distributed: Distributed,
    ) -> None:
        self.settings = settings
        self.distributed = distributed
        self.parameters = trainable_parameters(module, adapter)
        self._skipped_in_a_row = 0
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=learning_rate,
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        # transformers' `constant` has no warm-up
        schedule = settings.schedule.replace("constant", "constant_with_warmup")
        self.scheduler = get_scheduler(schedule, optimizer, settings.warmup_steps, steps)
        trim_heap_before_embedding_gradients(module)
        self.trained = distributed.prepare(module, optimizer, settings.max_grad_norm)
        self.model, self.optimizer = self.trained.model, self.trained.optimizer
        self.is_offloaded = False  # states are in host memory, but within `in_use`

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context of optimiser steps: its states are on the device."""
        if self.is_offloaded:
            self.trained.states_to_device()
        try:
            yield
        finally:
            if self.is_offloaded:
                self.trained.states_to_host()

    def optimise(self, *terms: Term) -> Gradient:
        """Take one optimiser step on a sum of losses; see `accumulate`."""
        gradient = self.accumulate(*terms)
        self.step(gradient)
        return gradient

    def accumulate(self, *terms: Term) -> Gradient:
        """Compute the clipped gradient of a sum of losses, for `step` or `discard`.

        terms   `(minibatch, objective)`: objective(rows, *counts) is the loss of a micro-batch,
                divided by the counts of the full minibatch over all ranks, so that no split into
                micro-batches and ranks changes the gradient

        Raises DivergedError after `max_skipped_steps` consecutive gradients that are not finite.
        """
        size, several_ranks = self.settings.micro_batch_size, self.distributed.world_size > 1
        passes = []
        for minibatch, objective in terms:
            counts = self.distributed.all_reduce(minibatch.counts()).tolist()  # the denominators
            parts = micro_batches(minibatch.attention_mask, size, same_count=several_ranks)
            passes += [(minibatch, part, objective, counts) for part in parts]
        self.model.train()
        device = self.distributed.device
        total = torch.zeros((), device=device)
        for i, (minibatch, part, objective, counts) in enumerate(passes):
            trim_heap(device)
            with self.trained.accumulate(last=i == len(passes) - 1):
                with self.distributed.autocast():
                    loss = objective(minibatch.select(part), *counts)
                self.trained.backward(loss)
            total += loss.detach()
        trim_heap(device)
        gradient = self._agree(float(total), self.trained.norm())
        self._skipped_in_a_row = 0 if gradient.finite else self._skipped_in_a_row + 1
        if not gradient.finite and self._skipped_in_a_row >= self.settings.max_skipped_steps:
            raise DivergedError(
                f"training has diverged: the loss or its gradient was not finite in "
                f"{self._skipped_in_a_row} optimiser steps in a row (optimizer.max_skipped_steps); "
                f"the last loss is {float(total)}",
                [minibatch for minibatch, _ in terms],
            )
        return gradient

    def step(self, gradient: Gradient) -> None:
        """Take the optimiser step if the gradient is finite; in any case drop the gradient."""
        if gradient.finite:
            self.trained.step()
        else:
            self.trained.discard()

    def discard(self) -> None:
        """Drop the gradient without an optimiser step."""
        self.trained.discard()

    def _agree(self, loss: float, norm: float) -> Gradient:
        """Agree on whether the gradient is finite: all ranks take the step, or none."""
        fault = 0.0 if math.isfinite(loss) and math.isfinite(norm) else 1.0
        faults = self.distributed.all_reduce(torch.tensor(fault))
        finite = float(faults) == 0.0
        return Gradient(norm if finite else math.nan, finite)

    def needs_peers(self, folder: Path) -> bool:
        """Whether all ranks must save, or load, a folder at once.

        So they must where DeepSpeed's own files are in it.
        """
        return self.trained.needs_peers or (folder / "engine").is_dir()

    def save(self, folder: Path) -> None:
        """Write the trained weights, the optimiser and the schedule; called on every rank."""
        folder.mkdir(exist_ok=True)
        with self.in_use():
            self.trained.save(folder)
        if self.distributed.is_main:
            state = {
                "layout": self.trained.layout,
                "ranks": self.distributed.world_size,
                "updates": self.scheduler.last_epoch,
                "skipped_in_a_row": self._skipped_in_a_row,
            }
            (folder / "learner.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Resume from the files of `save` on any number of ranks; called on every rank.

        The learning rate follows this run's schedule, which may have more steps. Raises UserError,
        or PeerError, on all ranks.
        """
        kinds = {"layout": str, "updates": int, "skipped_in_a_row": int}
        together, trained = self.distributed.fail_together, self.trained
        state = together(lambda: read_numbers(folder / "learner.json", kinds))
        layout = state["layout"]
        if layout in (REPLICATED, FRAGMENTS) and not trained.needs_peers:
            with self.in_use():
                together(lambda: trained.load(folder, layout))
                trained.synchronise()
        elif isinstance(trained, Sharded) and layout == trained.engine_layout:
            with self.in_use():
                trained.load_engine(folder)
        else:
            raise UserError(
                f"the checkpoint is of {short_repr(layout)}, this launch is of "
                f"{trained.layout!r}; what an earlier version or NVMe offload has written resumes "
                "on the same ZeRO stage and number of ranks alone"
            )
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self.scheduler.last_epoch = state["updates"] - 1
        with warnings.catch_warnings():  # that the optimiser has not stepped yet
            warnings.simplefilter("ignore")
            self.scheduler.step()  # sets this run's learning rate for the update


def count_step(name: str, gradient: Gradient, metrics: Metrics) -> None:
    """Add the gradient's norm to the metric `name`, or 1 to `skipped_steps`."""
    if gradient.finite:
        metrics.add(name, gradient.norm)
    else:
        metrics.add("skipped_steps", 1.0, 0.0)


@contextmanager
def keeping_batch(path: Path) -> Iterator[None]:
    """Save the minibatches of a diverging step as dicts of tensors, and name the file."""
    try:
        yield
    except DivergedError as error:
        where = f"in {path}, for torch.load"
        try:
            torch.save([batch.tensors() for batch in error.batches], path)
        except (OSError, RuntimeError) as fault:  # torch's errors on a full disk differ
            where = f"lost: it cannot be saved: {one_line(fault, 100)}"
            with suppress(OSError):
                path.unlink(missing_ok=True)
        message = f"{error}; its batch is {where}"
        raise DivergedError(message, error.batches) from None
