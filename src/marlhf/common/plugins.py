"""The border to code that users bring: segmenters, rewards, token rewards, parsers, presets.

`called` is around every call of it, `copied` makes what it is given, `check_state` looks at what
it wants kept. So a plug-in can fail, and change what it holds, but nothing of the run.
"""

from __future__ import annotations

import copy
import io
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from marlhf.common.errors import Stopped, UserError, one_line, raised, shown
from marlhf.common.tokenization import Span
from marlhf.common.types import ResponseBatch

_UNCHANGING = (str, bytes, int, float, bool, type(None))
_OF_A_TOKENIZER = (
    *("padding_side", "truncation_side", "model_max_length", "chat_template"),
    *("special_tokens_map", "all_special_ids", "clean_up_tokenization_spaces"),
    *("add_bos_token", "add_eos_token"),
)


# --- what a plug-in does


@contextmanager
def called(name: str, error: Callable[[str], Exception] = UserError) -> Iterator[None]:
    """Around a call of a plug-in's code: whatever it raises becomes `error` with its name.

    SystemExit is a failure too: a plug-in does not end a run, and never with status 0. What is
    of the class `error` already passes. Settings of the process are afterwards what they were, and
    random numbers come from streams that are the plug-ins' own.
    """
    try:
        with _settings_kept(), _STREAMS:
            yield
    except Stopped:
        raise
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"interrupted in {name}") from interrupt
    except BaseException as fault:
        if isinstance(error, type) and isinstance(fault, error):
            raise
        raise error(f"{name}: {raised(fault)}") from fault


def numbers(returned: Any) -> dict[str, float]:
    """Metrics that a plug-in returned, checked. Raises TypeError or whatever its objects raise."""
    if not isinstance(returned, Mapping):
        raise TypeError(f"metrics must be a mapping of names to numbers, not {shown(returned)}")
    found: dict[str, float] = {}
    for name, value in returned.items():
        number = value.item() if hasattr(value, "item") else value
        if not isinstance(name, str) or not isinstance(number, Real):
            raise TypeError(f"the metric {shown(name)} must be a number, not {shown(value)}")
        found[name] = float(number)
    return found


def names_required(requires: Any, possible: frozenset[str]) -> frozenset[str]:
    """A plug-in's attribute `requires`, checked. Raises UserError without its name."""
    possibly = ", ".join(sorted(possible))
    if isinstance(requires, str) or not isinstance(requires, set | frozenset | list | tuple):
        raise UserError(f"requires: given {shown(requires)}, must be a set of names: {possibly}")
    if unknown := [name for name in requires if name not in possible]:
        raise UserError(f"requires {', '.join(sorted(map(str, unknown)))}; possible: {possibly}")
    return frozenset(requires)


def check_state(state: Any) -> None:
    """That a checkpoint can hold a plug-in's `state_dict()` and give it back. Raises TypeError."""
    file = io.BytesIO()
    try:
        torch.save(_without_tensors(state), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # of pickle, about what it cannot write or may not read
        raise TypeError(
            "state_dict() must hold tensors, numbers, texts, lists and dicts alone: "
            f"{one_line(error, 120)}"
        ) from None


def _without_tensors(state: Any) -> Any:
    """The same with empty tensors: the form is looked at, not gigabytes."""
    if type(state) is Tensor:
        return torch.empty(0)
    if type(state) in (list, tuple):
        return type(state)(map(_without_tensors, state))
    if isinstance(state, dict) and type(state).__module__ in ("builtins", "collections"):
        light = copy.copy(state)
        light.update({key: _without_tensors(value) for key, value in state.items()})
        return light
    return state


# --- what it is given


def copied(value: Any) -> Any:
    """A copy of all that can be changed in records, lists, mappings, tensors and arrays.

    A ResponseBatch keeps its tokenizer, and its texts and offsets are decoded once for all copies.
    """
    if isinstance(value, _UNCHANGING):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, set):
        return type(value)(map(copied, value))
    if type(value) is tuple:
        return tuple(map(copied, value))
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    if is_dataclass(value) and type(value).__module__.startswith("marlhf."):
        return _copied_record(value)
    try:
        return copy.deepcopy(value)
    except Exception:  # a handle, a lock: nothing that a plug-in's row could be meant to change
        return value


def _copied_record(record: Any) -> Any:
    is_batch = isinstance(record, ResponseBatch)
    made = object.__new__(_Copy if is_batch else type(record))
    for field in fields(record):
        value = getattr(record, field.name)
        object.__setattr__(
            made, field.name, value if is_batch and field.name == "tokenizer" else copied(value)
        )
    if is_batch:
        object.__setattr__(made, "_original", record)
    return made


