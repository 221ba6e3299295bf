"""Isolation of plug-ins: segmenters, rewards, token rewards, parsers, presets.

`plugin_call` wraps every call, `copied` copies the arguments, `check_state` checks the state for
checkpoints. A plug-in can fail, and can change its own objects, but not those of the run.
"""

from __future__ import annotations

import copy
import gc
import io
import locale
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from numbers import Real
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from marlhf.common.errors import Stopped, UserError, one_line, raised, say, short_repr
from marlhf.common.process_guard import not_ended, streams_kept
from marlhf.common.tokenization import Span, Tokenizer
from marlhf.common.types import ResponseBatch

_UNCHANGING = (str, bytes, int, float, bool, type(None))
_TOKENIZER_SETTINGS = (
    *("padding_side", "truncation_side", "model_max_length", "chat_template"),
    *("special_tokens_map", "all_special_ids", "clean_up_tokenization_spaces"),
    *("add_bos_token", "add_eos_token"),
)
_BACKEND_SETTINGS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


# --- calls and their return values


@contextmanager
def plugin_call(name: str, error: Callable[[str], Exception] = UserError) -> Iterator[None]:
    """Wrap a call of a plug-in's code: any exception becomes `error` with its name.

    SystemExit is a failure too, and so is `os._exit`: a plug-in does not end a run, and never with
    status 0. Exceptions of class `error` pass unchanged. Process settings are restored afterwards,
    and random numbers come from the plug-ins' own streams. A process that a plug-in forks ends
    where it returns or raises.
    """
    process, inference = os.getpid(), torch.is_inference_mode_enabled()
    try:
        with not_ended(), streams_kept() as closed, _settings_kept(), _STREAMS:
            yield
            if os.getpid() != process:
                raise SystemExit(1)
        if closed:
            raise RuntimeError(f"closed {', '.join(sorted(closed))}, which the run writes to")
        if torch.is_inference_mode_enabled() != inference:
            raise RuntimeError(f"left torch's inference mode {'off' if inference else 'on'}")
    except BaseException as fault:
        if os.getpid() != process:
            _end_fork(name, fault)
        if isinstance(fault, Stopped):
            raise
        if isinstance(fault, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted in {name}") from fault
        if isinstance(error, type) and isinstance(fault, error):
            raise
        raise error(f"{name}: {raised(fault)}") from fault


def _end_fork(name: str, fault: BaseException) -> NoReturn:
    """End a process that a plug-in forked, with the status that Python would give it."""
    if not isinstance(fault, SystemExit):
        say(f"marlhf: {name}: in a process that it forked: {raised(fault)}")
        os._exit(1)
    status = 0 if fault.code is None else fault.code
    os._exit(status if isinstance(status, int) else 1)


def numbers(returned: Any) -> dict[str, float]:
    """Check a plug-in's metrics. Raises TypeError, or any exception of its objects."""
    if not isinstance(returned, Mapping):
        raise TypeError(
            f"metrics must be a mapping of names to numbers, not {short_repr(returned)}"
        )
    metrics: dict[str, float] = {}
    for name, value in returned.items():
        number = value.item() if hasattr(value, "item") else value
        if not isinstance(name, str) or not isinstance(number, Real):
            raise TypeError(
                f"the metric {short_repr(name)} must be a number, not {short_repr(value)}"
            )
        metrics[name] = float(number)
    return metrics


def requirements(
    plugin: Any, name: str, possible: frozenset[str], default: frozenset[str]
) -> frozenset[str]:
    """A plug-in's attribute `requires`, or `default` without one. Raises UserError, by its name."""
    with plugin_call(name):
        requires = getattr(plugin, "requires", default)
    names = ", ".join(sorted(possible))
    if isinstance(requires, str) or not isinstance(requires, set | frozenset | list | tuple):
        raise UserError(
            f"{name}: requires: given {short_repr(requires)}, must be a set of names: {names}"
        )
    if unknown := [item for item in requires if item not in possible]:
        wrong = ", ".join(sorted(map(str, unknown)))
        raise UserError(f"{name}: requires {wrong}; possible: {names}")
    return frozenset(requires)


def check_state(state: Any) -> None:
    """Check that checkpoints can save and load a plug-in's `state_dict()`. Raises TypeError."""
    file = io.BytesIO()
    try:
        torch.save(_without_tensors(state), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:  # pickle's, on types that it cannot write or may not read
        raise TypeError(
            "state_dict() must hold tensors, numbers, texts, lists and dicts alone: "
            f"{one_line(error, 120)}"
        ) from None


def _without_tensors(state: Any) -> Any:
    """The same state with empty tensors, to check its structure without writing gigabytes."""
    if type(state) is Tensor:
        return torch.empty(0)
    if type(state) in (list, tuple):
        return type(state)(map(_without_tensors, state))
    if isinstance(state, dict) and type(state).__module__ in ("builtins", "collections"):
        light = copy.copy(state)
        light.update({key: _without_tensors(value) for key, value in state.items()})
        return light
    return state


# --- arguments


def copied(value: Any) -> Any:
    """Copy everything mutable in records, lists, mappings, tensors and arrays.

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
    except Exception:  # a handle, a lock: not meant to be changed by a plug-in
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
    """A copied batch that reuses the texts and offsets of its original."""

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
    tokenizer: Tokenizer | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Raise `error` where a call changes arguments that are too large to copy."""
    tensors = tensors or {}
    settings = _tokenizer_settings(tokenizer)
    digests = {key: _digest(x) for key, x in tensors.items()}
    yield
    settings_now = _tokenizer_settings(tokenizer)
    for key, before in settings.items():
        if settings_now[key] != before:
            changed = f"from {short_repr(before)} to {short_repr(settings_now[key])}"
            raise error(
                f"{name}: changed the tokenizer's {key} {changed}; it is the policy's own: work on "
                "copy.deepcopy(tokenizer)"
            )
    for key, before in digests.items():
        if not torch.equal(_digest(tensors[key]), before):
            raise error(f"{name}: changed {key}, which others read; work on a copy")


def _tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """The settings of a tokenizer that affect encoding and decoding."""
    if tokenizer is None:
        return {}
    settings = {key: copied(getattr(tokenizer, key, None)) for key in _TOKENIZER_SETTINGS}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings |= {key: repr(getattr(backend, key, None)) for key in _BACKEND_SETTINGS}
    return settings | {"vocabulary": len(tokenizer) if hasattr(tokenizer, "__len__") else None}


def _digest(x: Tensor) -> Tensor:
    """Sums of the bits of each vector along the last axis."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    fills_words = x.shape[-1] * x.element_size() % 8 == 0  # several values per word: far faster
    return x.contiguous().view(torch.int64 if fills_words else bits[x.element_size()]).sum(-1)


# --- side effects


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Restore process settings that runs need, such as gradients, dtype, device and folder."""
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
    yield torch.get_num_threads, torch.set_num_threads
    yield torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode
    yield torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    yield torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly
    for kind in ("cpu", "cuda"):
        yield partial(torch.is_autocast_enabled, kind), partial(torch.set_autocast_enabled, kind)
    yield np.geterr, lambda old: np.seterr(**old)
    yield sys.getrecursionlimit, sys.setrecursionlimit
    yield gc.isenabled, lambda on: gc.enable() if on else gc.disable()
    yield _errors_of_warnings, _drop_errors_of_warnings
    yield partial(locale.setlocale, locale.LC_ALL), partial(locale.setlocale, locale.LC_ALL)
    # additions of a plug-in are kept
    yield lambda: dict(os.environ), os.environ.update
    yield lambda: list(sys.path), _set_path
    yield lambda: (sys.stdout, sys.stderr), _set_streams
    yield lambda: sys.excepthook, partial(setattr, sys, "excepthook")
    yield _folder, lambda folder: None if folder is None else os.chdir(folder)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            yield lambda n=number: signal.getsignal(n), lambda old, n=number: _set_handler(n, old)
        # a plug-in's time limit would end the run afterwards
        yield lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0, _stop_timer


def _set_default_device(device: torch.device) -> None:
    # None is a process's initial value; naming the CPU would slow every call down
    torch.set_default_device(None if device.type == "cpu" else device)


def _set_handler(number: int, handler: Any) -> None:
    if handler is not None:  # None: not set by Python
        signal.signal(number, handler)


def _errors_of_warnings() -> list[Any]:
    return [filter_ for filter_ in warnings.filters if filter_[0] == "error"]


def _drop_errors_of_warnings(before: list[Any]) -> None:
    """Drop new filters that make errors of warnings; others come with imported libraries."""
    kept = [filter_ for filter_ in warnings.filters if filter_[0] != "error" or filter_ in before]
    warnings.filters[:] = kept  # pyright: ignore[reportIndexIssue]


def _set_path(before: list[str]) -> None:
    sys.path[:] = [*before, *(folder for folder in sys.path if folder not in before)]


def _set_streams(streams: tuple[Any, Any]) -> None:
    sys.stdout, sys.stderr = streams


def _stop_timer(was_running: bool) -> None:
    if not was_running:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


class _Streams:
    """Two sets of global random streams: the run's, and the plug-ins' during their calls.

    A plug-in that seeds them or draws from them does not change the noise of the run.
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
    """Resume the plug-ins' random streams from a state of `plugin_generators`."""
    _STREAMS.of_plugins = state


def generators(all_devices: bool = True) -> dict[str, Any]:
    """The state of every global random number generator, as plain data and tensors.

    all_devices   of all GPUs, not only of this process's
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
    """Resume the random streams from a state of `generators`."""
    random.setstate(state["python"])
    name, keys, position, *rest = state["numpy"]
    if not 0 <= position <= len(keys):  # numpy does not check it
        raise ValueError(f"numpy's generator is at {position} of {len(keys)}")
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == 1:
        torch.cuda.set_rng_state(state["cuda"][0])
    elif len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
