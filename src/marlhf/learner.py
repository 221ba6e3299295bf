"""A model being trained: its optimiser and schedule, and one exact optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from marlhf.batching import micro_batches
from marlhf.config import OptimizerSettings
from marlhf.distributed import Distributed
from marlhf.experience import Experience
from marlhf.loading import trainable_parameters

Objective = Callable[[Experience, float, float], Tensor]


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

    def optimise(self, minibatch: Experience, objective: Objective) -> float:
        """One optimiser step, its gradient accumulated over micro-batches; returns its norm.

        objective(rows, tokens, macro_actions) is the loss of some rows, divided by the counts of
        the whole step over all ranks, so that no split into micro-batches and ranks changes the
        gradient. Raises FloatingPointError, the weights untouched, where the gradient is not
        finite.
        """
        tokens, macro_actions = self.distributed.all_reduce(minibatch.counts()).tolist()
        parts = micro_batches(minibatch.attention_mask, self.settings.micro_batch_size)
        self.model.train()
        for i, part in enumerate(parts):
            with self.distributed.accumulate(self.model, last=i == len(parts) - 1):
                with self.distributed.autocast():
                    loss = objective(minibatch.rows(part), tokens, macro_actions)
                self.distributed.backward(loss)
        limit = self.settings.max_grad_norm or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the gradient is {norm}; training has diverged")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
