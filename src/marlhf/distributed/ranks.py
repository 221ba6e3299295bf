"""The ranks of a launch: collectives, and placement of models on the ranks."""

from __future__ import annotations

import atexit
import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from marlhf.common.cpu_memory import GradientBuffer
from marlhf.common.errors import PeerError, ReportedError, UserError, one_line, say
from marlhf.common.memory_errors import doing
from marlhf.common.types import AllReduceSum
from marlhf.compat.deepspeed import (
    is_engine,
    is_sharded,
    parameter_offload,
    passes_begin_at,
    share_fp32_weights,
)
from marlhf.compat.torch import autocast_experts, set_default_timeout
from marlhf.distributed import zero
from marlhf.distributed.placement import OneByOne, Placement
from marlhf.distributed.profile import (
    check_precision,
    deepspeed_plugin,
    launched_processes,
    lone_process,
    precision_note,
    uses_cpu,
)
from marlhf.distributed.roll_call import all_ranks_present
from marlhf.distributed.shutdown import disconnect, remember, this_process
from marlhf.distributed.trained import Replicated, Sharded, Trained

# Buffer sizes in elements. DeepSpeed's defaults are 5 to 10 times as large, and ZeRO-3 saves
# memory only for models larger than its buffers.
_BUFFERS = {
    "reduce_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 20_000_000,
    "stage3_max_live_parameters": 100_000_000,
    "stage3_max_reuse_distance": 20_000_000,
}
Result = TypeVar("Result")


