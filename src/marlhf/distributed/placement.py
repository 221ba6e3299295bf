"""Where the weights of a model live: the one place that decides it.

The first rank alone reads a model; one in files is memory-mapped, and pages of files are not memory
of the process. Fused experts are made when their turn comes (`common.deferred`). Then one tensor
after the other goes to where it stays:

    single               the device
    ddp, zero1, zero2    the device of every rank
    zero3                a shard on each rank, in host memory where the profile offloads

in the dtype in which it stays:

    trained              fp32
    frozen               fp32; under `precision: bf16`, bf16 where products are all that reads it
    base of adapters     the same, but for weights that are not bf16 in the files: `final/` has them
    the same, quantised  linear layers of the backbone in 4 bits, see `quantized`

Autocast would round these weights to bf16 in every product, so that no result differs.

So no rank holds more than it keeps, plus the largest tensor. This takes any model, merged adapters,
GGUF and objects of the user included. transformers' own way under ZeRO-3, to shard within
`from_pretrained`, takes files alone, and reports no weights that are surplus or of another shape.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from marlhf.common.deferred import set_values, values_of
from marlhf.distributed.quantized import QuantizedLinear, replace_layers

Model = TypeVar("Model")
Module = TypeVar("Module", bound=nn.Module)
Use = Literal["trained", "frozen", "base"]
# (module, the part of it that every forward pass begins with, what puts a parameter on the device)
Shard = Callable[[nn.Module, nn.Module, Callable[[nn.Parameter], None]], None]


class Ranks(Protocol):
    """The peers of a process, as `Distributed`."""

    @property
    def is_main(self) -> bool:
        """Whether this is the first rank."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        ...

    @property
    def precision(self) -> str:
        """Precision of products."""
        ...

    def autocast(self) -> Any:
        """Context of a forward pass at that precision."""
        ...

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """The lists of all ranks, concatenated."""
        ...

    def fail_together(self, work: Callable[[], Any]) -> Any:
        """Run `work`; if it raises on one rank, all raise."""
        ...


class Placement:
    """Reads models on the first rank, and gives every rank its weights.

    ranks    None: this process is alone
    device   where weights live; default: the rank's device, or the CPU
    shard    spreads a module over the ranks; None: every rank keeps all of it
    """

    def __init__(
        self,
        ranks: Ranks | None = None,
        device: torch.device | str | None = None,
        shard: Shard | None = None,
    ) -> None:
        self._ranks = ranks if ranks is not None and ranks.world_size > 1 else None
        self.autocast = nullcontext if ranks is None else ranks.autocast
        self._is_bf16 = ranks is not None and ranks.precision == "bf16"
        if device is None:
            device = "cpu" if ranks is None else ranks.device
        self.device = torch.device(device)
        self._shard = shard

    @property
    def shards(self) -> bool:
        """Whether `place` leaves a rank but a part of a module."""
        return self._shard is not None

    @property
    def _reads(self) -> bool:
        return self._ranks is None or self._ranks.is_main

    def read(self, build: Callable[[], Model]) -> Model:
        """The model, or models, that `build` makes on the first rank.

        Elsewhere it is the same, but its parameters have no memory and no values: `place` gives
        them both. Must be called on all ranks; an error of `build` is raised on all.
        """
        if self._ranks is None:
            return build()
        built: list[Model] = []

        def pickled() -> list[bytes]:
            if not self._reads:
                return []
            built.append(build())
            return [_without_weights(built[0])]

        (skeleton,) = self._ranks.gather_objects(self._ranks.fail_together(pickled))
        return self._ranks.fail_together(lambda: built[0] if built else _with_stand_ins(skeleton))

    def place(
        self,
        module: Module,
        backbone: nn.Module | None = None,
        use: Use = "trained",
        as_given: bool = False,
        quantized: bool = False,
    ) -> Module:
        """Put a module from `read` where it stays, one tensor after the other.

        backbone   the part of it that every forward pass begins with; None: the module is small,
                   and every rank keeps all of it
        use        decides dtypes, as this module's docstring says
        as_given   parameters keep their dtypes instead
        quantized  linear layers of the backbone are replaced by layers in 4 bits

        Must be called on all ranks.
        """
        replaced = replace_layers(backbone) if quantized and backbone is not None else {}
        for buffer in module.buffers():
            is_half = buffer.dtype in (torch.float16, torch.bfloat16)
            buffer.data = buffer.data.to(self.device, torch.float32 if is_half else None)

        rounded = matmul_parameters(module) if self._is_bf16 and use != "trained" else set()

        def put(parameter: nn.Parameter) -> None:
            if parameter in replaced:
                self._quantize(*replaced.pop(parameter))
                return
            kept = parameter.dtype
            is_exact = use == "frozen" or kept == torch.bfloat16
            if parameter.is_floating_point() and not as_given:
                kept = torch.bfloat16 if parameter in rounded and is_exact else torch.float32
            if self._reads:
                set_values(parameter, values_of(parameter).to(self.device, kept))
            else:
                parameter.data = torch.empty(parameter.shape, dtype=kept, device=self.device)

        if self._shard is not None and backbone is not None:
            self._shard(module, backbone, put)
            return module
        for parameter in module.parameters():
            put(parameter)
            if self._ranks is not None:
                parameter.data = parameter.data.contiguous()  # as gloo and NCCL need
                torch.distributed.broadcast(parameter.data, 0)
        return module

    def _quantize(self, layer: QuantizedLinear, weight: Tensor) -> None:
        """Quantise a weight, which only the first rank has, into a layer of every rank."""
        if self._reads:
            layer.quantize(values_of(weight).to(self.device))
        else:
            layer.allocate(self.device)
        if self._ranks is not None:  # the same on all, also where their devices are not
            for tensor in layer.quantized:
                torch.distributed.broadcast(tensor, 0)


