"""Processes and devices: the only module that knows accelerate and DeepSpeed.

How a model is spread over the ranks follows from what `accelerate launch` was told:

  one process     nothing is spread
  DDP             a copy each; gradients are summed
  ZeRO-1, ZeRO-2  a copy each; optimiser states (2: and gradients) are sharded
  ZeRO-3          weights are sharded too, those of frozen models included

Policy and critic are two engines. Their gradients are then never alive together, each is clipped
by its own norm, and an update that trains the critic alone leaves the policy's optimiser untouched:
one engine over both would step Adam's moments of weights that have no gradient.

With LoRA under ZeRO-3 the frozen base alone is sharded, once for all models on it. Two engines
cannot share sharded weights, and sharding adapters, a hundredth of the whole, would gain nothing:
they stay replicated, and DDP sums their gradients.
"""

from __future__ import annotations

import atexit
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from marlhf.errors import UserError, one_line

# what a DeepSpeed configuration may not decide, and who does
_OURS = {
    "optimizer": "the optimizer section of the job's config",
    "scheduler": "optimizer.schedule of the job's config",
    "gradient_clipping": "optimizer.max_grad_norm of the job's config",
    "gradient_accumulation_steps": "optimizer.micro_batch_size of the job's config",
    "train_batch_size": "batch_size of the job's config",
    "train_micro_batch_size_per_gpu": "optimizer.micro_batch_size of the job's config",
    "fp16": "model.precision of the job's config",
    "bf16": "model.precision of the job's config",
}
# Weights held at a time, in numbers. DeepSpeed's own defaults are 5 to 10 times as large, which a
# model has to outgrow before ZeRO-3 saves anything.
_BUFFERS = {
    "reduce_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 20_000_000,
    "stage3_max_live_parameters": 100_000_000,
    "stage3_max_reuse_distance": 20_000_000,
}
_NO_ACCUMULATION = ("gradient_accumulation_steps", 1)  # what accelerate writes if not told

Result = TypeVar("Result")


class PeerError(RuntimeError):
    """Another rank failed; the message says which and how."""


