"""The training loop that `sft` and `reward` share.

One step, `SupervisedTrainer.step`:
  1. this rank's share of the step's rows                            data
  2. an exact optimiser step on the mean over all ranks              learner
  3. held-out metrics, checkpoint, metrics                           runs.state, runs.metrics

transformers' Trainer wraps models in DeepSpeed and handles non-finite gradients in other ways than
`ppo`; this loop does both as `ppo` does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from marlhf.common.errors import UserError
from marlhf.common.memory_errors import doing
from marlhf.common.signals import StopSignals, stop
from marlhf.common.tokenization import Tokenizer
from marlhf.config import RewardConfig, SFTConfig
from marlhf.config.supervised import SupervisedConfig
from marlhf.data.order import PromptStream
from marlhf.data.template_checks import with_template_date
from marlhf.distributed import Distributed
from marlhf.models import loading
from marlhf.models.sharded_base import check_adapters
from marlhf.runs.directory import writing
from marlhf.runs.metrics import Metrics, memory_row
from marlhf.runs.state import ClaimedRun, RunState
from marlhf.training.early_stopping import EarlyStopping
from marlhf.training.learner import Learner, count_step, keeping_batch

AnyConfig = TypeVar("AnyConfig", SFTConfig, RewardConfig)
Batch = dict[str, Any]  # tensors, and None where there is none

NOT_TRAINED = -100  # label of entries that are not in the loss


@dataclass(frozen=True)
class Task:
    """A job's model, data, loss and evaluation.

    module    called with a batch without its `labels`; its result goes to `loss`
    rows      with `len(row)` in tokens
    held_out  rows to evaluate on
    collate   rows -> a batch; in `labels`, entries other than NOT_TRAINED are those that the loss
              counts
    loss      (the module's result, labels, entries counted in the full optimiser step over all
              ranks) -> this micro-batch's share of the mean
    evaluate  the module -> held-out metrics, the same on every rank
    selects   the metric of `evaluate` for early stopping; lower is better
    counts    what the loss counts, for the names of metrics: `tokens` or `pairs`
    summary   of the data, for the row of metrics before the first step
    notes     lines about the data
    """

    module: nn.Module
    rows: Sequence[Any]
    held_out: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    loss: Callable[[Any, Tensor, float], Tensor]
    evaluate: Callable[[nn.Module], dict[str, Any]]
    selects: str
    counts: str
    summary: dict[str, Any]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Share:
    """This rank's rows of an optimiser step, for `Learner`.

    device   where the model is
    """

    rows: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    device: torch.device

    @property
    def attention_mask(self) -> Tensor:
        """[B,L] bool, from the lengths of the rows."""
        lengths = torch.tensor([len(row) for row in self.rows], device=self.device)
        return torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]

    def select(self, index: Tensor) -> Batch:
        """A batch of the rows at `index`."""
        return self.collate([self.rows[i] for i in index.tolist()])

    def counts(self) -> Tensor:
        """Entries that the loss counts, float64 [1]."""
        return _counted(self.collate(self.rows)["labels"]).double()[None]

    def tensors(self) -> dict[str, Tensor]:
        """All rows as one batch."""
        return {k: v for k, v in self.collate(self.rows).items() if v is not None}


class SupervisedTrainer:
    """The training loop of a job.

    config   from `resolved`
    claimed  from `runs.state.claim_run`
    """

    def __init__(
        self,
        task: Task,
        config: SupervisedConfig,
        claimed: ClaimedRun,
        distributed: Distributed,
    ) -> None:
        assert config.steps is not None
        self.task, self.config, self.distributed = task, config, distributed
        self.steps = config.steps
        self.run_dir, checkpoint = claimed.directory, claimed.checkpoint
        indices: Any = range(len(task.rows))
        self.stream = PromptStream(indices, config.seed, config.data.shuffle)
        settings = config.optimizer
        self.learner = Learner(
            task.module, None, settings.learning_rate, settings, self.steps, distributed
        )
        self.stopping = EarlyStopping(task.module, config.early_stopping, distributed)
        parts = {"model": self.learner, "early_stopping": self.stopping}
        self.state = RunState(parts, config, distributed, claimed.provenance)
        self.step_count = 0 if checkpoint is None else self.state.load(checkpoint)

    @contextmanager
    def running(self) -> Iterator[Path]:
        """Train, then let the caller write the folder `final.partial`, which becomes `final`.

        After SIGTERM or Ctrl-C the current step is finished and saved before the process ends.
        """
        run, fail_together = self.run_dir, self.distributed.fail_together
        try:
            fail_together(lambda: run.open(self.config, self.steps, self.task.notes))
            with StopSignals(self.distributed.gather_objects) as signals:
                self._train(signals)
            self.stopping.restore()
            yield run.path / "final.partial"
            fail_together(lambda: run.publish(run.path / "final.partial"))
        finally:
            run.close()

    def write_final(self, write: Callable[[], None]) -> None:
        """Call `write` on the main rank with unsharded weights; a failure ends all ranks."""
        with self.distributed.unsharded_on_cpu(self.task.module), writing(self.run_dir.path):
            self.distributed.fail_together(write if self.distributed.is_main else lambda: None)

    def _train(self, signals: StopSignals) -> None:
        if self.step_count == 0:
            self._write({"step": 0, **self.task.summary, **self._evaluate_if_due()})
        while self.step_count < self.steps and not self.stopping.is_over:
            row = self.step()
            with self.run_dir.kept_on_error(row):
                row |= self._evaluate_if_due()
            self._write(row)
            stopped_by = signals.requested()
            is_last = stopped_by is not None or self.stopping.is_over
            if self.state.is_due(self.step_count, is_last):
                self.distributed.fail_together(self.run_dir.sync)
                loss = row.get(self.task.selects)
                score = None if loss is None else -loss
                self.state.save(self.run_dir.checkpoints, self.step_count, score)
            if stopped_by is not None:
                stop(stopped_by)

    @doing("training")
    def step(self) -> dict[str, Any]:
        """Take one optimiser step and return its row of metrics."""
        config, task, distributed, metrics = self.config, self.task, self.distributed, Metrics()
        began, learning_rate = time.perf_counter(), self.learner.learning_rate
        indices: Any = self.stream.batch(self.step_count, config.batch_size)
        ordered = sorted((task.rows[index] for index in indices), key=len)
        # 1. every n-th row by length, so that the ranks' shares cost the same
        mine = ordered[distributed.rank :: distributed.world_size]
        share = Share(mine, task.collate, distributed.device)
        name = f"diverged-step-{self.step_count + 1}-rank-{distributed.rank}.pt"
        # 2. step
        with keeping_batch(self.run_dir.path / name):
            gradient = self.learner.optimise((share, partial(self._objective, metrics)))
        self.learner.scheduler.step()
        self.step_count += 1
        # 3. report
        metrics.add("skipped_steps", 0.0)
        count_step("grad_norm", gradient, metrics)
        reduced = metrics.reduce(distributed)
        counted, seconds = reduced.pop("counted"), time.perf_counter() - began
        return {
            "step": self.step_count,
            "loss": reduced["loss"],
            "grad_norm": reduced.get("grad_norm"),
            "learning_rate": learning_rate,
            "skipped_steps": reduced["skipped_steps"],
            "epoch": self.step_count * config.batch_size / len(task.rows),
            f"trained_{task.counts}": round(counted),
            f"{task.counts}_per_second": counted / seconds,
            "step_seconds": seconds,
            **memory_row(),
        }

    def _objective(self, metrics: Metrics, batch: Batch, count: float) -> Tensor:
        """One micro-batch's share of the step's loss."""
        inputs, labels = placed(batch, self.distributed.device)
        loss = self.task.loss(self.learner.model(**inputs), labels, count)
        metrics.add("loss", loss.detach() * count, _counted(labels))
        metrics.add("counted", count)
        return loss

    @doing("training")
    def _evaluate_if_due(self) -> dict[str, Any]:
        """Held-out metrics, exact over all rows of all ranks; empty where not due."""
        every, step = self.config.log.eval_every, self.step_count
        if not self.task.held_out or not every or (step % every and step != self.steps):
            return {}
        self.learner.model.eval()
        with torch.no_grad(), self.distributed.autocast():
            metrics = self.task.evaluate(self.learner.model)
        self.stopping.record(metrics[self.task.selects])
        return metrics

    def _write(self, row: dict[str, Any]) -> None:
        self.distributed.fail_together(lambda: self.run_dir.write(row))


def placed(batch: Batch, device: torch.device) -> tuple[Batch, Tensor]:
    """`(the module's inputs, labels)` of a batch, on a device."""
    inputs: Batch = {k: v if v is None else v.to(device) for k, v in batch.items()}
    return inputs, inputs.pop("labels")


def _counted(labels: Tensor) -> Tensor:
    return (labels != NOT_TRAINED).sum()


def shares(
    rows: Sequence[Any], size: int, distributed: Distributed
) -> Iterator[tuple[int, Sequence[Any], int]]:
    """Yield this rank's forward passes, shortest rows first.

    A pass is `(index of its first row in that order, its rows, how many of them count)`. Every rank
    gets the same number of passes, as ZeRO-3 requires: a rank without rows left repeats one, which
    does not count.
    """
    lengths = getattr(rows, "lengths", None)
    order = np.argsort([len(row) for row in rows] if lengths is None else lengths, kind="stable")
    for start in range(0, len(order), size * distributed.world_size):
        first = start + distributed.rank * size
        part = order[first : first + size]
        chosen = part if len(part) else order[:1]
        yield first, [rows[int(index)] for index in chosen], len(part)


def set_up(config: AnyConfig) -> tuple[AnyConfig, Distributed, Tokenizer]:
    """Join the ranks and load the tokenizer, before a job reads its data.

    Returns the configuration with the date of chat templates fixed. Raises UserError.
    """
    distributed = Distributed(config.model.precision, config.distributed_timeout_minutes)
    check_batch_size(config, distributed)
    tokenizer = loading.load_tokenizer(config.model)
    return with_template_date(config, [tokenizer], distributed), distributed, tokenizer


def checked_model_config(
    config: SupervisedConfig, distributed: Distributed, lengths: Iterable[int], unit: str
) -> Any:
    """Load the model's configuration, and check it against the data and the ranks.

    lengths   of all inputs, tokens
    unit      the inputs' name in messages: "texts"

    Raises UserError.
    """
    model_config = loading.load_model_config(config.model)
    positions, longest = loading.position_limit(model_config), max(lengths, default=0)
    if positions is not None and longest > positions:
        raise UserError(
            f"max_length: there are {unit} of {longest} tokens, and the model has {positions} "
            f"positions; must be at most {positions}"
        )
    if distributed.zero_stage == 3:
        check_adapters(config.model, model_config)
    return model_config


def resolved(config: AnyConfig, rows: int) -> AnyConfig:
    """The configuration with `steps` computed from `epochs` where they are not set.

    Raises UserError for a batch too large for the data.
    """
    PromptStream(range(rows)).check_batch(config.batch_size, "batch_size")
    return replace(
        config, steps=config.steps or math.ceil(config.epochs * rows / config.batch_size)
    )


def check_batch_size(config: SupervisedConfig, distributed: Distributed) -> None:
    """Check that all ranks get equally many rows per step. Raises UserError."""
    if config.batch_size % distributed.world_size:
        raise UserError(
            f"batch_size: given {config.batch_size}, must be a multiple of the "
            f"{distributed.world_size} ranks"
        )
