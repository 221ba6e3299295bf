"""Training operations of a model on its ranks, alike with and without DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from marlhf.common.cpu_memory import GradientBuffer
from marlhf.common.errors import UserError
from marlhf.common.state_files import check_weights, loading_optimizer, read_tensors
from marlhf.compat.deepspeed import (
    discard_gradient,
    gradient_norms,
    release_gathered,
    set_accumulation_boundary,
    was_step_applied,
)
from marlhf.compat.torch import ignore_in_ddp


class Replicated:
    """A model with all trained weights replicated on every rank.

    offloads   `DeepSpeedZeRoOffload` handles of ZeRO-3-sharded frozen bases
    memory     buffer for gradients, shared with other models
    """

    layout = "replicated"

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
        offloads: list[Any],
        memory: GradientBuffer,
    ) -> None:
        optimized = {p: None for group in optimizer.param_groups for p in group["params"]}
        self._weights = {name: p for name, p in module.named_parameters() if p in optimized}
        self._max_grad_norm = max_grad_norm or float("inf")
        self._offloads = offloads
        self._memory = memory
        self.optimizer = optimizer
        self.model: Any = module
        self._world_size = 1
        if torch.distributed.is_initialized():
            self._world_size = torch.distributed.get_world_size()
            # Reduce only gradients of the optimiser's parameters. DDP would wait for all others,
            # such as those of the critic's adapter in a base shared with the policy.
            # Nor buffers, before every pass: they are constants.
            named = module.named_parameters(remove_duplicate=False)
            ignored = [name for name, parameter in named if parameter not in optimized]
            ignored += [name for name, _ in module.named_buffers(remove_duplicate=False)]
            ignore_in_ddp(module, ignored)
            # gradients are views of the all-reduce buckets, not a second copy
            self.model = DistributedDataParallel(module, gradient_as_bucket_view=True)

    def accumulate(self, last: bool) -> Any:
        """Context of one micro-batch: gradients are all-reduced in the last one only."""
        if last:
            return nullcontext()
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        weights = self._weights.values()
        if all(weight.grad is None and weight.device.type == "cpu" for weight in weights):
            self._memory.attach_to(weights)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the *sum* of all ranks' losses (DDP would average it)."""
        (loss * self._world_size).backward()
        for offload in self._offloads:  # an engine does this itself
            release_gathered(offload)

    def norm(self) -> float:
        """L2 norm of the gradient before clipping; clips it."""
        return float(nn.utils.clip_grad_norm_(self._weights.values(), self._max_grad_norm))

    def step(self) -> None:
        """Apply an optimiser step with the clipped gradient, and discard the gradient."""
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Discard the gradient."""
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        """Write trained weights and optimiser state, on the first rank."""
        if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
            return
        weights = {name: weight.detach().contiguous() for name, weight in self._weights.items()}
        save_file(weights, folder / "weights.safetensors")
        torch.save({"optimizer": self.optimizer.state_dict()}, folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """Load a checkpoint of `save`, on every rank. Raises UserError."""
        load_weights(folder, self._weights)
        state = read_tensors(folder / "optimizer.pt")["optimizer"]
        groups = self.optimizer.state_dict()["param_groups"]
        counts = [[len(group["params"]) for group in x] for x in (state["param_groups"], groups)]
        if counts[0] != counts[1]:
            raise UserError("the optimiser's state is of other parameters")
        with loading_optimizer(self.optimizer):
            self.optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


@torch.no_grad()
def load_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Set trained weights, by name, to those of `Replicated.save`. Raises UserError."""
    saved = load_file(folder / "weights.safetensors")
    check_weights(saved, {name: weight.shape for name, weight in weights.items()})
    for name, weight in weights.items():
        weight.copy_(saved[name])


class Sharded:
    """A model with at least its optimiser sharded by DeepSpeed; interface of `Replicated`."""

    def __init__(self, engine: Any) -> None:
        self.model = engine
        self.optimizer = engine.optimizer
        self._stage = int(engine.zero_optimization_stage())
        ranks = torch.distributed.get_world_size()
        self.layout = f"ZeRO-{self._stage} over {ranks} ranks"

    def accumulate(self, last: bool) -> Any:
        """Context of one micro-batch: an optimiser step follows the last one."""
        set_accumulation_boundary(self.model, last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the *sum* of all ranks' losses (DeepSpeed averages it)."""
        self.model.backward(loss * torch.distributed.get_world_size())

    def norm(self) -> float:
        """L2 norm of the gradient before `step` clips it; NaN if it is not finite."""
        return combined_norm(gradient_norms(self.model))

    def step(self) -> None:
        """Apply an optimiser step with the clipped gradient, and discard the gradient."""
        self.model.step()
        assert was_step_applied(self.model)

    def discard(self) -> None:
        """Discard the gradient."""
        discard_gradient(self.model)

    def save(self, folder: Path) -> None:
        """Write this rank's shard of weights and optimiser state."""
        self.model.save_checkpoint(
            str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=True
        )

    def load(self, folder: Path) -> None:
        """Load a checkpoint of `save` from the same number of ranks."""
        with loading_optimizer(self.optimizer.optimizer, is_ours=False):
            loaded, _ = self.model.load_checkpoint(
                str(folder),
                tag="engine",
                load_module_strict=False,  # frozen weights are not in it
                load_lr_scheduler_states=False,
            )
        assert loaded is not None


def combined_norm(norms: Iterable[float]) -> float:
    """L2 norm of a vector from its parts' norms; NaN if one is not finite.

    DeepSpeed returns -1 for a part that is not finite.
    """
    parts = list(norms)
    if not all(math.isfinite(part) and part >= 0 for part in parts):
        return math.nan
    return math.hypot(*parts)


Trained = Replicated | Sharded