def matmul_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Parameters that only matrix products read, which autocast runs in bf16.

    Those of linear layers and fused experts. Not those of a tied head, which are embeddings too,
    and of a classifier's head, as scores are computed in fp32.
    """
    read: set[nn.Parameter] = set()
    others: set[nn.Parameter] = set()
    for name, part in module.named_modules():
        parameters = part.parameters(recurse=False)
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] != "score":
            read.update(p for p in parameters if p.is_floating_point())  # 4 bits stay
        elif type(part).__name__.endswith("Experts"):
            parameters = list(parameters)
            read.update(p for p in parameters if p.dim() == 3)
            others.update(p for p in parameters if p.dim() != 3)
        else:
            others.update(parameters)
    return read - others


ALONE = Placement()
"""For one process on a CPU."""


class _Skeleton(pickle.Pickler):
    """Pickles an object without the values of its parameters; shared ones stay shared."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._numbers: dict[nn.Parameter, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        """Number and kind of a parameter; None for all else, which is pickled."""
        if not isinstance(obj, nn.Parameter):
            return None
        number = self._numbers.setdefault(obj, len(self._numbers))
        return number, tuple(obj.shape), obj.dtype, obj.requires_grad


class _StandIns(pickle.Unpickler):
    """Reads what `_Skeleton` wrote; parameters are one number, seen as the full shape."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._parameters: dict[int, nn.Parameter] = {}

    def persistent_load(self, pid: Any) -> nn.Parameter:
        """The stand-in of a parameter."""
        number, shape, dtype, requires_grad = pid
        if number not in self._parameters:
            stand_in = torch.zeros((), dtype=dtype).expand(shape)
            self._parameters[number] = nn.Parameter(stand_in, requires_grad)
        return self._parameters[number]


def _without_weights(model: Any) -> bytes:
    file = io.BytesIO()
    _Skeleton(file).dump(model)
    return file.getvalue()


def _with_stand_ins(skeleton: bytes) -> Any:
    return _StandIns(io.BytesIO(skeleton)).load()


class OneByOne(nn.Module):
    """A module whose parameters are placed by `put` as an iteration reaches them.

    `deepspeed.zero.Init` shards each before it asks for the next: one at a time is complete.
    """

    def __init__(self, module: nn.Module, put: Callable[[nn.Parameter], None]) -> None:
        super().__init__()
        self._taken = [(module, put)]  # in a list: not a submodule

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters, once each."""
        ((module, put),) = self._taken
        for parameter in module.parameters(recurse):
            put(parameter)
            yield parameter
