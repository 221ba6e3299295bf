"""A model being trained: its optimiser and schedule, and one exact optimiser step."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from marlhf.adapters import trainable_parameters
from marlhf.batching import micro_batches
from marlhf.config import AdamWSettings
from marlhf.distributed import Distributed
from marlhf.errors import UserError
from marlhf.state_files import read_numbers

Objective = Callable[..., Tensor]


class Rows(Protocol):
    """What a loss is computed on, such as `Experience`."""

    @property
    def attention_mask(self) -> Tensor:
        """[B,L] bool."""
        ...

    def rows(self, index: Tensor) -> Any:
        """Some of the rows."""
        ...

    def counts(self) -> Tensor:
        """float64 [K], what losses are divided by: tokens, for one."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All of it, to be saved for a look."""
        ...


Term = tuple[Rows, Objective]


class DivergedError(FloatingPointError):
    """Too many losses or gradients in a row were not finite; `batches` are those of the last."""

    def __init__(self, message: str, batches: list[Rows]) -> None:
        super().__init__(message)
        self.batches = batches


class Learner:
    """Policy or critic with its AdamW.

    adapter   train this LoRA adapter (and the critic's head) only; None for all that is trainable
    steps     updates in the whole run, for the schedule
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
        self._is_finite = True
        self._skipped_in_a_row = 0
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=learning_rate,
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        # what transformers calls constant has no warm-up
        schedule = settings.schedule.replace("constant", "constant_with_warmup")
        self.scheduler = get_scheduler(schedule, optimizer, settings.warmup_steps, steps)
        self._return_memory_before_gradients_of_embeddings(module)
        self.trained = distributed.train(module, optimizer, settings.max_grad_norm)
        self.model, self.optimizer = self.trained.model, self.trained.optimizer

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def optimise(self, *terms: Term) -> float:
        """One optimiser step on a sum of losses; returns the norm of its gradient. See
        `accumulate`."""
        norm = self.accumulate(*terms)
        self.step()
        return norm

    def accumulate(self, *terms: Term) -> float:
        """The gradient of a sum of losses, clipped, for `step` or `discard`; returns its norm.

        terms   `(minibatch, objective)`: objective(rows, *counts) is the loss of some rows,
                divided by the counts of the whole minibatch over all ranks, so that no split into
                micro-batches and ranks changes the gradient

        Where the loss or the gradient is not finite on any rank, all ranks get NaN, and `step` will
        leave the weights as they are; `max_skipped_steps` of these in a row raise DivergedError.
        """
        size, alike = self.settings.micro_batch_size, self.distributed.world_size > 1
        passes = [
            (minibatch, part, objective, counts)
            for minibatch, objective in terms
            for counts in [self.distributed.all_reduce(minibatch.counts()).tolist()]
            for part in micro_batches(minibatch.attention_mask, size, alike)
        ]
        self.model.train()
        total = torch.zeros((), device=self.distributed.device)
        for i, (minibatch, part, objective, counts) in enumerate(passes):
            self._return_memory()
            with self.trained.accumulate(last=i == len(passes) - 1):
                with self.distributed.autocast():
                    loss = objective(minibatch.rows(part), *counts)
                self.trained.backward(loss)
            total += loss.detach()
        self._return_memory()
        norm = self.trained.norm()
        self._is_finite = self._all_finite(float(total), norm)
        if self._is_finite:
            self._skipped_in_a_row = 0
            return norm
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.settings.max_skipped_steps:
            raise DivergedError(
                f"training has diverged: the loss or its gradient was not finite in "
                f"{self._skipped_in_a_row} optimiser steps in a row (optimizer.max_skipped_steps); "
                f"the last loss is {float(total)}",
                [minibatch for minibatch, _ in terms],
            )
        return math.nan

    def step(self) -> None:
        """Move the weights along the gradient, where it is finite, and forget it."""
        if self._is_finite:
            self.trained.step()
        else:
            self.trained.discard()

    def discard(self) -> None:
        """Forget the gradient."""
        self.trained.discard()

    def _return_memory_before_gradients_of_embeddings(self, module: nn.Module) -> None:
        """They are the largest arrays of a backward pass and come last, when all activations have
        been freed, into pieces that they do not fit into."""

        def read(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: self._return_memory())

        for layer in module.modules():
            if isinstance(layer, nn.Embedding) and layer.weight.requires_grad:
                layer.register_forward_hook(read)

    def _return_memory(self) -> None:
        """On a CPU, give freed memory back to the system. The C library keeps what earlier passes
        have freed, in pieces that later ones may not fit into."""
        if self.distributed.device.type != "cpu":
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def _all_finite(self, loss: float, norm: float) -> bool:
        """Whether these are finite on every rank: all must take the step, or none."""
        fault = 0.0 if math.isfinite(loss) and math.isfinite(norm) else 1.0
        return float(self.distributed.all_reduce(torch.tensor(fault))) == 0.0

    def save(self, folder: Path) -> None:
        """Write the trained weights, the optimiser and the schedule; called on every rank."""
        folder.mkdir(exist_ok=True)
        self.trained.save(folder)
        if self.distributed.is_main:
            state = {
                "layout": self.trained.layout,
                "updates": self.scheduler.last_epoch,
                "skipped_in_a_row": self._skipped_in_a_row,
            }
            (folder / "learner.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote, on every rank; what is replicated may be loaded by any
        number of ranks, what DeepSpeed sharded by ranks that shard alike. Raises UserError.

        The learning rate is that of this run's schedule, which may have more steps.
        """
        kinds = {"layout": str, "updates": int, "skipped_in_a_row": int}
        state = read_numbers(folder / "learner.json", kinds)
        if state["layout"] != self.trained.layout:
            raise UserError(
                f"the checkpoint is of {state['layout']}, this launch is {self.trained.layout}; "
                "they must be the same"
            )
        self.trained.load(folder)
        self._skipped_in_a_row = state["skipped_in_a_row"]
        updates = state["updates"]  # `step` goes on to these, and sets this run's rate for them
        position = {"last_epoch": updates - 1, "_step_count": updates + 1}
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **position})
        self.scheduler.step()
