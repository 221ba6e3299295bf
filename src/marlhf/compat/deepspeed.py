"""Private parts of DeepSpeed: gradient norms, skipped steps, shards of weights and optimiser.

Importing this file does not import DeepSpeed, which takes seconds; `check_names` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from marlhf.compat import needs
from marlhf.compat.torch import hooks_removed

_STAGE3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_STAGE12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_OFFLOAD = "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload"
_PARAMETERS = "deepspeed.runtime.zero.partition_parameters:Init"
_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"


def check_names() -> None:
    """Raise IncompatibleError where DeepSpeed lacks a name that is used here (all: 0.19.8)."""
    needs(
        f"{_STAGE3}._get_norm_groups(self)",
        f"{_STAGE3}.parameter_offload",
        f"{_STAGE12}.scaled_global_norm(self)",
        "deepspeed.runtime.utils:is_invalid_grad_norm(norm)",
        f"{_OFFLOAD}.fwd_pre_hook",
        f"{_OFFLOAD}.forward_hooks",
        f"{_OFFLOAD}.backward_hooks",
        f"{_OFFLOAD}.get_param_coordinator(self)",
        f"{_OFFLOAD}.release_backward_leftovers(self)",
        "deepspeed.runtime.zero.partitioned_param_coordinator:"
        "PartitionedParameterCoordinator.reset_step(self)",
        f"{_STAGE12}.bit16_groups",
        f"{_STAGE12}.single_partition_of_fp32_groups",
        f"{_STAGE12}.update_lp_params(self)",
        "deepspeed.utils.tensor_fragment:tensor_fragment(lp_fragment, lp_fragment_address, "
        "hp_fragment, hp_fragment_address)",
        "deepspeed.utils.tensor_fragment:fragment_address(numel, start)",
        "deepspeed.utils.mixed_precision_linkage:link_hp_params(lp_param_list, flat_hp_partition)",
        f"{_STAGE3}.fp16_groups",
        f"{_STAGE3}.fp32_partitioned_groups_flat",
        f"{_STAGE3}.fp16_partitioned_groups_flat",
        f"{_STAGE3}.offload_optimizer",
        f"{_STAGE3}.grad_position",
        f"{_STAGE3}.get_param_id(self, param)",
        f"{_STAGE3}._get_param_partition_rank(self, param)",
        f"{_STAGE3}.swap_optimizer",
        f"{_STAGE3}.params_in_nvme_and_cpu",
        f"{_STAGE3}._reassign_or_swap_out_partitioned_parameters(self, sub_group_id)",
        f"{_STAGE3}.checkpoint_event_prologue(self)",
        f"{_STAGE3}.checkpoint_event_epilogue(self)",
        f"{_PARAMETERS}.ds_id",
        f"{_PARAMETERS}.ds_shape",
        f"{_ENGINE}.set_gradient_accumulation_boundary(self, is_boundary)",
        f"{_ENGINE}.was_step_applied(self)",
        "deepspeed.ops:__compatible_ops__",
    )


# private: DeepSpeedZeroOptimizer_Stage3._get_norm_groups, scaled_global_norm (0.19.8)
# why: engine.get_global_grad_norm() is known only after the step, and the step must depend on it
# remove when: DeepSpeed gives the norm of the gradient before the step
def gradient_norms(engine: Any) -> list[float]:
    """L2 norms of the parts of an engine's gradient before clipping; -1: not finite.

    Under ZeRO-3 a part is a sub-group of `sub_group_size` weights; otherwise there is one.
    """
    optimizer = engine.optimizer
    sharded = engine.zero_optimization_stage() == 3
    norms = optimizer._get_norm_groups() if sharded else [optimizer.scaled_global_norm()]
    return [float(norm) for norm in norms]


# private: the same methods, replaced on the instance, and -1 for a norm that is not finite (0.19.8:
#          deepspeed.runtime.utils.is_invalid_grad_norm; earlier versions would take the step)
# why: zero_grad leaves gradients that ZeRO has already reduced and partitioned
# remove when: an engine can forget its gradient
def discard_gradient(engine: Any) -> None:
    """Discard an engine's gradient, as DeepSpeed does where its norm is not finite."""
    sharded = engine.zero_optimization_stage() == 3
    name = "_get_norm_groups" if sharded else "scaled_global_norm"
    not_finite = torch.tensor(-1.0)
    setattr(engine.optimizer, name, lambda: [not_finite] if sharded else not_finite)
    try:
        engine.step()
    finally:
        delattr(engine.optimizer, name)
    assert not engine.was_step_applied()


