"""transformers' Trainer on our configuration and run directory: what `sft` and `reward` share.

The Trainer's part is the loop, the optimiser, ranks, accumulation and checkpoints. Ours are the
order of rows, the loss over a whole optimiser step, exact evaluation, and the files of a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from marlhf.config import AdamWSettings, RewardConfig, SFTConfig
from marlhf.data import PromptStream
from marlhf.distributed import Distributed
from marlhf.errors import UserError
from marlhf.metrics import peak_memory_gb
from marlhf.run_directory import RunDirectory

JobConfig = SFTConfig | RewardConfig
Batch = dict[str, Any]  # tensors, and None where there is none


@dataclass(frozen=True)
class Task:
    """What a job trains, and on what.

    module    called with a batch less its `labels`; its result goes to `loss`
    rows      with `len(row)` in tokens
    held_out  rows to evaluate on
    collate   rows -> a batch; in `labels` an entry other than -100 for all that the loss counts
    loss      (what the module returned, labels, entries counted in the whole optimiser step over
              all ranks) -> this part's share of the mean
    evaluate  the module -> held-out metrics, the same on every rank
    selects   the metric of `evaluate` that early stopping wants low
    counts    what the loss counts, for the names of metrics: `tokens` or `pairs`
    summary   of the data, for the row of metrics before the first step
    """

    module: nn.Module
    rows: Sequence[Any]
    held_out: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    loss: Callable[[Any, Tensor, Tensor], Tensor]
    evaluate: Callable[[nn.Module], dict[str, Any]]
    selects: str
    counts: str
    summary: dict[str, Any]


class StepRows(Dataset[Any]):
    """The rows of step 0, then those of step 1, and so on; in a step the shortest first, so that
    little is padding. The order is a pure function of the seed."""

    def __init__(self, rows: Sequence[Any], config: JobConfig, steps: int) -> None:
        self._rows = rows
        self._steps, self._batch_size = steps, config.batch_size
        places: Any = range(len(rows))
        self._stream = PromptStream(places, config.seed, config.data.shuffle)
        self._step, self._places = -1, []

    def __len__(self) -> int:
        return self._steps * self._batch_size

    def __getitem__(self, index: int) -> Any:
        step, place = divmod(index, self._batch_size)
        if step != self._step:
            found: Any = self._stream.batch(step, self._batch_size)
            self._step, self._places = step, sorted(found, key=lambda i: len(self._rows[i]))
        return self._rows[self._places[place]]


class RunTrainer(Trainer):
    """transformers' Trainer with our order of rows, exact evaluation and run directory."""

    def __init__(
        self, task: Task, config: JobConfig, run: RunDirectory, distributed: Distributed
    ) -> None:
        self.task, self.config, self.run_directory = task, config, run
        self.distributed = distributed
        module = task.module.to(distributed.device)
        steps = config.steps or math.ceil(config.epochs * len(task.rows) / config.batch_size)
        super().__init__(
            model=module,
            args=_arguments(config, steps, run, distributed),
            data_collator=task.collate,
            train_dataset=StepRows(task.rows, config, steps),
            compute_loss_func=self._share_of_loss,
            optimizers=(_adamw(module, config.optimizer), None),  # pyright: ignore[reportArgumentType]
        )
        self.remove_callback(PrinterCallback)
        self.metrics = _Metrics(task, config, steps, run)
        self.add_callback(self.metrics)
        if config.early_stopping is not None:
            self.add_callback(EarlyStopping(module, task.selects, config.early_stopping))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Train, then let the caller save, before the run directory is closed."""
        self.run_directory.open(self.config, self.args.max_steps)
        try:
            self.args.eval_on_start = self.metrics.is_due(0)
            self.train()
            yield
            self.distributed.barrier()
        finally:
            self.run_directory.close()

    def _share_of_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        self.metrics.counted = float(num_items_in_batch)
        return self.task.loss(outputs, labels, num_items_in_batch)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """Ours. The Trainer's own would set the precision of every later job in this process."""
        return self.distributed.autocast()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Held-out metrics over all rows of all ranks; the Trainer's own is a mean of batches."""
        model: Any = self.model_wrapped
        was_training = model.training
        model.eval()
        with torch.no_grad(), self.distributed.autocast():
            metrics = self.task.evaluate(model)
        model.train(was_training)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def shares(
    rows: Sequence[Any], size: int, distributed: Distributed
) -> Iterator[tuple[int, Sequence[Any], int]]:
    """`(place of the first one, rows of one forward pass on this rank, how many of them count)`,
    the shortest rows first.

    Every rank gets the same number of passes, as some engines need; where there are fewer rows than
    ranks want, a row comes again and does not count.
    """
    ordered = sorted(rows, key=len)
    for start in range(0, len(ordered), size * distributed.world_size):
        first = start + distributed.rank * size
        part = ordered[first : first + size]
        yield first, part or ordered[:1], len(part)


