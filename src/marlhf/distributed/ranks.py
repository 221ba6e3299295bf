"""The ranks of a launch: collectives, and placement of models on the ranks."""

from __future__ import annotations

import atexit
import copy
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from marlhf.common.cpu_memory import GradientBuffer
from marlhf.common.errors import ReportedError, UserError, one_line
from marlhf.compat.deepspeed import (
    gathered_parameter,
    is_engine,
    is_sharded,
    passes_begin_at,
    without_hooks,
)
from marlhf.distributed.profile import (
    check_precision,
    deepspeed_plugin,
    lone_process,
    uses_cpu,
)
from marlhf.distributed.trained import Engine, Replicated, Trained

# Buffer sizes in elements. DeepSpeed's defaults are 5 to 10 times as large, and ZeRO-3 saves
# memory only for models larger than its buffers.
_BUFFERS = {
    "reduce_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 20_000_000,
    "stage3_max_live_parameters": 100_000_000,
    "stage3_max_reuse_distance": 20_000_000,
}
Result = TypeVar("Result")


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    """All linear layers in a module."""
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def in_bf16(parameter: nn.Parameter) -> nn.Parameter:
    """A frozen bf16 copy of a parameter."""
    return nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)


@contextmanager
def reading(
    parts: Iterable[nn.Module], others: Mapping[nn.Parameter, nn.Parameter]
) -> Iterator[None]:
    """Replace the direct parameters of `parts` by those that `others` maps them to, within.

    Another module that shares a parameter, as embeddings may, keeps the original.
    """
    replaced = [
        (part, name, parameter)
        for part in parts
        for name, parameter in part.named_parameters(recurse=False)
        if parameter in others
    ]
    for part, name, parameter in replaced:
        setattr(part, name, others[parameter])
    try:
        yield
    finally:
        for part, name, parameter in replaced:
            setattr(part, name, parameter)


def _set_default_timeout(timeout: timedelta) -> None:
    """Set the timeout of process groups that DeepSpeed creates: it passes none on."""
    constants: Any = torch.distributed.distributed_c10d
    constants.default_pg_timeout = timeout  # gloo's default: 30 minutes
    constants.default_pg_nccl_timeout = timeout  # NCCL's default: 10


class PeerError(ReportedError):
    """Another rank failed; the message says which and how."""


