"""Weights and optimiser state as fragments: entries of named parameters, wherever a rank has them.

A rank under ZeRO writes its own fragments, in `rank-R.safetensors`:

    weight/NAME, exp_avg/NAME, exp_avg_sq/NAME   fp32 [count], entries of the flattened parameter
    metadata `fragments`                         JSON: NAME -> shape, start, count, step

One process, or DDP, writes all parameters in full: `weights.safetensors`, `optimizer.pt`. Either is
read by any number of ranks, spread in any way. A rank reads the entries that it keeps and no
others, one parameter at a time from mapped files: none ever holds the full optimiser state.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.state_files import check_shapes, read_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHT = "weight"
_PARTS = "fragments"  # key of the metadata


@dataclass(frozen=True)
class Fragment:
    """The entries of a parameter that a rank trains.

    name     of the parameter in its module
    shape    of the full parameter
    start    index of the first entry in the flattened parameter
    count    number of entries; 0 where other ranks have them all
    holder   the optimiser's parameter that holds them, or those of many parameters, flattened
    offset   index of the first entry in the flattened holder
    """

    name: str
    shape: torch.Size
    start: int
    count: int
    holder: Tensor
    offset: int = 0

    def of(self, x: Tensor) -> Tensor:
        """The entries in a flat tensor like the holder."""
        return x.detach().narrow(0, self.offset, self.count)

    def put(self, x: Tensor, values: Tensor) -> None:
        """Set the entries in a tensor like the holder."""
        is_all = x.shape == self.shape and self.count == x.numel()
        target = x.detach() if is_all else self.of(x)
        target.copy_(values.view(target.shape))


class Files(Protocol):
    """Saved weights and optimiser state, over all files of a checkpoint."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shape of every parameter."""
        ...

    def step(self, name: str) -> float | None:
        """Optimiser steps of a parameter; None: it has no state."""
        ...

    def read(self, name: str, key: str, start: int, count: int) -> Tensor:
        """Entries [count] of the weight (`weight`) or a moment. Raises UserError."""
        ...


class _Part(BaseModel):
    """A parameter's entries in a file."""

    model_config = ConfigDict(strict=True)

    shape: list[int]
    start: int = Field(ge=0)
    count: int = Field(ge=1)
    step: float | None


_PARTS_OF_A_FILE = TypeAdapter(dict[str, _Part])


def save_fragments(
    fragments: Iterable[Fragment], optimizer: torch.optim.Optimizer, file: Path
) -> None:
    """Write a rank's fragments, copying one at a time to the host. Raises OSError."""
    tensors: dict[str, Tensor] = {}
    parts: dict[str, Any] = {}
    steps: dict[Tensor, float | None] = {}
    for fragment in (f for f in fragments if f.count):
        holder, name = fragment.holder, fragment.name
        state = optimizer.state.get(holder) or {}
        if holder not in steps:
            steps[holder] = float(state["step"]) if state else None
        tensors[f"{_WEIGHT}/{name}"] = fragment.of(holder)
        for key in MOMENTS if state else ():
            tensors[f"{key}/{name}"] = fragment.of(state[key])
        parts[name] = {
            "shape": list(fragment.shape),
            "start": fragment.start,
            "count": fragment.count,
            "step": steps[holder],
        }
    _write(tensors, {_PARTS: json.dumps(parts)}, file)


def _write(tensors: Mapping[str, Tensor], metadata: dict[str, str], file: Path) -> None:
    """Write fp32 tensors as safetensors; its own `save_file` copies all to the host at once."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, x in tensors.items():
        assert x.dtype == torch.float32, f"{name} is {x.dtype}"
        begin, end = end, end + x.nbytes
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            write_tensor(x, out)


def write_tensor(x: Tensor, out: Any) -> None:
    """Append the values of a tensor to an open file."""
    out.write(x.detach().to("cpu").contiguous().numpy())


@torch.no_grad()
def load_fragments(
    fragments: Sequence[Fragment], optimizer: torch.optim.Optimizer, files: Files
) -> None:
    """Set a rank's fragments and its optimiser's state. Raises UserError and OSError.

    Parameters that share a holder get one number of steps, the largest of theirs.
    """
    check_shapes(files.shapes, {f.name: f.shape for f in fragments if f.shape.numel()})
    by_holder: dict[Tensor, list[Fragment]] = {}
    for fragment in (f for f in fragments if f.count):
        by_holder.setdefault(fragment.holder, []).append(fragment)
    for holder, parts in by_holder.items():
        for part in parts:
            part.put(holder, files.read(part.name, _WEIGHT, part.start, part.count))
        steps = {part.name: files.step(part.name) for part in parts}
        taken = [step for step in steps.values() if step is not None]
        if not taken and not optimizer.state.get(holder):
            continue
        state = _state_of(holder, optimizer)
        state["step"].fill_(max(taken, default=0.0))
        for part in parts:
            for key in MOMENTS:
                if steps[part.name] is None:
                    part.put(state[key], torch.zeros(part.count))
                else:
                    part.put(state[key], files.read(part.name, key, part.start, part.count))


def _state_of(holder: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of a parameter of a fused AdamW, made as its first step would."""
    state = optimizer.state[holder]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=holder.device)
        for key in MOMENTS:
            state[key] = torch.zeros_like(holder, memory_format=torch.preserve_format)
    return state


