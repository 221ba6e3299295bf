"""Metrics of one update: sums on each rank, reduced over all ranks once."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.memory_errors import Phase, doing
from marlhf.distributed import Distributed

# Metrics of `marlhf ppo` in addition to reward_NAME_mean, written always or on request.
RESERVED_NAMES = frozenset(
    """
    step score_mean score_std score_length_correlation kl_mean kl_k3_mean kl_coef objective_mean
    entropy response_length_mean eos_fraction prompt_truncated_fraction macro_length_mean
    macro_count_mean policy_loss value_loss explained_variance advantage_std clip_fraction
    value_clip_fraction approx_kl ratio_max engine_kl engine_ratio_max loss_weight_mean
    sampling_lag continued_prefixes_mean continuation_tokens_mean
    policy_steps skipped_steps ptx_loss grad_norm_policy grad_norm_value learning_rate step_seconds
    generate_seconds score_seconds segment_seconds train_seconds tokens_per_second peak_memory_gb
    reserved_memory_gb
    eval_score_mean eval_kl_mean eval_response_length_mean
    """.split()
)
# of one update, in order
PHASES: dict[str, Phase] = {
    "generate": "sampling",
    "score": "scoring",
    "segment": "segmenting",
    "train": "training",
}

Statistic = Callable[[list[float]], float | None]
"""Maps sums over all responses to a number, such as a correlation."""


class Metrics:
    """Means, maxima and other statistics of one update, on one rank until `reduce`.

    Numbers stay on the device that they are computed on: reading one waits for all of its work.
    """

    def __init__(self) -> None:
        self.sums: dict[str, list[Tensor | float]] = {}
        self._statistics: dict[str, tuple[Tensor, Statistic]] = {}
        self.maxima: dict[str, Tensor | float] = {}
        self._foreign: list[tuple[str, float, str]] = []

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add to the sum and the count of a metric; `reduce` divides them."""
        entry = self.sums.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + _exact(total)
        entry[1] = entry[1] + _exact(count)

    def add_foreign(self, values: Mapping[str, float], source: str) -> None:
        """Add a plug-in's numbers; `reduce` checks that their names are unique."""
        for name, value in values.items():
            self._foreign.append((name, value, source))

    def mean(self, name: str, values: Tensor | None, mask: Tensor | None = None) -> None:
        """Add every value, or those under a mask; None registers a metric without values."""
        if values is None:
            self.add(name, 0.0, 0.0)
            return
        entries = values[mask] if mask is not None else values
        self.add(name, entries.double().sum(), entries.numel())

    def statistic(self, name: str, sums: Tensor, of_sums: Statistic) -> None:
        """Report `of_sums` of float64 sums [K] over all ranks; call it on every rank."""
        self._statistics[name] = sums, of_sums

    def deviation(self, name: str, values: Tensor) -> None:
        """Report the standard deviation of values over all ranks."""
        x = values.double()
        self.statistic(name, torch.stack([torch.ones_like(x), x, x**2]).sum(1), _deviation)

    def maximum(self, name: str, value: Tensor | float) -> None:
        """Keep the largest value."""
        value, former = _exact(value), self.maxima.get(name)
        if former is not None:
            value = torch.maximum(torch.as_tensor(value), torch.as_tensor(former))
        self.maxima[name] = value

    def include(self, metrics: Metrics) -> None:
        """Add the sums, counts and maxima of other metrics."""
        for name, (total, count) in metrics.sums.items():
            self.add(name, total, count)
        for name, value in metrics.maxima.items():
            self.maximum(name, value)

    def reduce(self, distributed: Distributed) -> dict[str, Any]:
        """Name -> mean, maximum or statistic over all ranks; None where nothing was counted.

        Raises UserError where a plug-in's metric has a name that is taken.
        """
        for name, value, source in self._foreign:
            if name in self.sums or name in self.maxima or name in RESERVED_NAMES:
                raise UserError(f"{source}: its metric {name!r} has the name of another; rename it")
            self.add(name, value)
        self._foreign = []
        # a rank without sequences has no sums
        gathered = distributed.gather_objects(list(self.sums))
        names = sorted(set(gathered))
        sums = [list(map(float, self.sums.get(name, [0.0, 0.0]))) for name in names]
        table = torch.tensor(sums, dtype=torch.float64).reshape(-1, 2)
        table = distributed.all_reduce(table)
        result: dict[str, Any] = {
            name: total / count if count else None
            for name, (total, count) in zip(names, table.tolist(), strict=True)
        }
        maxima = distributed.gather_objects([(k, float(x)) for k, x in self.maxima.items()])
        for name, value in maxima:
            result[name] = max(value, result.get(name, value))
        for name, (parts, of_sums) in self._statistics.items():
            total = distributed.all_reduce(parts)
            result[name] = of_sums(total.tolist())
        return result


def _exact(x: Tensor | float) -> Tensor | float:
    """A number in double precision, a tensor as one on its device."""
    return x.detach().double() if isinstance(x, Tensor) else float(x)


def _deviation(sums: list[float]) -> float | None:
    count, total, squares = sums
    if not count:
        return None
    mean = total / count
    return math.sqrt(max(0.0, squares / count - mean**2))


class Timer:
    """Seconds spent in each of PHASES; a phase may be entered several times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        with doing(PHASES[phase]):
            yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the next phase needs blocks of other sizes
        self.seconds[phase] += time.perf_counter() - began

    def total(self) -> float:
        """Seconds since the timer was created."""
        return time.perf_counter() - self._began


def forget_loading() -> None:
    """Count a GPU's peak memory from here on, without what loading needed."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_row() -> dict[str, float]:
    """Memory at most so far, GB (1e9 bytes): a GPU's, or without one this process's.

    `peak_memory_gb` was used; with a GPU `reserved_memory_gb` is what torch has taken from it.
    """
    if torch.cuda.is_available():
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_memory_gb": allocated / 1e9, "reserved_memory_gb": reserved / 1e9}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_gb": peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9}
