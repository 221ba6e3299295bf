"""The ranks of a launch: what they compute together, and how models are spread over them."""

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

# Weights held at a time, in numbers. DeepSpeed's own defaults are 5 to 10 times as large, which a
# model has to outgrow before ZeRO-3 saves anything.
_BUFFERS = {
    "reduce_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 20_000_000,
    "stage3_max_live_parameters": 100_000_000,
    "stage3_max_reuse_distance": 20_000_000,
}
Result = TypeVar("Result")


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    """Those of a module."""
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def in_bf16(parameter: nn.Parameter) -> nn.Parameter:
    """A copy without a gradient."""
    return nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)


@contextmanager
def reading(
    parts: Iterable[nn.Module], others: Mapping[nn.Parameter, nn.Parameter]
) -> Iterator[None]:
    """Within, these modules, without what is below them, have `others` in the place of their
    parameters. Another module that shares one, as embeddings may, goes on to have that."""
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
    """Let a rank wait that long in groups that others make too: DeepSpeed passes no time-out on."""
    constants: Any = torch.distributed.distributed_c10d
    constants.default_pg_timeout = timeout  # gloo's 30 minutes
    constants.default_pg_nccl_timeout = timeout  # NCCL's 10


class PeerError(ReportedError):
    """Another rank failed; the message says which and how."""


class Distributed:
    """This process among its peers. One process is the same code with a world of 1.

    precision         "bf16" runs matrix products under autocast; weights stay as they were loaded
    timeout_minutes   how long a rank waits for the others before it fails

    Raises UserError where what `accelerate launch` was told contradicts the job's configuration.
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
            # left to itself accelerate counts CPU ranks but does not connect them, silently
            backend = "gloo" if on_cpu else "nccl"
            timeout = timedelta(minutes=timeout_minutes)
            handlers.append(InitProcessGroupKwargs(backend, timeout=timeout))
            _set_default_timeout(timeout)
        self._accelerator = Accelerator(
            mixed_precision="no",
            # else Apple's GPU, which has no float64; but `cpu` means no DeepSpeed either
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
        """0 .. world_size-1"""
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
        """Where this process computes."""
        return self._accelerator.device

    @property
    def zero_stage(self) -> int:
        """1, 2 or 3 under DeepSpeed, else 0."""
        return self._deepspeed["zero_optimization"]["stage"] if self._deepspeed else 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over ranks, on the device and of the dtype it came with."""
        if self.world_size == 1:
            return x
        total = x.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(x.device)

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """The lists of all ranks, one after another in order of rank, on every rank."""
        if self.world_size == 1:
            return items
        gathered: list[list[Any]] = [[] for _ in range(self.world_size)]
        torch.distributed.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]

    def fail_together(self, work: Callable[[], Result], waits: bool = False) -> Result:
        """What `work` returns here; where it fails on any rank, all ranks raise and none waits.

        The rank that failed raises its own error, the others PeerError. `work` may be different on
        every rank.

        waits   `work` itself waits for other ranks, such as for weights that they hold. Then a rank
                that fails ends by itself, and the launcher ends the others.
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
        # the cache would keep a bf16 copy of every weight that ZeRO-3 lets go of
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self._precision == "bf16",
            cache_enabled=self.zero_stage < 3,
        )

    def train(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> Trained:
        """Spread a model and its optimiser over the ranks, for training."""
        if self.zero_stage == 0 or self._is_sharded(module):
            return Replicated(
                module.to(self.device), optimizer, max_grad_norm, self._offloads, self._gradients
            )
        engine = self._engine(module, optimizer, max_grad_norm)
        if self.zero_stage == 3:
            self._offloads.append(engine.optimizer.parameter_offload)
        return Engine(engine)

    def shard(self, module: Any, backbone: nn.Module) -> Any:
        """Place a frozen model: sharded under ZeRO-3, whole on this rank's device otherwise.

        backbone   the part of it that every forward pass begins with

        Adapters that are put into it later stay replicated.
        """
        if self.zero_stage < 3:
            return module.to(self.device)
        offload = self._engine(module.requires_grad_(False)).optimizer
        passes_begin_at(offload, backbone)
        self._offloads.append(offload)
        return module

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Under ZeRO-3, have all of a module's weights here at once, so that a forward pass within
        needs no other rank; elsewhere nothing happens. To be entered on all ranks alike.

        In bf16 those of linear layers are copies, rounded as autocast would in every product.
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
        """Under ZeRO-3, have a module's weights on the CPU of the first rank, to write them: no
        device need hold all. Elsewhere nothing happens. To be entered on all ranks alike."""
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
        """A copy of what is trained, on the CPU of the first rank; nothing on the others, which are
        to ask for it too."""
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
        """Bring the weights that the first rank has from `trained_weights` back, on all ranks. The
        optimiser is not told: training is over."""
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                with gathered_parameter(parameter, modifier_rank=0):
                    if self.is_main:
                        parameter.copy_(weights[name])
                    if self.world_size > 1 and not is_sharded(parameter):
                        torch.distributed.broadcast(parameter, 0)

    def unwrap(self, model: Any) -> Any:
        """The module that `train` was given."""
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
        # DeepSpeed takes whatever is in these modules for its own, adapters in a frozen base too.
        # They are experts, which needed it as long as each was a module that ranks skip or not.
        frozen = {"leaf_module": {"classes": []}} if optimizer is None else {}
        config["zero_optimization"] = {**_BUFFERS, **frozen, **config["zero_optimization"]}
        config |= {
            # DeepSpeed must be told something; our losses are divided by global counts already
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": max_grad_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's own AdamW is as fast
            "steps_per_print": 2**62,
        }
        if self._precision == "bf16":
            # or the engine would switch `autocast` off; an empty list: gradients cross in fp32
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
    """Close the connection at exit, and let its threads come to rest.

    One that drops its last tensor after the interpreter has begun to end cannot take Python's lock,
    and aborts the process: a run that is complete would fail.
    """
    accelerator.end_training()
    patience = time.monotonic() + 5
    time.sleep(0.1)
    while _others_run() and time.monotonic() < patience:
        time.sleep(0.01)


def _others_run() -> bool:
    """Whether another thread of this process runs or is about to; false where nothing tells."""
    for task in Path("/proc/self/task").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            if state in "RD" and int(task.name) != threading.get_native_id():
                return True
    return False
