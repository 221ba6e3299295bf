"""The training loop that `sft` and `reward` share.

One step, `SupervisedTrainer.step`:
  1. this rank's share of the step's rows                            data
  2. an exact optimiser step on the mean over all ranks              learner
  3. held-out metrics, checkpoint, metrics                           run_state, metrics

transformers' Trainer would do for one process, but wraps models in DeepSpeed and handles non-finite
gradients in its own ways; here both are as in `ppo`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from marlhf.common.errors import UserError
from marlhf.common.signals import StopSignals, stop
from marlhf.common.state_files import check_weights, read_numbers
from marlhf.config import RewardConfig, SFTConfig
from marlhf.data.order import PromptStream
from marlhf.distributed import Distributed
from marlhf.runs.directory import writing
from marlhf.runs.metrics import Metrics, peak_memory_gb
from marlhf.runs.state import Claimed, RunState
from marlhf.training.learner import Learner, count_step, keeping_batch

JobConfig = SFTConfig | RewardConfig
AnyConfig = TypeVar("AnyConfig", SFTConfig, RewardConfig)
Batch = dict[str, Any]  # tensors, and None where there is none

NOT_TRAINED = -100  # label of entries that are not in the loss
_WEIGHTS = "trained.safetensors"


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

    given: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    device: torch.device

    @property
    def attention_mask(self) -> Tensor:
        """[B,L] bool, from the lengths of the rows."""
        lengths = torch.tensor([len(row) for row in self.given], device=self.device)
        return torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]

    def rows(self, index: Tensor) -> Batch:
        """A batch of the rows at `index`."""
        return self.collate([self.given[i] for i in index.tolist()])

    def counts(self) -> Tensor:
        """Entries that the loss counts, float64 [1]."""
        return _counted(self.collate(self.given)["labels"]).double()[None]

    def tensors(self) -> dict[str, Tensor]:
        """All rows as one batch."""
        return {k: v for k, v in self.collate(self.given).items() if v is not None}


class SupervisedTrainer:
    """The training loop of a job.

    config   as `resolved` gives it
    claimed  from `run_state.claim`
    """

    def __init__(
        self,
        task: Task,
        config: JobConfig,
        claimed: Claimed,
        distributed: Distributed,
    ) -> None:
        assert config.steps is not None
        self.task, self.config, self.distributed = task, config, distributed
        self.steps = config.steps
        self.run, found = claimed.run, claimed.found
        places: Any = range(len(task.rows))
        self.stream = PromptStream(places, config.seed, config.data.shuffle)
        settings = config.optimizer
        self.learner = Learner(
            task.module, None, settings.learning_rate, settings, self.steps, distributed
        )
        self.stopping = EarlyStopping(task.module, config.early_stopping, distributed)
        parts = {"model": self.learner, "early_stopping": self.stopping}
        self.state = RunState(parts, config, distributed, claimed.made_of)
        self.step_count = 0 if found is None else self.state.load(found)

    @contextmanager
    def running(self) -> Iterator[Path]:
        """Train, then let the caller write the folder `final.partial`, which becomes `final`.

        After SIGTERM or Ctrl-C the current step is finished and saved before the process ends.
        """
        run, fail_together = self.run, self.distributed.fail_together
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
        with self.distributed.whole_on_cpu(self.task.module), writing(self.run.path):
            self.distributed.fail_together(write if self.distributed.is_main else lambda: None)

    def _train(self, signals: StopSignals) -> None:
        if self.step_count == 0:
            self._write({"step": 0, **self.task.summary, **self._evaluate_if_due()})
        while self.step_count < self.steps and not self.stopping.is_over:
            row = self.step()
            try:
                row |= self._evaluate_if_due()
            finally:
                self._write(row)
            stopped_by = signals.requested()
            is_last = stopped_by is not None or self.stopping.is_over
            if self.state.is_due(self.step_count, is_last):
                self.distributed.fail_together(self.run.sync)
                loss = row.get(self.task.selects)
                score = None if loss is None else -loss
                self.state.save(self.run.checkpoints, self.step_count, score)
            if stopped_by is not None:
                stop(stopped_by)

    def step(self) -> dict[str, Any]:
        """Take one optimiser step; returns its row of metrics."""
        config, task, distributed, metrics = self.config, self.task, self.distributed, Metrics()
        began, learning_rate = time.perf_counter(), self.learner.learning_rate
        places: Any = self.stream.batch(self.step_count, config.batch_size)
        ordered = sorted((task.rows[place] for place in places), key=len)
        # 1. every n-th row by length, so that the ranks' shares are alike
        mine = ordered[distributed.rank :: distributed.world_size]
        share = Share(mine, task.collate, distributed.device)
        name = f"diverged-step-{self.step_count + 1}-rank-{distributed.rank}.pt"
        # 2. step
        with keeping_batch(self.run.path / name):
            gradient = self.learner.optimise((share, partial(self._objective, metrics)))
        self.learner.scheduler.step()
        self.step_count += 1
        # 3. report
        metrics.add("skipped_steps", 0.0)
        count_step("grad_norm", gradient, metrics)
        reduced = metrics.reduce(distributed.all_reduce, distributed.gather_objects)
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
            "peak_memory_gb": peak_memory_gb(),
        }

    def _objective(self, metrics: Metrics, batch: Batch, count: float) -> Tensor:
        """One micro-batch's share of the step's loss."""
        inputs, labels = placed(batch, self.distributed.device)
        loss = self.task.loss(self.learner.model(**inputs), labels, count)
        metrics.add("loss", loss.detach() * count, _counted(labels))
        metrics.add("counted", count)
        return loss

    def _evaluate_if_due(self) -> dict[str, Any]:
        """Held-out metrics, exact over all rows of all ranks; empty where not due."""
        every, step = self.config.log.eval_every, self.step_count
        if not self.task.held_out or not every or (step % every and step != self.steps):
            return {}
        self.learner.model.eval()
        with torch.no_grad(), self.distributed.autocast():
            metrics = self.task.evaluate(self.learner.model)
        self.stopping.see(metrics[self.task.selects])
        return metrics

    def _write(self, row: dict[str, Any]) -> None:
        self.distributed.fail_together(lambda: self.run.write(row))


class EarlyStopping:
    """Ends training after `patience` evaluations without a new lowest held-out metric.

    `restore` then brings back the weights with which it was lowest. Without patience nothing
    happens.
    """

    def __init__(self, module: nn.Module, patience: int | None, distributed: Distributed) -> None:
        self._module, self._patience, self._distributed = module, patience, distributed
        self._best, self._stale = math.inf, 0
        self._weights: dict[str, Tensor] = {}  # on the main rank

    @property
    def is_over(self) -> bool:
        """Whether the metric has had no new minimum for `patience` evaluations."""
        return self._patience is not None and self._stale >= self._patience

    def see(self, value: float) -> None:
        """Record an evaluation; keeps the weights if it is the best."""
        if self._patience is None:
            return
        if value < self._best:
            self._best, self._stale = value, 0
            self._weights = self._distributed.trained_weights(self._module)
        else:
            self._stale += 1

    def restore(self) -> None:
        """Restore the best weights, if there are any."""
        if self._best < math.inf:
            self._distributed.set_trained_weights(self._module, self._weights)

    def save(self, folder: Path) -> None:
        """Write the best weights, their metric and the evaluations since."""
        if self._distributed.is_main:
            folder.mkdir()
            save_file(self._weights, folder / _WEIGHTS)
            state = {"best": self._best, "stale": self._stale}
            (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Resume from the files of `save`. Raises UserError."""
        state = read_numbers(folder / "state.json", {"best": (int, float), "stale": int})
        self._best, self._stale = state["best"], state["stale"]
        if self._distributed.is_main:
            self._weights = load_file(folder / _WEIGHTS)
            trained = {n: p for n, p in self._module.named_parameters() if p.requires_grad}
            shapes = {n: torch.Size(getattr(p, "ds_shape", p.shape)) for n, p in trained.items()}
            check_weights(self._weights, shapes if self._weights or self._best < math.inf else {})


