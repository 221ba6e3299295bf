"""A pretended accelerator: code believes that it runs on `cuda:0`, and all is computed on the CPU.

Storages of tensors on it carry a tag. Tensors of tagged storages say `cuda:0`, an operation that
meets both devices raises as CUDA does, and whatever makes the host wait for the device is counted
by line, as are kernels. Generators, autocast and factories are the CPU's, and so are numbers.

It cannot show what kernels do, their memory, streams, pinned memory, and several devices.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import accelerate.utils.imports
import torch
import transformers.utils.import_utils
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.overrides import TorchFunctionMode

from marlhf.compat.torch import TorchDispatchMode

DEVICE, CPU = torch.device("cuda:0"), torch.device("cpu")
SOURCE = str(Path(__file__).parents[2] / "src") + "/"

# operations that tell the host a number, or of what size their result is
_WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "multinomial"),
    *("masked_scatter_backward",),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
}
_INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
# take a number from the CPU, as all pointwise operations do
_WITH_SCALARS = {"masked_fill", "masked_fill_", "fill", "fill_"}
_WITHOUT_KERNEL = {
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    *("lift_fresh", "_unsafe_view", "detach", "alias", "_local_scalar_dense"),
}


def is_on(tensor: Tensor) -> bool:
    """Whether a tensor is on the accelerator."""
    with torch._C.DisableTorchFunction():
        return _is_on(tensor)


def _is_on(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "on_accelerator", False)


def _mark(result: Any, on: bool) -> Any:
    if isinstance(result, Tensor):
        storage: Any = result.untyped_storage()
        storage.on_accelerator = on
    return result


def _device(tensor: Tensor) -> torch.device:
    return DEVICE if _is_on(tensor) else tensor.device


def _parsed(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _mixed(name: str) -> RuntimeError:
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
        f"and cpu! (in {name})"
    )


def _tensors(values: Any) -> Iterator[Tensor]:
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


class _Move(torch.autograd.Function):
    """A copy on the other device; its gradient is moved back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, on: bool) -> Tensor:
        ctx.was_on = _is_on(x)
        return _mark(x.clone(), on)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Move.apply(gradients[0], ctx.was_on), None


class _Generator(torch._C.Generator):
    """A generator of the CPU that says where it is."""

    device: torch.device = CPU

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls)
        made.device = _parsed(device)
        return made

    def __init__(self, *_: Any) -> None:
        pass


class _Autocast(torch.autocast):
    """That of the CPU, for the accelerator."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(_of_cpu(device_type), *args, **kwargs)


def _of_cpu(kind: str) -> str:
    return "cpu" if kind.startswith("cuda") else kind


class Accelerator(TorchDispatchMode):
    """What the pretended accelerator counted.

    waits     of the host for the device, by the line of this library that waited
    kernels   operations of the device that launch one, by name
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    @contextmanager
    def counted(self) -> Iterator[SimpleNamespace]:
        """Waits and kernels in this context."""
        counts = SimpleNamespace(waits=Counter(), kernels=Counter())
        before, (self.waits, self.kernels) = (self.waits, self.kernels), vars(counts).values()
        try:
            yield counts
        finally:
            self.waits, self.kernels = before

    def wait(self, times: int = 1) -> None:
        """The host waits, at the line that runs."""
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(SOURCE):
            frame = frame.f_back
        line = "elsewhere"
        if frame is not None:
            line = f"{frame.f_code.co_filename.removeprefix(SOURCE)}:{frame.f_lineno}"
        if times:
            self.waits[line] += times

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            tensors = [*_tensors(args), *_tensors(kwargs.values())]
            on = [_is_on(x) for x in tensors]
            if not any(on):
                return func(*args, **kwargs)
            name = func.overloadpacket.__name__
            if name in _INDEXING:
                self._check_indices(name, *args)
            elif name in ("copy_", "copy"):
                self.wait(on[0] != on[1])
                if not on[0]:
                    return func(*args, **kwargs)
            elif not all(on):
                self._check_scalars(func, name, args, tensors, on)
            if name in _WAITS and kwargs.get("output_size") is None:
                self.wait()
            result = func(*args, **kwargs)
            if not func.is_view and name not in _WITHOUT_KERNEL:
                self.kernels[name] += 1
            if not func.is_view:  # which has its input's storage
                inputs = {x.untyped_storage()._cdata for x in tensors}
                for x in _tensors(result if isinstance(result, list | tuple) else [result]):
                    if x.untyped_storage()._cdata not in inputs:
                        _mark(x, True)
            return result

    def _check_indices(
        self, name: str, x: Tensor, indices: Any, values: Any = None, *_: Any
    ) -> None:
        """Masks tell the host how many they keep; indices of the CPU are copied."""
        indices = [i for i in indices if i is not None]
        if not _is_on(x):
            raise _mixed(name)
        is_number = values is not None and not _is_on(values) and values.dim() == 0
        if values is not None and not (is_number or _is_on(values)):
            raise _mixed(name)
        masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
        if is_number and len(masks) == len(indices):
            return  # torch fills under the mask
        self.wait(len(masks) + sum(not _is_on(i) for i in indices) + is_number)

    def _check_scalars(
        self, func: Any, name: str, args: Any, tensors: list[Tensor], on: list[bool]
    ) -> None:
        """Numbers of the CPU are allowed in pointwise operations that do not write them."""
        is_pointwise = torch.Tag.pointwise in func.tags or name in _WITH_SCALARS
        numbers = all(x.dim() == 0 for x, is_ours in zip(tensors, on, strict=True) if not is_ours)
        written = func._schema.is_mutable and not on[0]
        if not (is_pointwise and numbers) or written:
            raise _mixed(name)


