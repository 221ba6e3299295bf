"""Checked loading of a run's state: plain data only, of the expected types and shapes.

A tensor of another shape would be broadcast by `copy_`, and would make fused optimisers write out
of bounds.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlhf.common.errors import UserError


def read_tensors(file: Path, mapped: bool = False) -> dict[str, Any]:
    """Load a dict of tensors and plain data from `torch.save`. Raises UserError and OSError.

    mapped   tensors stay in the file, and take memory where they are read
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, EOFError):  # their messages are long
        raise UserError(f"{file.name} holds more than tensors, numbers, texts and lists") from None
    if not isinstance(state, dict):
        raise UserError(f"{file.name} holds no dict")
    return state


def digest_of_state(state: Any) -> str:
    """SHA-256 of plain data and tensors, the same for equal states."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{[*value.shape]}".encode())
            digest.update(value.to_dense().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            add(list(value.items()))
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)} items".encode())
            for item in value:
                add(item)
        else:
            digest.update(f"{value!r}, ".encode())

    add(state)
    return digest.hexdigest()


def read_numbers(file: Path, kinds: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """Load a JSON object with these keys, each of its type. Raises UserError and OSError."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{file.name} holds no JSON") from None
    for key, kind in kinds.items():
        value = state.get(key) if isinstance(state, dict) else None
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits or (isinstance(value, int) and value < 0):
            raise UserError(f"{file.name} has no {key} of the right type")
    return state


def check_weights(saved: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> None:
    """Check that weights have exactly these names and shapes. Raises UserError."""
    check_shapes({name: weight.shape for name, weight in saved.items()}, shapes)


def check_shapes(saved: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size]) -> None:
    """Check that saved weights have exactly these names and shapes. Raises UserError."""
    for name in saved.keys() ^ shapes.keys():
        raise UserError(f"{name} is {'no weight of this model' if name in saved else 'missing'}")
    for name, shape in shapes.items():
        if saved[name] != shape:
            raise UserError(f"{name} has shape {list(saved[name])}, not {list(shape)}")


@contextmanager
def loading_optimizer(optimizer: torch.optim.Optimizer, is_ours: bool = True) -> Iterator[None]:
    """Wrap loading the state of an AdamW: keep its settings and check its moments.

    Moments must have their parameters' shapes, and get their strides. Raises UserError.

    is_ours   false where DeepSpeed manages it, which may have swapped tensors out
    """
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)
    for parameter, state in optimizer.state.items():
        if not isinstance(parameter, Tensor) or not isinstance(state, dict):
            raise UserError("the optimiser's state is of other parameters")
        if is_ours and state and state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise UserError("the optimiser's state is not that of AdamW")
        for name, value in state.items():
            if not isinstance(value, Tensor):
                if is_ours:
                    raise UserError(f"the optimiser's {name} is no tensor")
                continue
            swapped = not is_ours and 0 in (value.numel(), parameter.numel())
            fits = value.numel() == 1 if name == "step" else value.shape == parameter.shape
            if not (swapped or (fits and value.is_floating_point())):
                raise UserError(
                    f"the optimiser's {name} has shape {list(value.shape)} and type {value.dtype}, "
                    f"for a weight of shape {list(parameter.shape)}"
                )
            if is_ours and name != "step" and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)