class Distributed:
    """This process among its peers. One process is the same code with a world of 1.

    precision   "bf16" runs matrix products under autocast; weights stay as they were loaded

    Raises UserError where what `accelerate launch` was told contradicts the job's configuration.
    """

    def __init__(self, precision: Literal["fp32", "bf16"] = "fp32") -> None:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        on_cpu = not torch.cuda.is_available()
        plugin = _deepspeed_plugin(on_cpu)
        _check_precision(precision)
        handlers = []
        if on_cpu and (world > 1 or plugin is not None):
            # left to itself accelerate counts CPU ranks but does not connect them, silently
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
        self._accelerator = Accelerator(
            mixed_precision="no",
            # for accelerate, `cpu` means that there is no DeepSpeed either
            cpu=on_cpu and world > 1 and plugin is None,
            deepspeed_plugin=plugin,
            kwargs_handlers=handlers,
        )
        self._precision = precision
        if plugin is not None:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()  # or it would shard each model while reading it
        self._deepspeed: dict[str, Any] | None = plugin and plugin.deepspeed_config
        self._offloads: list[Any] = []  # DeepSpeed's keepers of sharded weights
        kind = self._accelerator.distributed_type
        assert (kind == DistributedType.DEEPSPEED) == (plugin is not None), "DeepSpeed fell away"
        assert self.world_size == world, f"{self.world_size} of {world} ranks are connected"
        connected = torch.distributed.is_initialized()
        assert connected or world == 1, "the ranks are not connected"
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

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` returns here; where it fails on any rank, all ranks raise and none waits.

        The rank that failed raises its own error, the others PeerError. `work` may be different on
        every rank and must not wait for others. Under ZeRO-3 it does, to read weights: there a rank
        that fails ends by itself, and the launcher ends the others.
        """
        if self.world_size == 1 or self.zero_stage == 3:
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
            return _Replicated(module.to(self.device), optimizer, max_grad_norm, self._offloads)
        engine = self._engine(module, optimizer, max_grad_norm)
        if self.zero_stage == 3:
            self._offloads.append(engine.optimizer.parameter_offload)
        return _Engine(engine)

    def shard(self, module: Any, trunk: nn.Module) -> Any:
        """Place a frozen model: sharded under ZeRO-3, whole on this rank's device otherwise.

        trunk   the part of it that every forward pass begins with

        Adapters that are put into it later stay replicated.
        """
        if self.zero_stage < 3:
            return module.to(self.device)
        offload = self._engine(module.requires_grad_(False)).optimizer
        # DeepSpeed takes a call of `module` for the begin of a pass; ours may call its parts
        offload.fwd_pre_hook.remove()
        start = trunk.register_forward_pre_hook(
            lambda *_: offload.get_param_coordinator().reset_step()
        )
        offload.forward_hooks.append(start)
        self._offloads.append(offload)
        return module

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Under ZeRO-3, have all of a module's weights here at once, so that a forward pass within
        needs no other rank; elsewhere nothing happens. To be entered on all ranks alike."""
        parameters = {p for p in module.parameters() if hasattr(p, "ds_id")}
        if not parameters:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        with ExitStack() as stack:
            stack.enter_context(GatheredParameters(list(parameters)))
            for offload in self._offloads:
                if not parameters.isdisjoint(offload.module.parameters()):
                    stack.enter_context(_without_hooks(offload))
            yield

    @torch.no_grad()
    def trained_weights(self, module: nn.Module) -> dict[str, Tensor]:
        """A copy of what is trained, on the CPU of the first rank; nothing on the others, which are
        to ask for it too."""
        found = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                with _whole(parameter):
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
                with _whole(parameter, modifier_rank=0):
                    if self.is_main:
                        parameter.copy_(weights[name])
                    if self.world_size > 1 and not hasattr(parameter, "ds_id"):
                        torch.distributed.broadcast(parameter, 0)

    def unwrap(self, model: Any) -> Any:
        """The module that `train` was given."""
        is_wrapped = isinstance(model, DistributedDataParallel) or _is_engine(model)
        return model.module if is_wrapped else model

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._accelerator.wait_for_everyone()

    def _is_sharded(self, module: nn.Module) -> bool:
        return any(hasattr(p, "ds_id") for p in module.parameters())

    def _engine(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        max_grad_norm: float | None = None,
    ) -> Any:
        import deepspeed

        assert self._deepspeed is not None
        config = copy.deepcopy(self._deepspeed)
        config["zero_optimization"] = {**_BUFFERS, **config["zero_optimization"]}
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
        assert _is_engine(engine)
        assert engine.zero_optimization_stage() == self.zero_stage
        return engine


class _Replicated:
    """A model of which every rank holds all trained weights.

    offloads   DeepSpeed's keepers of frozen weights that may be below them, sharded
    """

    layout = "replicated"

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
        offloads: list[Any],
    ) -> None:
        held = {p: None for group in optimizer.param_groups for p in group["params"]}
        self._weights = {name: p for name, p in module.named_parameters() if p in held}
        self._max_grad_norm = max_grad_norm or float("inf")
        self._offloads = offloads
        self.optimizer = optimizer
        self.model: Any = module
        self._world_size = 1
        if torch.distributed.is_initialized():
            self._world_size = torch.distributed.get_world_size()
            # Only the gradients that the optimiser reads cross ranks. DDP would wait for all others
            # too, such as those of the critic's adapter in a base that the policy shares.
            named = module.named_parameters(remove_duplicate=False)
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                module, [name for name, parameter in named if parameter not in held]
            )
            self.model = DistributedDataParallel(module)

    def accumulate(self, last: bool) -> Any:
        """Context of one micro-batch: gradients cross ranks after the last one only."""
        is_parallel = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if is_parallel and not last else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the *sum* of all ranks' losses (DDP would average it)."""
        (loss * self._world_size).backward()
        for offload in self._offloads:  # an engine would do this itself
            offload.release_backward_leftovers()

    def norm(self) -> float:
        """Of the gradient, before it is clipped here."""
        return float(nn.utils.clip_grad_norm_(self._weights.values(), self._max_grad_norm))

    def step(self) -> None:
        """Move the weights along the clipped gradient, and forget it."""
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Forget the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        """Write trained weights and optimiser, on the first rank."""
        if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
            return
        weights = {name: weight.detach().contiguous() for name, weight in self._weights.items()}
        save_file(weights, folder / "weights.safetensors")
        torch.save({"optimizer": self.optimizer.state_dict()}, folder / "optimizer.pt")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on every rank."""
        saved = load_file(folder / "weights.safetensors")
        for name, weight in self._weights.items():
            weight.copy_(saved[name])
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])


class _Engine:
    """A model whose optimiser, at least, DeepSpeed shards over the ranks; as `_Replicated`."""

    def __init__(self, engine: Any) -> None:
        self.model = engine
        self.optimizer = engine.optimizer
        self._stage = int(engine.zero_optimization_stage())
        ranks = torch.distributed.get_world_size()
        self.layout = f"ZeRO-{self._stage} over {ranks} ranks"

    def accumulate(self, last: bool) -> Any:
        """Context of one micro-batch: an optimiser step follows the last one."""
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the *sum* of all ranks' losses (DeepSpeed averages it)."""
        self.model.backward(loss * torch.distributed.get_world_size())

    def norm(self) -> float:
        """Of the gradient, before it is clipped in `step`; NaN where it is not finite."""
        optimizer = self.optimizer
        groups = optimizer._get_norm_groups() if self._stage == 3 else None
        norm = float(groups[0] if groups else optimizer.scaled_global_norm())
        return norm if 0 <= norm < float("inf") else float("nan")

    def step(self) -> None:
        """Move the weights along the clipped gradient, and forget it."""
        self.model.step()
        assert self.model.was_step_applied()

    def discard(self) -> None:
        """Forget the gradient: DeepSpeed does so by itself where it finds its norm not finite."""
        name = "_get_norm_groups" if self._stage == 3 else "scaled_global_norm"
        not_finite = torch.tensor(-1.0)  # in DeepSpeed's words
        setattr(self.optimizer, name, lambda: [not_finite] if self._stage == 3 else not_finite)
        try:
            self.model.step()
        finally:
            delattr(self.optimizer, name)
        assert not self.model.was_step_applied()

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights and optimiser."""
        self.model.save_checkpoint(
            str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, folder: Path) -> None:
        """Read what `save` wrote on as many ranks."""
        loaded, _ = self.model.load_checkpoint(
            str(folder),
            tag="engine",
            load_module_strict=False,  # frozen weights are not in it
            load_lr_scheduler_states=False,
        )
        assert loaded is not None


Trained = _Replicated | _Engine


def _is_engine(model: Any) -> bool:
    return type(model).__name__ == "DeepSpeedEngine"


def _whole(parameter: nn.Parameter, modifier_rank: int | None = None) -> Any:
    """Context in which a weight is here, whole; what `modifier_rank` writes into it is for all."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=modifier_rank)


@contextmanager
def _without_hooks(offload: Any) -> Iterator[None]:
    """Keep DeepSpeed from releasing weights after each layer, and from talking to other ranks."""
    removed = []
    for handle in (*offload.forward_hooks, *offload.backward_hooks):
        hooks = handle.hooks_dict_ref()
        removed.append((hooks, handle.id, hooks.pop(handle.id)))
    try:
        yield
    finally:
        for hooks, number, hook in removed:
            hooks[number] = hook


def _deepspeed_plugin(on_cpu: bool) -> DeepSpeedPlugin | None:
    """DeepSpeed's configuration, as accelerate puts it together; None for a launch without."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _without_extension("deepspeed_shm_comm")
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false").lower() == "true":
        raise UserError(
            "accelerate's zero3_init_flag: given true, must be false; weights are read whole by "
            "each rank and sharded then"
        )
    try:
        plugin = DeepSpeedPlugin(zero3_init_flag=False)
    except Exception as error:  # accelerate's checks, a missing file, broken JSON
        raise UserError(f"accelerate's DeepSpeed configuration: {one_line(error)}") from error
    config = plugin.deepspeed_config
    for key, owner in _OURS.items():
        given = config.pop(key, "auto")
        enabled = given.get("enabled") if isinstance(given, dict) and "enabled" in given else given
        if enabled not in ("auto", False, None) and (key, given) != _NO_ACCUMULATION:
            raise UserError(f"DeepSpeed's {key}: given {given!r}, must be left to {owner}")
    stage = config["zero_optimization"]["stage"]
    if stage not in (1, 2, 3):
        raise UserError(f"DeepSpeed's zero stage: given {stage!r}, must be 1, 2 or 3")
    return plugin


def _without_extension(name: str) -> None:
    """Keep DeepSpeed from compiling one of its extensions at start.

    That takes a compiler and a minute, and a process that is killed meanwhile leaves a lock for
    which every later run on the machine would wait, without end.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__[name] = False


def _check_precision(precision: str) -> None:
    """accelerate's mixed precision is "no" where nothing was said."""
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if given not in ("no", precision):
        raise UserError(
            f"model.precision: given {precision!r}, but accelerate's mixed_precision is {given!r}; "
            "leave that out"
        )