def placed(batch: Batch, device: torch.device) -> tuple[Batch, Tensor]:
    """`(the module's inputs, labels)` of a batch, on a device."""
    inputs: Batch = {k: v if v is None else v.to(device) for k, v in batch.items()}
    return inputs, inputs.pop("labels")


def _counted(labels: Tensor) -> Tensor:
    return (labels != NOT_TRAINED).sum()


def shares(
    rows: Sequence[Any], size: int, distributed: Distributed
) -> Iterator[tuple[int, Sequence[Any], int]]:
    """Yield this rank's forward passes, the shortest rows first.

    Each is `(index of its first row in that order, its rows, how many of them count)`. Every rank
    gets the same number of passes, as some engines need: where rows run out, one is repeated and
    does not count.
    """
    ordered = sorted(rows, key=len)
    for start in range(0, len(ordered), size * distributed.world_size):
        first = start + distributed.rank * size
        part = ordered[first : first + size]
        yield first, part or ordered[:1], len(part)


def resolved(config: AnyConfig, rows: int) -> AnyConfig:
    """The configuration with `steps` computed from `epochs` where they are not set.

    Raises UserError for a batch too large for the data.
    """
    PromptStream(range(rows)).check_batch(config.batch_size, "batch_size")
    return replace(
        config, steps=config.steps or math.ceil(config.epochs * rows / config.batch_size)
    )


def check_batch_size(config: JobConfig, distributed: Distributed) -> None:
    """Check that all ranks get equally many rows per step. Raises UserError."""
    if config.batch_size % distributed.world_size:
        raise UserError(
            f"batch_size: given {config.batch_size}, must be a multiple of the "
            f"{distributed.world_size} ranks"
        )