class _Functions(TorchFunctionMode):
    """Functions of torch that name a device, or that see a tensor's memory."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__()
        self._accelerator = accelerator
        x: Any = Tensor
        self._replaced: dict[Any, Callable[..., Any]] = {
            x.device.__get__: lambda x, *_: _device(x),
            x.is_cuda.__get__: lambda x, *_: _is_on(x),
            x.is_cpu.__get__: lambda x, *_: _device(x).type == "cpu",
            x.get_device: lambda x: 0 if _is_on(x) else -1,
            x.to: self._to,
            x.cpu: lambda x, **kwargs: self._to(x, "cpu", **kwargs),
            x.cuda: lambda x, *_, **kwargs: self._to(x, "cuda", **kwargs),
            x.numpy: partial_of_cpu(x.numpy),
            x.__array__: partial_of_cpu(x.__array__),
            x.tolist: self._tolist,
            x.new_tensor: self._new_tensor,
            x.backward: self._backward,
            x.__deepcopy__: lambda x, memo: _mark(x.__deepcopy__(memo), _is_on(x)),
            x.grad.__set__: self._set_gradient,
            torch.tensor: self._from_host(torch.tensor),
            torch.as_tensor: self._from_host(torch.as_tensor),
            torch.asarray: self._from_host(torch.asarray),
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (replaced := self._replaced.get(func)) is not None:
            return replaced(*args, **kwargs)
        device, generator = kwargs.get("device"), kwargs.get("generator")
        if generator is not None:
            where = device or next((_device(x) for x in _tensors(args)), CPU)
            if _parsed(where).type != generator.device.type:
                raise RuntimeError(
                    f"Expected a {_parsed(where).type!r} device type for generator but found "
                    f"{generator.device.type!r}"
                )
        if device is None or _parsed(device).type == "meta":
            return func(*args, **kwargs)
        kwargs = {**kwargs, "device": CPU}
        return _mark(func(*args, **kwargs), _parsed(device).type == "cuda")

    def _to(self, x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        device, options = kwargs.pop("device", None), []
        other = kwargs.pop("other", None)
        for value in (*args, *([] if other is None else [other])):
            if isinstance(value, Tensor):
                device = _device(value)
                options.append(value.dtype)
            elif isinstance(value, torch.dtype):
                options.append(value)
            elif not isinstance(value, bool) and value is not None:
                device = value
        if device is not None and _parsed(device).type == "meta":
            return x.to("meta", next(iter(options), x.dtype), copy=copy)
        is_moved = device is not None and (_parsed(device).type == "cuda") != _is_on(x)
        y = x.to(*options, copy=copy and not is_moved, **kwargs) if options or kwargs or copy else x
        if not is_moved:
            return y
        self._accelerator.wait()
        with self:
            return _Move.apply(y, not _is_on(x))  # pyright: ignore[reportReturnType]

    def _tolist(self, x: Tensor) -> Any:
        self._accelerator.wait(_is_on(x))
        return x.tolist()

    def _new_tensor(self, x: Tensor, data: Any, **kwargs: Any) -> Tensor:
        kwargs = {"dtype": x.dtype, "device": _device(x), **kwargs}
        return self._from_host(torch.tensor)(data, **kwargs)

    def _from_host(self, make: Any) -> Callable[..., Tensor]:
        def made(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
            x = make(data, **kwargs)
            if device is None and isinstance(data, Tensor):
                return x if make is not torch.tensor else _mark(x, _is_on(data))
            return self._to(x, CPU if device is None else device)

        return made

    def _backward(self, x: Tensor, gradient: Any = None, *args: Any, **kwargs: Any) -> None:
        with self:  # what is recomputed calls functions, too
            torch.autograd.backward(x, gradient, *args, **kwargs)

    def _set_gradient(self, x: Any, gradient: Tensor | None) -> None:
        if gradient is not None and _is_on(gradient) != _is_on(x):
            raise RuntimeError("assigned grad has data located on a different device")
        x.grad = gradient


def partial_of_cpu(function: Any) -> Callable[..., Any]:
    """A function of arrays, which refuses tensors on the accelerator as torch does."""

    def called(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _is_on(x):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
        return function(x, *args, **kwargs)

    return called


def _module(accelerator: Accelerator) -> dict[str, Any]:
    """What `torch.cuda` has while the accelerator is there."""
    properties = SimpleNamespace(name="pretended", total_memory=2**36, major=9, minor=0)
    return {
        "_initialized": True,
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "device": lambda *_: nullcontext(),
        "synchronize": lambda *_: accelerator.wait(),
        "empty_cache": lambda: None,
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (properties.total_memory, properties.total_memory),
        "reset_peak_memory_stats": lambda *_: None,
        "max_memory_allocated": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }


def _by_device(group: Any) -> Any:
    """Tensors grouped by the device that they say they are on."""

    def grouped(lists: Any, *args: Any) -> Any:
        groups = group(lists, *args)
        where = {DEVICE for x in lists[0] if x is not None and is_on(x)} or {CPU}
        return {(next(iter(where)), dtype): x for (_, dtype), x in groups.items()}

    return grouped


@contextmanager
def pretended() -> Iterator[Accelerator]:
    """In this context there is an accelerator, and no other process."""
    accelerator = Accelerator()
    kinds = ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled")
    mapped: dict[str, Any] = {
        name: _with_kind(getattr(torch, name)) for name in (*kinds, "set_autocast_dtype")
    }
    group = torch._C._group_tensors_by_device_and_dtype

    def tag(storage: Any) -> str | None:
        return str(DEVICE) if getattr(storage, "on_accelerator", False) else None

    def restore(storage: Any, location: str) -> Any:
        if not location.startswith("cuda"):
            return None
        storage.on_accelerator = True
        return storage

    with ExitStack() as stack:
        stack.callback(_forget)
        _forget()
        stack.enter_context(patch.multiple(torch.cuda, **_module(accelerator)))
        stack.enter_context(patch.multiple(torch, Generator=_Generator, autocast=_Autocast))
        stack.enter_context(patch.multiple(torch, **mapped))
        stack.enter_context(patch.object(torch.amp, "autocast", _Autocast))
        replaced = patch.object(torch._C, "_group_tensors_by_device_and_dtype", _by_device(group))
        stack.enter_context(replaced)
        registry = torch.serialization._package_registry
        registry.insert(0, (0, tag, restore))
        stack.callback(registry.pop, 0)
        stack.enter_context(accelerator)
        stack.enter_context(_Functions(accelerator))
        yield accelerator


def _with_kind(function: Any) -> Callable[..., Any]:
    return lambda kind="cpu", *args: function(_of_cpu(kind), *args)


def _forget() -> None:
    """Forget which devices other libraries saw."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for module in (accelerate.utils.imports, transformers.utils.import_utils):
        for name, function in vars(module).items():
            if "torch" in name or "cuda" in name:
                getattr(function, "cache_clear", lambda: None)()
