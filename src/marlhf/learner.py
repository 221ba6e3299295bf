"""A model being trained: its optimiser and schedule, and one exact optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from marlhf.batching import micro_batches
from marlhf.config import OptimizerSettings
from marlhf.distributed import Distributed
from marlhf.loading import trainable_parameters

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


Term = tuple[Rows, Objective]


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
        settings: OptimizerSettings,
        steps: int,
        distributed: Distributed,
    ) -> None:
        self.settings = settings
        self.distributed = distributed
        self.parameters = trainable_parameters(module, adapter)
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
        self.model, self.optimizer = distributed.prepare(module, optimizer)

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

        Raises FloatingPointError where the gradient is not finite.
        """
        passes = [
            (minibatch, part, objective, counts)
            for minibatch, objective in terms
            for counts in [self.distributed.all_reduce(minibatch.counts()).tolist()]
            for part in micro_batches(minibatch.attention_mask, self.settings.micro_batch_size)
        ]
        self.model.train()
        for i, (minibatch, part, objective, counts) in enumerate(passes):
            with self.distributed.accumulate(self.model, last=i == len(passes) - 1):
                with self.distributed.autocast():
                    loss = objective(minibatch.rows(part), *counts)
                self.distributed.backward(loss)
        limit = self.settings.max_grad_norm or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the gradient is {norm}; training has diverged")
        return norm

    def step(self) -> None:
        """Move the weights along the gradient, and forget it."""
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad(set_to_none=True)
