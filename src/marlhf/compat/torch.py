"""Private parts of torch: packed linear layers, fake tensors, hooks, DDP's ignored parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from marlhf.compat import needs

# private: torch._subclasses.fake_tensor.FakeTensorMode, torch.utils._python_dispatch
#          .TorchDispatchMode, torch.utils._pytree.tree_leaves (2.13)
# why: only a dispatch mode sees every storage that a pass makes, and fake tensors have none
# remove when: torch documents them under public names
needs(
    "torch._subclasses.fake_tensor:FakeTensorMode",
    "torch.utils._python_dispatch:TorchDispatchMode.__torch_dispatch__(self, func, types, args)",
    "torch.utils._pytree:tree_leaves(tree)",
)
from torch._subclasses.fake_tensor import FakeTensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves as tree_leaves  # noqa: E402


# private: DistributedDataParallel._set_params_and_buffers_to_ignore_for_model (2.13)
# why: DDP waits for the gradient of every parameter, also of those that another model trains
# remove when: DDP takes the parameters to synchronise as an argument
@needs(
    "torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model"
    "(module, params_and_buffers_to_ignore)"
)
def ignore_in_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Keep DDP, when it wraps `module`, from synchronising these parameters and buffers."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


# private: torch.distributed.distributed_c10d.default_pg_timeout, .default_pg_nccl_timeout, written
#          (2.13)
# why: DeepSpeed makes process groups of its own, and passes no timeout on
# remove when: DeepSpeed passes the timeout of its configuration on
@needs(
    "torch.distributed.distributed_c10d:default_pg_timeout",
    "torch.distributed.distributed_c10d:default_pg_nccl_timeout",
)
def set_default_timeout(timeout: timedelta) -> None:
    """Set the timeout of process groups that are made without one."""
    constants: Any = torch.distributed.distributed_c10d
    constants.default_pg_timeout = timeout  # gloo's default: 30 minutes
    constants.default_pg_nccl_timeout = timeout  # NCCL's default: 10


# private: torch.utils.hooks.RemovableHandle.hooks_dict_ref, .id (2.13)
# why: a handle can remove its hook, but not restore it at its position
# remove when: torch can disable a hook for a while
@needs(
    "torch.utils.hooks:RemovableHandle.hooks_dict_ref",
    "torch.utils.hooks:RemovableHandle.id",
)
@contextmanager
def hooks_removed(handles: Iterable[Any]) -> Iterator[None]:
    """Context in which the hooks of these handles do not run."""
    removed = []
    for handle in handles:
        hooks = handle.hooks_dict_ref()
        removed.append((hooks, handle.id, hooks.pop(handle.id)))
    try:
        yield
    finally:
        for hooks, number, hook in removed:
            hooks[number] = hook


# private: aten::_grouped_mm (2.9 to 2.13)
# why: the product of fused experts is not among those that autocast rounds
# remove when: torch's autocast knows grouped_mm
@needs("torch:ops.aten._grouped_mm")
@cache
def autocast_experts(device_type: str) -> None:
    """From now on autocast runs the products of fused experts in bf16, as all others."""
    torch.library.register_autocast("aten::_grouped_mm", device_type, torch.bfloat16)


# private: aten::_grouped_mm, torch._subclasses.fake_tensor.FakeTensor (2.9 to 2.13)
# why: on fake tensors the product of fused experts refuses fp32, which it takes on real ones
# remove when: it takes fp32 there too
@needs("torch:ops.aten._grouped_mm", "torch._subclasses.fake_tensor:FakeTensor")
def on_fakes(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of a dispatch mode, on fake tensors in any dtype."""
    is_fake = args and isinstance(args[0], FakeTensor)
    if not is_fake or operation is not torch.ops.aten._grouped_mm.default:
        return operation(*args, **kwargs)
    a, b, *others = args
    return operation(a.bfloat16(), b.bfloat16(), *others, **kwargs).to(a.dtype)


# private: torch.Tensor._version (2.13)
# why: nothing else tells whether a tensor was written to in place
# remove when: torch documents a counter of writes
@needs("torch:Tensor._version")
def version(tensor: Tensor) -> int:
    """How often a tensor was written to in place."""
    return tensor._version


# private: torch.ops.mkldnn._reorder_linear_weight, ._linear_pointwise,
#          ._is_mkldnn_bf16_supported (2.13)
# why: oneDNN's blocked weights, which `torch.compile` uses, have no public function; on a CPU they
#      make decoding 1.5 times as fast (docs/performance.md)
# remove when: an eager linear layer can keep its weight packed
def has_packed_linear(dtype: torch.dtype) -> bool:
    """Whether a CPU product with packed weights of this dtype exists here."""
    operations = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(operations, n) for n in names):
        return False
    if dtype == torch.bfloat16:
        return operations._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def pack_linear_weight(weight: Tensor, rows: int) -> Tensor:
    """`weight [out,in]` in oneDNN's layout for inputs of `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def packed_linear(x: Tensor, packed_weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x [..., in] -> [..., out]` with a weight of `pack_linear_weight`."""
    product = torch.ops.mkldnn._linear_pointwise
    return product(x.to(packed_weight.dtype), packed_weight, bias, "none", [], "")
