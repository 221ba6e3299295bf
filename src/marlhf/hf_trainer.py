"""transformers' Trainer on our configuration and run directory: what `sft` and `reward` share.

The Trainer's part is the loop, the optimiser, ranks, accumulation and checkpoints. Ours are the
order of rows, the loss over a whole optimiser step, exact evaluation, and the files of a run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from marlhf.checkpoint import Checkpoint
from marlhf.config import AdamWSettings, RewardConfig, SFTConfig
from marlhf.data import PromptStream
from marlhf.distributed import Distributed
from marlhf.errors import UserError
from marlhf.metrics import peak_memory_gb
from marlhf.run_directory import RunDirectory, writing
from marlhf.run_state import RunState
from marlhf.signals import StopSignals, stop

JobConfig = SFTConfig | RewardConfig
AnyConfig = TypeVar("AnyConfig", SFTConfig, RewardConfig)
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


_WEIGHTS = "trained.safetensors"


class StepRows(Dataset[Any]):
    """The rows of step 0, then those of step 1, and so on; in a step the shortest first, so that
    little is padding. The order is a pure function of the seed."""

    def __init__(self, rows: Sequence[Any], config: JobConfig) -> None:
        self._rows = rows
        self._steps, self._batch_size = config.steps or 0, config.batch_size
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
    """transformers' Trainer with our order of rows, exact evaluation and run directory.

    config   as `resolved` gives it
    claimed  from `run_state.claim`: the run directory, and the checkpoint to go on from
    """

    def __init__(
        self,
        task: Task,
        config: JobConfig,
        claimed: tuple[RunDirectory, Checkpoint | None],
        distributed: Distributed,
    ) -> None:
        assert config.steps is not None
        self.task, self.config, self.distributed = task, config, distributed
        self.run_directory, self.found = claimed
        module = task.module.to(distributed.device)
        super().__init__(
            model=module,
            args=_arguments(config, self.run_directory, distributed),
            data_collator=task.collate,
            train_dataset=StepRows(task.rows, config),
            compute_loss_func=self._share_of_loss,
            optimizers=(_adamw(module, config.optimizer), None),  # pyright: ignore[reportArgumentType]
        )
        self.remove_callback(PrinterCallback)
        self.metrics = _Metrics(task, config, self.run_directory, distributed)
        self.add_callback(self.metrics)
        patience = config.early_stopping
        stopping = None
        if patience is not None:
            stopping = EarlyStopping(module, task.selects, patience, distributed.is_main)
            self.add_callback(stopping)
        parts = {"trainer": self, "early_stopping": stopping}
        self.run_state = RunState(parts, config, distributed)
        self._resume_from: Path | None = None

    @contextmanager
    def running(self) -> Iterator[Path]:
        """Train, then let the caller write the folder `final.partial`, which becomes `final`.

        After SIGTERM or Ctrl-C the step at work is finished and saved before the process ends.
        """
        run, together = self.run_directory, self.distributed.together
        if self.found is not None:
            self.run_state.load(self.found)
            self.metrics.resumed()
        self.args.eval_on_start = self.found is None and self.metrics.is_due(0)
        together(lambda: run.open(self.config, self.args.max_steps))
        try:
            with StopSignals(self.distributed.gather_objects) as self.metrics.signals:
                self.train(resume_from_checkpoint=self._resume_from and str(self._resume_from))
                if self.metrics.stopped_by is not None:
                    stop(self.metrics.stopped_by)
                yield run.path / "final.partial"
                together(lambda: run.publish(run.path / "final.partial"))
        finally:
            run.close()

    def write_final(self, write: Callable[[], None]) -> None:
        """Call `write` on the main rank; whatever fails there ends all ranks."""

        def guarded() -> None:
            if self.distributed.is_main:
                with writing(self.run_directory.path):
                    write()

        self.distributed.together(guarded)

    # -- checkpoints: a part of `RunState`, in the Trainer's files but for the weights -------------

    def save(self, folder: Path) -> None:
        """Weights, optimiser, schedule and position, for `load`."""
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(_weights(self.task.module), folder / _WEIGHTS)
            self.state.log_history = []  # metrics.jsonl has it
            self.state.save_to_json(str(folder / "trainer_state.json"))
        self._save_optimizer_and_scheduler(str(folder))

    def load(self, folder: Path) -> None:
        """Let training go on from a folder; the Trainer reads it when it starts."""
        self._resume_from = folder

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        _set_weights(self.task.module, load_file(Path(resume_from_checkpoint) / _WEIGHTS))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """What the Trainer does when a checkpoint is due."""
        loss = self.metrics.flush().get(self.task.selects)
        self.distributed.together(self.run_directory.sync)
        score = None if loss is None else -loss
        self.run_state.save(self.run_directory.checkpoints, self.state.global_step, score)

    # -- loss and evaluation ----------------------------------------------------------------------

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


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained, on the CPU."""
    trained = (item for item in module.named_parameters() if item[1].requires_grad)
    return {
        name: p.detach().cpu().clone(memory_format=torch.contiguous_format) for name, p in trained
    }