def micro_batch_size(config: JobConfig, distributed: Distributed) -> int:
    """Rows in one pass of training on a rank. Raises UserError where the batch cannot be split."""
    size, ranks = config.optimizer.micro_batch_size, distributed.world_size
    each, rest = divmod(config.batch_size, ranks)
    if rest or each % min(size, each):
        raise UserError(
            f"batch_size: given {config.batch_size}, must be a multiple of {size * ranks} "
            f"({ranks} ranks x optimizer.micro_batch_size={size})"
        )
    return min(size, each)


def _arguments(
    config: JobConfig, steps: int, run: RunDirectory, distributed: Distributed
) -> TrainingArguments:
    """Our settings in the Trainer's words."""
    optimizer = config.optimizer
    micro = micro_batch_size(config, distributed)
    on_cpu = distributed.device.type == "cpu"
    return TrainingArguments(
        output_dir=str(run.path),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_size // (micro * distributed.world_size),
        train_sampling_strategy="sequential",  # the dataset is in the order of training
        average_tokens_across_devices=True,
        learning_rate=optimizer.learning_rate,
        # what transformers calls constant has no warm-up
        lr_scheduler_type=optimizer.schedule.replace("constant", "constant_with_warmup"),
        warmup_steps=optimizer.warmup_steps,
        max_grad_norm=optimizer.max_grad_norm or 0.0,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and distributed.world_size > 1 else None,
        ddp_find_unused_parameters=False,
        seed=config.seed % 2**32,
        eval_strategy="no",  # `_Metrics` says when
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=not on_cpu,
    )


def _adamw(module: nn.Module, settings: AdamWSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class _Metrics(TrainerCallback):
    """One row a step in the run directory; evaluation when it is due.

    A step's row is written when all that belongs to it is known: its loss, and held-out metrics.
    """

    def __init__(self, task: Task, config: JobConfig, steps: int, run: RunDirectory) -> None:
        self._run, self._steps = run, steps
        self._every = config.log.eval_every if task.held_out else 0
        self._counts = task.counts
        self._passes = config.batch_size / len(task.rows)
        self.counted = 0.0
        self._row: dict[str, Any] = {"step": 0, **task.summary}
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step starts: all of the last one is known."""
        self._flush()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What the step took, and whether an evaluation follows."""
        seconds = time.perf_counter() - self._began
        self._row |= {
            "epoch": state.global_step * self._passes,
            f"trained_{self._counts}": round(self.counted),
            f"{self._counts}_per_second": self.counted / seconds,
            "step_seconds": seconds,
            "peak_memory_gb": peak_memory_gb(),
        }
        control.should_evaluate = self.is_due(state.global_step)

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after this step."""
        return bool(self._every and (step == self._steps or not step % self._every))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Keep what belongs to this step; a gradient that is not finite ends training."""
        logs = logs or {}
        if "train_runtime" in logs:  # the Trainer's summary of the whole run
            return
        own = {name: value for name, value in logs.items() if name != "epoch"}
        self._row = {"step": state.global_step} | own | self._row
        if not math.isfinite(norm := logs.get("grad_norm", 0.0)):
            self._flush()
            raise FloatingPointError(f"the norm of the gradient is {norm}; training has diverged")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last row."""
        self._flush()

    def _flush(self) -> None:
        """Write the row, if there is one."""
        if self._row:
            self._run.write(self._row)
        self._row = {}


class EarlyStopping(TrainerCallback):
    """Ends training when a held-out metric has not gone down for `patience` evaluations, and
    brings back the weights with which it was lowest."""

    def __init__(self, module: nn.Module, metric: str, patience: int) -> None:
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._metric, self._patience = metric, patience
        self._best, self._stale = math.inf, 0
        self._weights: dict[str, Tensor] = {}

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        """Better, or one more evaluation without getting better."""
        if metrics[self._metric] < self._best:
            self._best, self._stale = metrics[self._metric], 0
            self._weights = {n: p.detach().cpu().clone() for n, p in self._parameters.items()}
            return
        self._stale += 1
        control.should_training_stop |= self._stale >= self._patience

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Bring the best weights back."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                self._parameters[name].copy_(weight)