class Distributed:
    """This process and its collectives with the other ranks; one process has world size 1.

    precision         "bf16" runs matrix products under autocast, and "tf32" those of GPUs in TF32
    timeout_minutes   how long a rank waits for the others before it fails

    Raises UserError where the configuration of `accelerate launch` contradicts the job's.
    """

    def __init__(
        self, precision: Literal["fp32", "tf32", "bf16"] = "fp32", timeout_minutes: float = 360
    ) -> None:
        world = launched_processes()
        on_cpu = uses_cpu() or not torch.cuda.is_available()
        plugin = deepspeed_plugin(on_cpu)
        check_precision(precision)
        if (line := lone_process()) is not None:
            say(f"marlhf: {line}")
        handlers, timeout = [], timedelta(minutes=timeout_minutes)
        if world > 1 or plugin is not None:
            # by default accelerate counts CPU ranks but silently does not connect them
            backend = "gloo" if on_cpu else "nccl"
            handlers.append(InitProcessGroupKwargs(backend, timeout=timeout))
            set_default_timeout(timeout)
        try:
            with all_ranks_present(world, timeout):
                self._accelerator = Accelerator(
                    mixed_precision="no",
                    # excludes Apple's GPU, which has no float64; `cpu` would exclude DeepSpeed too
                    cpu=on_cpu and plugin is None,
                    deepspeed_plugin=plugin,
                    kwargs_handlers=handlers,
                )
        except torch.distributed.DistError as error:
            raise ReportedError(
                f"ranks: the {world} processes could not connect (MASTER_ADDR, MASTER_PORT, "
                f"distributed_timeout_minutes={timeout_minutes:g}): {one_line(error, 150)}"
            ) from error
        self._precision = precision
        if precision == "tf32":
            torch.set_float32_matmul_precision("high")
        elif precision == "bf16":
            autocast_experts(self.device.type)
        if (line := precision_note(precision, self.device)) is not None and self.is_main:
            say(f"marlhf: {line}")
        if plugin is not None:
            from marlhf.compat.transformers import load_complete_models

            load_complete_models()
        self._deepspeed: dict[str, Any] | None = None if plugin is None else plugin.deepspeed_config
        self._offloads: list[Any] = []  # `DeepSpeedZeRoOffload` handles of sharded weights
        self._placed: list[Any] = []  # engines without an optimiser, around what was sharded
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
            atexit.register(disconnect, self._accelerator)
            remember(self.gather_objects([this_process()]), timeout_minutes)

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
    def precision(self) -> str:
        """Precision of the matrix products, "fp32", "tf32" or "bf16"."""
        return self._precision

    @property
    def zero_stage(self) -> int:
        """ZeRO stage: 1, 2 or 3 under DeepSpeed, else 0."""
        return self._deepspeed["zero_optimization"]["stage"] if self._deepspeed else 0

    @property
    def needs_peers(self) -> bool:
        """Whether a forward pass needs all ranks, as under ZeRO-3."""
        return self.zero_stage == 3

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

    def fail_together(self, work: Callable[[], Result], blocks_on_peers: bool = False) -> Result:
        """Run `work` on every rank; if it raises on one, all raise and none hangs.

        The rank that failed raises its own error, the others PeerError. `work` may differ per rank.

        blocks_on_peers   `work` has collectives of its own, such as gathers of sharded weights;
                          then a rank that fails exits alone, and the launcher ends the others
        """
        if self.world_size == 1 or blocks_on_peers:
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

    def reduce_together(self, name: str, work: Callable[[AllReduceSum], Result]) -> Result:
        """Run `work(all_reduce)` on every rank, as `fail_together`.

        name   of the plug-in that it calls

        Calls of `all_reduce` in which the ranks differ raise UserError on all.
        """
        if self.world_size == 1:
            return work(self.all_reduce)
        fault: Exception | None = None  # kept, as `work` may catch it

        def meet(step: str, failure: str | None = None) -> None:
            nonlocal fault
            try:
                self._meet(name, step, failure)
            except Exception as error:
                fault = error
                raise

        def all_reduce(x: Tensor) -> Tensor:
            meet(f"all_reduce of {str(x.dtype).removeprefix('torch.')} {list(x.shape)}")
            return self.all_reduce(x)

        result, failure = None, None
        try:
            result = work(all_reduce)
        except Exception as error:
            failure = error
        if fault is None:
            meet("no further all_reduce", None if failure is None else one_line(failure))
        if (error := fault or failure) is not None:
            raise error
        return cast("Result", result)

    def _meet(self, name: str, step: str, failure: str | None) -> None:
        """Compare what the ranks do next. Raises PeerError or UserError unless this one failed."""
        steps = self.gather_objects([(step, failure)])
        if failure is not None:
            return
        for rank, (other_step, other_failure) in enumerate(steps):
            if other_failure is not None:
                raise PeerError(f"rank {rank} failed: {other_failure}")
            if other_step != steps[0][0]:
                raise UserError(
                    f"{name}: {other_step} on rank {rank}, {steps[0][0]} on rank 0; all ranks "
                    "must call all_reduce equally often, with tensors of the same shape and type"
                )

    def autocast(self) -> Any:
        """Context of a forward pass at the configured precision."""
        # the cache would keep a bf16 copy of every weight that ZeRO-3 releases
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self._precision == "bf16",
            cache_enabled=self.zero_stage < 3,
        )

    def placement(self, sharded: bool = True) -> Placement:
        """Puts models on the ranks: sharded under ZeRO-3, unless `sharded` is false."""
        return Placement(self, shard=self._shard if sharded and self.zero_stage == 3 else None)

    @doing("loading")
    def prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> Trained:
        """Prepare a model and its optimiser for training on all ranks."""
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        on_sharded_base = zero.has_shards(module) and not any(map(is_sharded, trained))
        if self.zero_stage == 0 or on_sharded_base:
            return Replicated(
                module.to(self.device), optimizer, max_grad_norm, self._offloads, self._gradients
            )
        self._release(module)
        engine = self._engine(module, optimizer, max_grad_norm)
        if self.zero_stage == 3:
            self._offloads.append(parameter_offload(engine))
            share_fp32_weights(engine)
        return Sharded(engine)

    def _shard(
        self, module: nn.Module, backbone: nn.Module, put: Callable[[nn.Parameter], None]
    ) -> None:
        """Shard a module over the ranks, for forward passes. See `Placement`.

        Adapters added later stay replicated.
        """
        import deepspeed

        deepspeed.zero.Init(
            module=OneByOne(module, put), config_dict_or_path=self._config(trains=False)
        )
        engine = self._engine(module)
        passes_begin_at(engine.optimizer, backbone)
        self._placed.append(engine)
        self._offloads.append(engine.optimizer)

    def _release(self, module: nn.Module) -> None:
        """Undo what makes a module's forward passes work, before an engine trains it."""
        parameters = set(module.parameters())
        for engine in [e for e in self._placed if not parameters.isdisjoint(e.module.parameters())]:
            self._placed.remove(engine)
            self._offloads.remove(engine.optimizer)
            engine.empty_partition_cache()
            engine.destroy()

    def gathered(self, module: nn.Module) -> AbstractContextManager[None]:
        """Under ZeRO-3, gather all weights of a module; elsewhere a no-op. See `zero.gathered`."""
        return zero.gathered(module, self._offloads, self._precision == "bf16")

    def unsharded_on_cpu(self, module: nn.Module) -> AbstractContextManager[None]:
        """Under ZeRO-3, gather a module's weights on the first rank's CPU, to write them.

        Elsewhere a no-op. Must be entered on all ranks.
        """
        return zero.unsharded_on_cpu(module, self.is_main)

    def trained_weights(self, module: nn.Module) -> dict[str, Tensor]:
        """A copy of the trained weights on the first rank's CPU; empty on the others.

        Must be called on all ranks.
        """
        return zero.trained_weights(module, self.is_main)

    def set_trained_weights(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Restore the first rank's copy from `trained_weights`, on all ranks.

        The optimiser is not updated: only for use after training.
        """
        zero.set_trained_weights(module, weights, self.is_main)

    def unwrap(self, model: Any) -> Any:
        """The module that was passed to `prepare`."""
        is_wrapped = isinstance(model, DistributedDataParallel) or is_engine(model)
        return model.module if is_wrapped else model

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._accelerator.wait_for_everyone()

    def _config(self, trains: bool, max_grad_norm: float | None = None) -> dict[str, Any]:
        """DeepSpeed's configuration of an engine."""
        assert self._deepspeed is not None
        config = copy.deepcopy(self._deepspeed)
        # DeepSpeed would manage everything in its leaf modules (experts), adapters in a frozen base
        # included. Experts need that only where each is a module, which some ranks may skip.
        frozen = {} if trains else {"leaf_module": {"classes": []}}
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
        return config

    def _engine(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        max_grad_norm: float | None = None,
    ) -> Any:
        import deepspeed

        config = self._config(optimizer is not None, max_grad_norm)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        assert is_engine(engine)
        assert engine.zero_optimization_stage() == self.zero_stage
        return engine
