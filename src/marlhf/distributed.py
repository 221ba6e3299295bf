"""Processes and devices: the only module that knows accelerate and DeepSpeed."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from marlhf.errors import UserError, one_line

Result = TypeVar("Result")


class PeerError(RuntimeError):
    """Another rank failed; the message says which and how."""


class Distributed:
    """This process among its peers. One process is the same code with a world of 1.

    precision   "bf16" runs matrix products under autocast; weights stay as they were loaded
    """

    def __init__(self, precision: Literal["fp32", "bf16"] = "fp32") -> None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
        if deepspeed:
            raise UserError(
                "DeepSpeed launches are not supported yet; use a plain multi-process one"
            )
        handlers, on_cpu = [], not torch.cuda.is_available()
        if on_cpu and world > 1:
            # left to itself accelerate counts CPU ranks but does not connect them, silently
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
        self._accelerator = Accelerator(
            mixed_precision="no", cpu=on_cpu and world > 1, kwargs_handlers=handlers
        )
        self._precision = precision
        connected = self._accelerator.distributed_type != DistributedType.NO
        assert self.world_size == world, f"{self.world_size} of {world} ranks are connected"
        assert connected == (world > 1), "the ranks are not connected"
        if connected:  # threads of the connection that outlive the interpreter abort the process
            atexit.register(self._accelerator.end_training)

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

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over ranks, on the device and of the dtype it came with."""
        if self.world_size == 1:
            return x
        on_device = x.to(self.device)
        total = self._accelerator.reduce(on_device, reduction="sum")
        assert isinstance(total, Tensor)
        return total.to(x.device)

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """The lists of all ranks, one after another in order of rank, on every rank."""
        if self.world_size == 1:
            return items
        gathered: list[list[Any]] = [[] for _ in range(self.world_size)]
        torch.distributed.all_gather_object(gathered, items)
        return [item for part in gathered for item in part]

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` returns here; where it fails on any rank, all ranks raise and none waits.

        The rank that failed raises its own error, the others PeerError. `work` may be different on
        every rank and must not wait for others.
        """
        if self.world_size == 1:
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

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Model and optimiser, wrapped for training over ranks.

        Only the gradients that the optimiser reads cross ranks. DDP would wait for all others too,
        such as those of the critic's adapter in a base that the policy shares, and never finish.
        """
        if self.world_size == 1:
            return model.to(self.device), optimizer
        held = {p for group in optimizer.param_groups for p in group["params"]}
        named = model.named_parameters(remove_duplicate=False)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, [name for name, parameter in named if parameter not in held]
        )
        return self._accelerator.prepare(model, optimizer)

    @contextmanager
    def accumulate(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Around one micro-batch: gradients cross ranks after the last one only."""
        with nullcontext() if last else self._accelerator.no_sync(model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the *sum* of all ranks' losses (DDP would average it)."""
        (loss * self.world_size).backward()

    def autocast(self) -> Any:
        """Context of a forward pass at the configured precision."""
        enabled = self._precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def unwrap(self, model: nn.Module) -> Any:
        """The module that `prepare` was given."""
        return self._accelerator.unwrap_model(model)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._accelerator.wait_for_everyone()