# private: Parameter.ds_id (0.19.8)
# why: no public function tells whether ZeRO-3 has sharded a parameter
# remove when: deepspeed.zero has a function that does
def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has sharded a parameter."""
    return hasattr(parameter, "ds_id")


# private: Parameter.ds_shape (0.19.8)
# why: a sharded parameter's own shape is that of its shard
# remove when: deepspeed.zero has a function that tells it
def complete_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter as it was before any sharding."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def gathered_parameter(parameter: nn.Parameter, modifier_rank: int | None = None) -> Any:
    """Context with a weight gathered; changes by `modifier_rank` are broadcast to all ranks."""
    if not is_sharded(parameter):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=modifier_rank)


# private: DeepSpeedZeroOptimizer_Stage3.parameter_offload (0.19.8)
# why: an engine for inference has no other handle of the hooks on its sharded weights
# remove when: GatheredParameters keeps weights for passes within it
def parameter_offload(engine: Any) -> Any:
    """The handle of a ZeRO-3 engine's sharded weights and their hooks."""
    return engine.optimizer.parameter_offload


# private: DeepSpeedEngine.set_gradient_accumulation_boundary, .was_step_applied (0.19.8)
# why: micro-batches have no fixed number per step, and a step can be refused
# remove when: DeepSpeed documents them
def set_accumulation_boundary(engine: Any, is_boundary: bool) -> None:
    """Tell the engine whether an optimiser step follows the next backward pass."""
    engine.set_gradient_accumulation_boundary(is_boundary)


def was_step_applied(engine: Any) -> bool:
    """Whether the last step changed the weights."""
    return engine.was_step_applied()


# private: DeepSpeedZeRoOffload.fwd_pre_hook, .forward_hooks, get_param_coordinator().reset_step()
#          (0.19.8)
# why: DeepSpeed takes a call of the module as the start of a pass; ours may call its backbone alone
# remove when: an engine for inference can be told where passes begin
def passes_begin_at(offload: Any, module: nn.Module) -> None:
    """Have DeepSpeed count a pass of a frozen sharded model from a call of `module`."""
    offload.fwd_pre_hook.remove()
    start = module.register_forward_pre_hook(
        lambda *_: offload.get_param_coordinator().reset_step()
    )
    offload.forward_hooks.append(start)


# private: DeepSpeedZeRoOffload.forward_hooks, .backward_hooks (0.19.8)
# why: where weights are gathered for many passes, each layer would still release its weights
# remove when: GatheredParameters keeps weights for passes within it
@contextmanager
def without_hooks(offload: Any) -> Iterator[None]:
    """Context in which layers neither gather nor release weights: no communication."""
    with hooks_removed([*offload.forward_hooks, *offload.backward_hooks]):
        yield


# private: DeepSpeedZeRoOffload.release_backward_leftovers (0.19.3)
# why: only an engine's own backward pass releases what it gathered, and adapters are not in one
# remove when: a backward pass outside an engine releases sharded weights
def release_gathered(offload: Any) -> None:
    """Release the weights that a backward pass outside an engine has gathered."""
    offload.release_backward_leftovers()


