"""Training operations of a model on its ranks, alike with and without DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from marlhf.common.cpu_memory import GradientBuffer
from marlhf.common.errors import UserError, short_repr
from marlhf.common.state_files import check_shapes, loading_optimizer, read_numbers
from marlhf.compat.deepspeed import (
    complete_shape,
    discard_gradient,
    gradient_norms,
    is_on_nvme,
    partitions,
    release_gathered,
    set_accumulation_boundary,
    use_partitions,
    was_step_applied,
)
from marlhf.compat.torch import ignore_in_ddp
from marlhf.distributed.fragments import (
    Files,
    Fragment,
    FragmentFiles,
    ReplicatedFiles,
    load_fragments,
    save_fragments,
)
from marlhf.distributed.offload import move_states

REPLICATED, FRAGMENTS = "replicated", "fragments"  # layouts that fit any number of ranks


class Replicated:
    """A model with all trained weights replicated on every rank.

    offloads   `DeepSpeedZeRoOffload` handles of ZeRO-3-sharded frozen bases
    memory     buffer for gradients, shared with other models
    """

    layout = REPLICATED
    needs_peers = False

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

    def states_to_host(self) -> None:
        """Move the optimiser's states to host memory."""
        move_states(self.optimizer, None)

    def states_to_device(self) -> None:
        """Bring the optimiser's states back."""
        move_states(self.optimizer, next(iter(self._weights.values())).device)

    def save(self, folder: Path) -> None:
        """Write trained weights and optimiser state, on the first rank."""
        if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
            return
        weights = {name: weight.detach().contiguous() for name, weight in self._weights.items()}
        save_file(weights, folder / "weights.safetensors")
        state = {"optimizer": self.optimizer.state_dict(), "names": [*weights]}
        torch.save(state, folder / "optimizer.pt")

    def load(self, folder: Path, layout: str) -> None:
        """Load a checkpoint of any ranks, on every rank. Raises UserError and OSError."""
        fragments = [Fragment(n, w.shape, 0, w.numel(), w) for n, w in self._weights.items()]
        load_fragments(fragments, self.optimizer, _files(folder, layout, [*self._weights]))

    def synchronise(self) -> None:
        """Nothing: passes use the weights that were loaded."""


class Sharded:
    """A model with at least its optimiser sharded by DeepSpeed; interface of `Replicated`."""

    def __init__(self, engine: Any) -> None:
        self.model = engine
        self.optimizer = engine.optimizer
        ranks = torch.distributed.get_world_size()
        self.engine_layout = f"ZeRO-{engine.zero_optimization_stage()} over {ranks} ranks"
        self.needs_peers = is_on_nvme(engine)
        self.layout = self.engine_layout if self.needs_peers else FRAGMENTS

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

    def states_to_host(self) -> None:
        """Move the optimiser's states to host memory."""
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

        self.model.offload_states(include=[OffloadStateTypeEnum.optim_states])

    def states_to_device(self) -> None:
        """Bring the optimiser's states back."""
        self.model.reload_states()

    def save(self, folder: Path) -> None:
        """Write this rank's part of the weights and of the optimiser's state."""
        if self.needs_peers:
            self.model.save_checkpoint(
                str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=True
            )
            return
        file = folder / f"rank-{torch.distributed.get_rank()}.safetensors"
        save_fragments(self._fragments(), self.optimizer.optimizer, file)

    def load(self, folder: Path, layout: str) -> None:
        """Load this rank's part of a checkpoint of any ranks; `synchronise` must follow.

        Raises UserError and OSError.
        """
        fragments = self._fragments()
        files = _files(folder, layout, [fragment.name for fragment in fragments])
        load_fragments(fragments, self.optimizer.optimizer, files)

    def synchronise(self) -> None:
        """Have passes use the weights that were loaded; must be called on all ranks."""
        use_partitions(self.model)

    def load_engine(self, folder: Path) -> None:
        """Load DeepSpeed's own checkpoint, of the same ranks, on all ranks at once."""
        with loading_optimizer(self.optimizer.optimizer, is_ours=False):
            loaded, _ = self.model.load_checkpoint(
                str(folder),
                tag="engine",
                load_module_strict=False,  # frozen weights are not in it
                load_lr_scheduler_states=False,
            )
        assert loaded is not None

    def _fragments(self) -> list[Fragment]:
        """This rank's entries of every trained parameter, in the order of the module's."""
        names = {parameter: name for name, parameter in self.model.module.named_parameters()}
        order = {parameter: index for index, parameter in enumerate(names)}
        fragments = {
            order[p]: Fragment(names[p], complete_shape(p), start, count, flat, offset)
            for p, start, count, flat, offset in partitions(self.model)
        }
        return [fragments[index] for index in sorted(fragments)]


@torch.no_grad()
def load_weights(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Set trained weights, by name, to those that any ranks saved. Raises UserError and OSError."""
    layout = read_numbers(folder / "learner.json", {"layout": str})["layout"]
    if layout not in (REPLICATED, FRAGMENTS):
        raise UserError(
            f"the checkpoint is of {short_repr(layout)}, which only such a launch reads"
        )
    files = _files(folder, layout, [*weights])
    check_shapes(files.shapes, {name: weight.shape for name, weight in weights.items()})
    for name, weight in weights.items():
        weight.copy_(files.read(name, "weight", 0, weight.numel()).view(weight.shape))


def _files(folder: Path, layout: str, names: Sequence[str]) -> Files:
    """Saved state in one of the layouts that fit any number of ranks.

    names   of the trained parameters, in the order of the optimiser's

    Raises UserError and OSError.
    """
    if layout == REPLICATED:
        return ReplicatedFiles(folder, names)
    state = read_numbers(folder / "learner.json", {"ranks": int})
    return FragmentFiles(folder, state["ranks"])


def combined_norm(norms: Iterable[float]) -> float:
    """L2 norm of a vector from its parts' norms; NaN if one is not finite.

    DeepSpeed returns -1 for a part that is not finite.
    """
    parts = list(norms)
    if not all(math.isfinite(part) and part >= 0 for part in parts):
        return math.nan
    return math.hypot(*parts)


Trained = Replicated | Sharded
