"""Out-of-memory errors of devices and the host, and the phase they came in."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from marlhf.common.errors import one_line

Phase = Literal["loading", "sampling", "scoring", "segmenting", "training", "saving"]

# torch's allocators have classes of their own for GPUs alone
_WORDS = re.compile(
    "out of memory|(can't|cannot|unable to) allocate|alloc_failed|bad_alloc|not enough memory",
    re.IGNORECASE,
)
# what allocators say beside the size: a place in their source, the states of devices
_NOISE = re.compile(
    r"\[enforce fail at \S+ err == 0\. |(?<=\.) GPU \d+ has .*?(?= \(\S+, line \d+\)$|$)"
)
_MARK = "_marlhf_phase"


@contextmanager
def doing(phase: Phase) -> Iterator[None]:
    """Context that marks an error of memory with a phase, unless an inner one has."""
    try:
        yield
    except Exception as error:
        if is_memory_error(error) and phase_of(error) is None:
            with suppress(AttributeError):  # a class of a plug-in may take no attributes
                setattr(error, _MARK, phase)
        raise


def is_memory_error(error: BaseException) -> bool:
    """Whether an exception, or what it was raised from, is of an allocator."""
    return any(map(_is_of_an_allocator, _causes(error)))


def phase_of(error: BaseException) -> Phase | None:
    """What the job was doing when the error came; None outside of `doing`."""
    marks = [getattr(cause, _MARK, None) for cause in _causes(error)]
    return next((mark for mark in reversed(marks) if mark is not None), None)


def without_noise(error: BaseException) -> str:
    """The error's message as a line, without what allocators add to the size."""
    return one_line(_NOISE.sub("", one_line(error, 5000)).rstrip("."))


def _is_of_an_allocator(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    says_so = isinstance(error, RuntimeError) and bool(_WORDS.search(str(error)))
    return says_so or isinstance(error, MemoryError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