class Distributed:
    """This process among its peers. One process runs the same code with a world size of 1.

    precision         "bf16" runs matrix products under autocast; weights keep their dtype
    timeout_minutes   how long a rank waits for the others before it fails

    Raises UserError where the configuration of `accelerate launch` contradicts the job's.
    """

    def __init__(
        self, precision: Literal["fp32", "bf16"] = "fp32", timeout_minutes: float = 360
    ) -> None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        on_cpu = uses_cpu() or not torch.cuda.is_available()
        plugin = deepspeed_plugin(on_cpu)
        check_precision(precision)
        if (line := lone_process()) is not None:
            print(f"marlhf: {line}", file=sys.stderr)
        handlers = []
        if world > 1 or plugin is not None:
            # by default accelerate counts CPU ranks but silently does not connect them
            backend = "gloo" if on_cpu else "nccl"
            timeout = timedelta(minutes=timeout_minutes)
            handlers.append(InitProcessGroupKwargs(backend, timeout=timeout))
            _set_default_timeout(timeout)
        self._accelerator = Accelerator(
            mixed_precision="no",
            # excludes Apple's GPU, which has no float64; `cpu` would exclude DeepSpeed too
            cpu=on_cpu and plugin is None,
            deepspeed_plugin=plugin,
            kwargs_handlers=handlers,
        )
        self._precision = precision
        if plugin is not None:
            from marlhf.compat.transformers import load_complete_models

            load_complete_models()
        self._deepspeed: dict[str, Any] | None = None if plugin is None else plugin.deepspeed_config
        self._offloads: list[Any] = []  # `DeepSpeedZeRoOffload` handles of sharded weights
        self._gradients = GradientBuffer()
        kind = self._accelerator.distributed_type
        connected = torch.distributed.is_initialized()
        assert (kind == DistributedType.DEEPSPEED) == (plugin is not None), "DeepSpeed fell away"
        if self.world_size != world or not (connected or world == 1):
            raise UserError(
                f"WORLD_SIZE: given {world}, but accelerate connected {self.world_size} processes; "
                "start with `accelerate launch` or torchrun, which set RANK and LOCAL_RANK too"
            )
        if connected:
            atexit.register(_disconnect, self._accelerator)

    @property
    def rank(self) -> int:
        """Index of this process, 0 .. world_size-1."""
        return self._accelerator.process_index

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self._accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self._accelerator.device

    @property
    def zero_stage(self) -> int:
        """ZeRO stage: 1, 2 or 3 under DeepSpeed, else 0."""
        return self._deepspeed["zero_optimization"]["stage"] if self._deepspeed else 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over ranks; device and dtype are those of `x`."""
        if self.world_size == 1:
            return x
        total = x.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(x.device)

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """The lists of all ranks, concatenated in order of rank, on every rank."""
        if self.world_size == 1:
            return items
        gathered: list[list[Any]] = [[] for _ in range(self.world_size)]
        torch.distributed.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]

    def fail_together(self, work: Callable[[], Result], waits: bool = False) -> Result:
        """Run `work` on every rank; if it raises on one, all raise and none hangs.

        The rank that failed raises its own error, the others PeerError. `work` may differ per rank.

        waits   `work` itself waits for other ranks, such as for weights that they hold. Then a rank
                that fails exits alone, and the launcher ends the others.
        """
        if self.world_size == 1 or waits:
            return work()
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        texts = self.gather_objects([None if failure is None else one_line(failure)])
        if failure is not None:
            raise failure
        for rank, text in enumerate(texts):
            if text is not None:
                raise PeerError(f"rank {rank} failed: {text}")
        return cast("Result", result)

    def autocast(self) -> Any:
        """Context of a forward pass at the configured precision."""
        # the cache would keep a bf16 copy of every weight that ZeRO-3 releases
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self._precision == "bf16",
            cache_enabled=self.zero_stage < 3,
        )

    def train(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> Trained:
        """Prepare a model and its optimiser for training on all ranks."""
        if self.zero_stage == 0 or self._is_sharded(module):
            return Replicated(
                module.to(self.device), optimizer, max_grad_norm, self._offloads, self._gradients
            )
        engine = self._engine(module, optimizer, max_grad_norm)
        if self.zero_stage == 3:
            self._offloads.append(engine.optimizer.parameter_offload)
        return Engine(engine)

    def shard(self, module: Any, backbone: nn.Module) -> Any:
        """Place a frozen model: sharded under ZeRO-3, unsharded on this rank's device otherwise.

        backbone   the part of it that every forward pass begins with

        Adapters added later stay replicated.
        """
        if self.zero_stage < 3:
            return module.to(self.device)
        offload = self._engine(module.requires_grad_(False)).optimizer
        passes_begin_at(offload, backbone)
        self._offloads.append(offload)
        return module

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Under ZeRO-3, gather all weights of a module; elsewhere a no-op.

        Forward passes within need no other rank. Must be entered on all ranks.
        At bf16 precision, weights of linear layers are bf16 copies, rounded as by autocast.
        """
        parameters = {p for p in module.parameters() if is_sharded(p)}
        if not parameters:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        linear = linear_layers(module) if self._precision == "bf16" else []
        rounded: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in (p for layer in linear for p in layer.parameters(recurse=False)):
            if parameter in parameters:
                with gathered_parameter(parameter):  # one at a time
                    rounded[parameter] = in_bf16(parameter)
        with ExitStack() as stack:
            for offload in self._offloads:
                if not parameters.isdisjoint(offload.module.parameters()):
                    stack.enter_context(without_hooks(offload))
            stack.enter_context(reading(linear, rounded))
            others = [p for p in module.parameters() if p in parameters]
            stack.enter_context(GatheredParameters(others))
            yield

    @contextmanager
    def whole_on_cpu(self, module: nn.Module) -> Iterator[None]:
        """Under ZeRO-3, gather a module's weights on the first rank's CPU, to write them.

        No device need hold all of them. Elsewhere a no-op. Must be entered on all ranks.
        """
        copies: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in module.parameters() if self._is_sharded(module) else ():
            with gathered_parameter(parameter):
                if self.is_main:
                    whole = parameter.detach().to("cpu", copy=True)
                    copies[parameter] = nn.Parameter(whole, parameter.requires_grad)
        with reading(module.modules(), copies):
            yield

    @torch.no_grad()
    def trained_weights(self, module: nn.Module) -> dict[str, Tensor]:
        """A copy of the trained weights on the first rank's CPU; empty on the others.

        Must be called on all ranks.
        """
        found = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                with gathered_parameter(parameter):
                    if self.is_main:
                        copied = torch.clone(parameter.cpu(), memory_format=torch.contiguous_format)
                        found[name] = copied
        return found

    @torch.no_grad()
    def set_trained_weights(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Restore the first rank's copy from `trained_weights`, on all ranks.

        The optimiser is not updated: only for use after training.
        """
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                with gathered_parameter(parameter, modifier_rank=0):
                    if self.is_main:
                        parameter.copy_(weights[name])
                    if self.world_size > 1 and not is_sharded(parameter):
                        torch.distributed.broadcast(parameter, 0)

    def unwrap(self, model: Any) -> Any:
        """The module that was given to `train`."""
        is_wrapped = isinstance(model, DistributedDataParallel) or is_engine(model)
        return model.module if is_wrapped else model

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._accelerator.wait_for_everyone()

    def _is_sharded(self, module: nn.Module) -> bool:
        return any(is_sharded(p) for p in module.parameters())

    def _engine(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        max_grad_norm: float | None = None,
    ) -> Any:
        import deepspeed

        assert self._deepspeed is not None
        config = copy.deepcopy(self._deepspeed)
        # DeepSpeed would manage everything in its leaf modules (experts), adapters in a frozen base
        # included. Experts need that only where each is a module, which some ranks may skip.
        frozen = {"leaf_module": {"classes": []}} if optimizer is None else {}
        config["zero_optimization"] = {**_BUFFERS, **frozen, **config["zero_optimization"]}
        config |= {
            # DeepSpeed requires values; our losses are already divided by global counts
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's own AdamW is as fast
            "steps_per_print": 2**62,
        }
        if self._precision == "bf16":
            # else the engine disables `autocast`; empty list: gradients are reduced in fp32
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        assert is_engine(engine)
        assert engine.zero_optimization_stage() == self.zero_stage
        return engine


def _disconnect(accelerator: Accelerator) -> None:
    """Destroy the process group at exit, and wait until its threads are idle.

    A thread that frees its last tensor during interpreter shutdown cannot take the GIL and aborts
    the process: a complete run would fail.
    """
    accelerator.end_training()
    patience = time.monotonic() + 5
    time.sleep(0.1)
    while _others_run() and time.monotonic() < patience:
        time.sleep(0.01)


def _others_run() -> bool:
    """Whether another thread of this process is running or blocked on I/O; False without /proc."""
    for task in Path("/proc/self/task").glob("[0-9]*"):
        with suppress(OSError):  # the thread has exited
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            if state in "RD" and int(task.name) != threading.get_native_id():
                return True
    return False