class _Copy(ResponseBatch):
    """A batch that asks the one it was made from for its texts and offsets."""

    _original: ResponseBatch | None = None

    @cached_property
    def texts(self) -> list[str]:
        original = self._original
        return ResponseBatch.texts.func(self) if original is None else list(original.texts)

    @cached_property
    def offsets(self) -> list[list[Span]]:
        original = self._original
        if original is None:
            return ResponseBatch.offsets.func(self)
        return [list(row) for row in original.offsets]


@contextmanager
def unchanged(
    name: str,
    error: Callable[[str], Exception],
    tokenizer: Any = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Around a call that is given what is too large to copy: a change is `error`, by name."""
    tensors = tensors or {}
    before = _facts(tokenizer), {key: _digest(x) for key, x in tensors.items()}
    yield
    for key, was in before[0].items():
        if (now := _facts(tokenizer)[key]) != was:
            raise error(
                f"{name}: changed the tokenizer's {key} from {shown(was)} to {shown(now)}; it is "
                "the policy's own: work on copy.deepcopy(tokenizer)"
            )
    for key, was in before[1].items():
        if not torch.equal(_digest(tensors[key]), was):
            raise error(f"{name}: changed {key}, which others read; work on a copy")


def _facts(tokenizer: Any) -> dict[str, Any]:
    """What of a tokenizer changes what is read and written."""
    if tokenizer is None:
        return {}
    found = {key: copied(getattr(tokenizer, key, None)) for key in _OF_A_TOKENIZER}
    return found | {"vocabulary": len(tokenizer) if hasattr(tokenizer, "__len__") else None}


def _digest(x: Tensor) -> Tensor:
    """Sums of the bits of each vector along the last axis."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = x.shape[-1] * x.element_size() % 8 == 0  # several values in one word: far quicker
    return x.contiguous().view(torch.int64 if whole else bits[x.element_size()]).sum(-1)


# --- what it leaves


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Bring back what of the process a run relies on: gradients, dtype, device, folder, signals."""
    before = [(get(), get, put) for get, put in _settings()]
    try:
        yield
    finally:
        for value, get, put in before:
            if get() != value:
                put(value)


def _settings() -> Iterator[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    yield torch.is_grad_enabled, torch.set_grad_enabled
    yield torch.get_default_dtype, torch.set_default_dtype
    yield torch.get_default_device, _set_default_device
    yield _folder, lambda folder: None if folder is None else os.chdir(folder)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            yield lambda n=number: signal.getsignal(n), lambda old, n=number: _set_handler(n, old)


def _set_default_device(device: torch.device) -> None:
    # None is what a process begins with; naming the CPU would slow every call down
    torch.set_default_device(None if device.type == "cpu" else device)


def _set_handler(number: int, handler: Any) -> None:
    if handler is not None:  # None: it was not Python that set it
        signal.signal(number, handler)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


class _Streams:
    """Global random numbers, two of everything: the run's, and while a plug-in is called its own.

    So one that seeds them, draws from them or not changes no noise of the run.
    """

    def __init__(self) -> None:
        self.of_plugins: dict[str, Any] | None = None
        self._of_run: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        self._of_run.append(generators(all_devices=False))
        if len(self._of_run) == 1 and self.of_plugins is not None:  # not within another plug-in
            set_generators(self.of_plugins)

    def __exit__(self, *_: Any) -> None:
        of_run = self._of_run.pop()
        if not self._of_run:
            self.of_plugins = generators(all_devices=False)
            set_generators(of_run)


_STREAMS = _Streams()


def seed_generators(seed: int) -> None:
    """Seed the generators of python, numpy and torch, for the run and for its plug-ins."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    _STREAMS.of_plugins = generators(all_devices=False)


def plugin_generators() -> dict[str, Any] | None:
    """The state of the plug-ins' random streams, for checkpoints."""
    return _STREAMS.of_plugins


def set_plugin_generators(state: dict[str, Any] | None) -> None:
    """Go on with the plug-ins' random numbers after those of `plugin_generators`."""
    _STREAMS.of_plugins = state


def generators(all_devices: bool = True) -> dict[str, Any]:
    """The state of every global random number generator, as plain data and tensors.

    all_devices   of all GPUs, not only of the one that this process computes on
    """
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.is_available() and (all_devices or torch.cuda.is_initialized())
    states = torch.cuda.get_rng_state_all if all_devices else lambda: [torch.cuda.get_rng_state()]
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": states() if cuda else [],
    }


def set_generators(state: Mapping[str, Any]) -> None:
    """Go on with the random numbers after those of `generators`."""
    random.setstate(state["python"])
    name, keys, position, *rest = state["numpy"]
    if not 0 <= position <= len(keys):  # which numpy believes
        raise ValueError(f"numpy's generator is at {position} of {len(keys)}")
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == 1:
        torch.cuda.set_rng_state(state["cuda"][0])
    elif len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