@torch.no_grad()
def _set_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises KeyError where they are of another model."""
    parameters = dict(module.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)


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


def resolved(config: AnyConfig, rows: int) -> AnyConfig:
    """The configuration with the `steps` that its `epochs` over so many rows come to."""
    return replace(
        config, steps=config.steps or math.ceil(config.epochs * rows / config.batch_size)
    )


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


def _arguments(config: JobConfig, run: RunDirectory, distributed: Distributed) -> TrainingArguments:
    """Our settings in the Trainer's words."""
    optimizer = config.optimizer
    micro = micro_batch_size(config, distributed)
    on_cpu = distributed.device.type == "cpu"
    return TrainingArguments(
        output_dir=str(run.path),
        max_steps=config.steps or 0,
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

    def __init__(
        self, task: Task, config: JobConfig, run: RunDirectory, distributed: Distributed
    ) -> None:
        self._run, self._together = run, distributed.together
        self._steps = config.steps
        self._every = config.log.eval_every if task.held_out else 0
        self._checkpoint_every = config.checkpoint.every
        self._counts = task.counts
        self._passes = config.batch_size / len(task.rows)
        self.counted = 0.0
        self.signals: StopSignals | None = None
        self.stopped_by: int | None = None
        self._row: dict[str, Any] = {"step": 0, **task.summary}
        self._began = 0.0

    def resumed(self) -> None:
        """The row before the first step is there already."""
        self._row = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step starts: all of the last one is known."""
        self.flush()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What the step took, and whether an evaluation, a checkpoint or the end follows."""
        seconds, step = time.perf_counter() - self._began, state.global_step
        self._row |= {
            "epoch": step * self._passes,
            f"trained_{self._counts}": round(self.counted),
            f"{self._counts}_per_second": self.counted / seconds,
            "step_seconds": seconds,
            "peak_memory_gb": peak_memory_gb(),
        }
        control.should_evaluate = self.is_due(step)
        self.stopped_by = self.signals.requested() if self.signals is not None else None
        control.should_training_stop |= self.stopped_by is not None
        every, last = self._checkpoint_every, step == self._steps or self.stopped_by is not None
        control.should_save = bool(every and (last or step % every == 0))

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
            self.flush()
            raise FloatingPointError(f"the norm of the gradient is {norm}; training has diverged")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last row."""
        self.flush()

    def flush(self) -> dict[str, Any]:
        """Write the row, if there is one, and return it."""
        row, self._row = self._row, {}
        if row:
            self._together(lambda: self._run.write(row))
        return row


class EarlyStopping(TrainerCallback):
    """Ends training when a held-out metric has not gone down for `patience` evaluations, and
    brings back the weights with which it was lowest."""

    def __init__(self, module: nn.Module, metric: str, patience: int, is_writer: bool) -> None:
        self._module, self._metric, self._patience = module, metric, patience
        self._is_writer = is_writer
        self._best, self._stale = math.inf, 0
        self._weights: dict[str, Tensor] = {}

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        """Better, or one more evaluation without getting better."""
        if metrics[self._metric] < self._best:
            self._best, self._stale = metrics[self._metric], 0
            self._weights = _weights(self._module)
            return
        self._stale += 1
        control.should_training_stop |= self._stale >= self._patience

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Bring the best weights back."""
        _set_weights(self._module, self._weights)

    def save(self, folder: Path) -> None:
        """The best weights so far, and for how long they have been."""
        if self._is_writer:
            folder.mkdir()
            save_file(self._weights, folder / _WEIGHTS)
            state = {"best": self._best, "stale": self._stale}
            (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self._best, self._stale = state["best"], state["stale"]
        self._weights = load_file(folder / _WEIGHTS)