# private: DeepSpeedZeroOptimizer_Stage3.swap_optimizer, .params_in_nvme_and_cpu (0.19.8)
# why: what is on NVMe is in none of the tensors that `partitions` yields
# remove when: DeepSpeed has a function that yields a rank's state wherever it is
def is_on_nvme(engine: Any) -> bool:
    """Whether an engine keeps weights or optimiser state on NVMe."""
    optimizer = engine.optimizer
    sharded = engine.zero_optimization_stage() == 3
    return sharded and bool(optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu)


# private: DeepSpeedZeroOptimizer.bit16_groups, .single_partition_of_fp32_groups, and what
#          link_hp_params sets, Parameter._hp_mapping; DeepSpeedZeroOptimizer_Stage3.fp16_groups,
#          .fp32_partitioned_groups_flat, .grad_position, .get_param_id, _get_param_partition_rank
#          (0.19.8)
# why: deepspeed.utils reads a local part under ZeRO-3 alone, and tells neither where it begins nor
#      the number of steps; a universal checkpoint is made by another program, of all shards
# remove when: DeepSpeed saves and loads by parameter for any number of ranks
def partitions(engine: Any) -> Iterator[tuple[nn.Parameter, int, int, nn.Parameter, int]]:
    """Yield where a rank has its entries of every trained parameter of an engine.

    (the parameter, its first entry on this rank, number of entries, the base optimiser's flat
    parameter that has them, index of the first there)
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        flats = optimizer.fp32_partitioned_groups_flat
        for parameter in (p for group in optimizer.fp16_groups for p in group):
            index, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            total = complete_shape(parameter).numel()
            start = min(size * optimizer._get_param_partition_rank(parameter), total)
            yield parameter, start, min(size, total - start), flats[index], offset
        return
    flats = optimizer.single_partition_of_fp32_groups
    for group, flat in zip(optimizer.bit16_groups, flats, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # other ranks have it
                yield parameter, 0, 0, flat, 0
                continue
            place = mapping.hp_fragment_address
            yield parameter, mapping.lp_fragment_address.start, place.numel, flat, place.start


# private: DeepSpeedZeroOptimizer_Stage3.fp16_partitioned_groups_flat (of any dtype), and
#          .fp32_partitioned_groups_flat, .offload_optimizer (0.19.8)
# why: it means not to copy fp32 weights for the optimiser, but compares a torch.device with a
#      string, which are never equal
# remove when: `_create_fp32_partitions` compares devices
def share_fp32_weights(engine: Any) -> None:
    """Have a ZeRO-3 engine's optimiser step fp32 shards themselves, not a copy of them.

    Where it is offloaded, the copy stays.
    """
    optimizer = engine.optimizer
    if optimizer.offload_optimizer:
        return
    shards, copies = optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat
    for shard, copy in zip(shards, copies, strict=True):
        if (shard.dtype, shard.device) == (copy.dtype, copy.device):
            copy.data = shard.data


# private: DeepSpeedZeroOptimizer.update_lp_params; DeepSpeedZeroOptimizer_Stage3
#          ._reassign_or_swap_out_partitioned_parameters, .checkpoint_event_prologue and _epilogue
#          (0.19.8)
# why: the weights that passes use are copies of those that the optimiser steps
# remove when: DeepSpeed loads by parameter for any number of ranks
def use_partitions(engine: Any) -> None:
    """Use the weights in `partitions`, after they were changed; must be called on all ranks."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() != 3:
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for index in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    optimizer.checkpoint_event_epilogue()


# private: deepspeed.ops.__compatible_ops__ (0.19.8)
# why: compiling takes a compiler and a minute, and a process that is killed meanwhile leaves a lock
#      for which every later run on the machine would wait forever
# remove when: DeepSpeed's CPU accelerator can be told not to compile it
def without_extension(name: str) -> None:
    """Keep DeepSpeed from compiling one of its extensions at start."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__[name] = False


def is_engine(model: Any) -> bool:
    """Whether a model is a DeepSpeed engine."""
    import sys

    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)