class FragmentFiles:
    """The files of `save_fragments` of a number of ranks. Raises UserError and OSError."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self._parts: dict[str, list[tuple[_Part, Any, Path]]] = {}
        for rank in range(ranks):
            file = folder / f"rank-{rank}.safetensors"
            opened = _opened(file)
            try:
                text = (opened.metadata() or {})[_PARTS]
                parts = _PARTS_OF_A_FILE.validate_json(text)
            except (KeyError, ValidationError):
                raise UserError(f"{file.name} holds no fragments of weights") from None
            for name, part in parts.items():
                shape = torch.Size(part.shape)
                if self.shapes.setdefault(name, shape) != shape:
                    raise UserError(f"{file.name}: {name} has another shape than in other files")
                self._parts.setdefault(name, []).append((part, opened, file))
        for of_name in self._parts.values():
            of_name.sort(key=lambda entry: entry[0].start)

    def step(self, name: str) -> float | None:
        """Optimiser steps of a parameter; None: it has no state."""
        steps = [part.step for part, *_ in self._parts[name] if part.step is not None]
        return max(steps, default=None)

    def read(self, name: str, key: str, start: int, count: int) -> Tensor:
        """Entries [count] of the weight or a moment, from all files that have some."""
        values = torch.zeros(count)
        place, end = start, start + count
        for part, opened, file in self._parts[name]:
            stop = min(part.start + part.count, end)
            if part.start > place or stop <= place:
                continue
            if key == _WEIGHT or part.step is not None:
                begin = place - part.start
                saved = _slice(opened, file, f"{key}/{name}", part.count)
                values[place - start : stop - start] = saved[begin : begin + stop - place]
            place = stop
        if place < end:
            raise UserError(f"{name}: entries {place} to {end - 1} are in no file")
        return values


class ReplicatedFiles:
    """`weights.safetensors` and `optimizer.pt`, of parameters that are in them in full.

    names   of the parameters, in the order of the optimiser's, where the files have none
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """Raises UserError and OSError."""
        self._weights = _opened(folder / "weights.safetensors")
        keys = self._weights.keys()
        self.shapes = {n: torch.Size(self._weights.get_slice(n).get_shape()) for n in keys}
        saved = read_tensors(folder / "optimizer.pt", mapped=True)
        optimizer, names = saved["optimizer"], saved.get("names", names)  # earlier versions: none
        groups, states = optimizer["param_groups"], optimizer["state"]
        indices = [index for group in groups for index in group["params"]]
        if len(indices) != len(names) or states.keys() - {*indices}:
            raise UserError("the optimiser's state is of other parameters")
        self._states = {n: states[i] for n, i in zip(names, indices, strict=True) if i in states}
        check_shapes(self.shapes, {name: self.shapes.get(name, torch.Size()) for name in names})
        for name, state in self._states.items():
            _check_state(name, state, self.shapes[name])

    def step(self, name: str) -> float | None:
        """Optimiser steps of a parameter; None: it has no state."""
        return float(self._states[name]["step"]) if self._states.get(name) else None

    def read(self, name: str, key: str, start: int, count: int) -> Tensor:
        """Entries [count] of the weight or a moment."""
        full = self._weights.get_tensor(name) if key == _WEIGHT else self._states[name][key]
        return full.reshape(-1)[start : start + count]


def _check_state(name: str, state: Any, shape: torch.Size) -> None:
    """Check that a parameter's state is that of AdamW. Raises UserError."""
    if state and (not isinstance(state, dict) or state.keys() != {"step", *MOMENTS}):
        raise UserError("the optimiser's state is not that of AdamW")
    for key, value in state.items():
        is_plain = isinstance(value, Tensor) and value.layout == torch.strided
        fits = is_plain and (value.numel() == 1 if key == "step" else value.shape == shape)
        if not fits or not value.is_floating_point():
            raise UserError(f"the optimiser's {key} of {name} does not fit a weight of {[*shape]}")


def _opened(file: Path) -> Any:
    """A file of safetensors, mapped into memory. Raises UserError."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{file.name} is missing") from None
    except SafetensorError:
        raise UserError(f"{file.name} is no file of safetensors, or an incomplete one") from None


def _slice(opened: Any, file: Path, key: str, count: int) -> Any:
    """The tensor `key` in an open file, to be sliced. Raises UserError."""
    try:
        part = opened.get_slice(key)
    except SafetensorError:
        raise UserError(f"{file.name} has no {key}") from None
    if part.get_shape() != [count] or part.get_dtype() != "F32":
        raise UserError(f"{file.name}: {key} is not fp32 of {count} entries")
    return part
