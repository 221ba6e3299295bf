"""Engines of other packages: their faults are errors that name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from marlhf.common.errors import UserError, one_line, say, short_repr
from marlhf.common.plugins import copied, plugin_call
from marlhf.common.types import Generation
from marlhf.config import RolloutSettings

_AXES = {"prompt_ids": "BP", "prompt_mask": "BP", "finished": "B"}  # of all others: BT


@dataclass(frozen=True)
class PluginEngine:
    """Calls an engine of another package.

    vocabulary   of the policy, tokens
    device       where the results go
    """

    name: str
    engine: Any
    vocabulary: int
    device: torch.device

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: RolloutSettings,
    ) -> Generation:
        """Sample with the engine, and check the responses. Raises UserError."""
        with plugin_call(self.name):
            generation = self.engine.generate(copied(prompts), list(seeds), settings)
        return self._checked(generation, prompts)

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: RolloutSettings,
    ) -> Callable[[], Generation]:
        """Start sampling with the engine; the returned function waits and checks."""
        with plugin_call(self.name):
            wait = self.engine.begin(copied(prompts), list(seeds), settings)

        def responses() -> Generation:
            with plugin_call(self.name):
                generation = wait()
            return self._checked(generation, prompts)

        return responses

    def _checked(self, generation: Any, prompts: Sequence[Sequence[int]]) -> Generation:
        """The engine's responses on this rank's device. Raises UserError."""
        try:
            check_generation(generation, prompts, self.vocabulary)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.name}: {one_line(error)}") from error
        tensors: dict[str, Any] = {f.name: getattr(generation, f.name) for f in fields(generation)}
        tensors = {name: x if x is None else x.to(self.device) for name, x in tensors.items()}
        return Generation(**tensors)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Pass the weights on. A fault while they are made keeps its own words."""
        faults: list[Exception] = []

        def watched() -> Iterator[tuple[str, Tensor]]:
            try:
                yield from weights
            except Exception as error:
                faults.append(error)
                raise

        try:
            with plugin_call(self.name):
                self.engine.update_weights(watched())
        except UserError as error:
            if faults and error.__cause__ is faults[0]:
                raise faults[0] from None
            raise

    def sleep(self) -> None:
        """Let the engine give memory back."""
        with plugin_call(self.name):
            self.engine.sleep()

    def close(self) -> None:
        """Let the engine release everything; a fault is printed, as the run is over."""
        try:
            with plugin_call(self.name):
                self.engine.close()
        except UserError as error:
            say(f"marlhf: {error}")

    def __getattr__(self, name: str) -> Any:
        """The engine's own attributes, for whoever holds a trainer."""
        return getattr(self.engine, name)


def check_generation(generation: Any, prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Check an engine's responses to prompts. Raises TypeError or ValueError, naming the fault."""
    if not isinstance(generation, Generation):
        raise TypeError(f"generate returned {short_repr(generation)}, must be a Generation")
    sizes = {"B": len(prompts)}
    for field in fields(generation):
        x = getattr(generation, field.name)
        if x is not None or field.name != "logprobs":
            _check_form(field.name, x, sizes)
    rows = zip(generation.prompt_ids, generation.prompt_mask, prompts, strict=True)
    for row, (ids, mask, prompt) in enumerate(rows):
        if ids[mask].tolist() != list(prompt) or bool((mask[:-1] & ~mask[1:]).any()):
            raise ValueError(f"prompt_ids: row {row} is not the prompt, padded on the left")
    mask = generation.response_mask
    if bool((~mask[:, :-1] & mask[:, 1:]).any()):
        raise ValueError("response_mask must be True up to each response's end, False after it")
    ids = generation.response_ids[mask]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"response_ids: {int(ids.min())} to {int(ids.max())}, must be 0 to {vocabulary - 1}"
        )
    if generation.logprobs is not None and not bool(generation.logprobs[mask].isfinite().all()):
        raise ValueError("logprobs must be finite for every token of a response")


def _check_form(name: str, x: Any, sizes: dict[str, int]) -> None:
    """Check layout, shape and dtype of a field, and collect `sizes` of the axes."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_meta:
        raise TypeError(f"{name} is {short_repr(x)}, must be a dense tensor")
    axes = _AXES.get(name, "BT")
    fits = x.dim() == len(axes)
    if not fits or any(sizes.setdefault(a, n) != n for a, n in zip(axes, x.shape, strict=True)):
        expected = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
        raise ValueError(f"{name} has the shape {list(x.shape)}, must be [{expected}]")
    is_bool = name.endswith("_mask") or name == "finished"
    dtype = torch.int64 if name.endswith("_ids") else torch.bool if is_bool else torch.float32
    if x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}, must be {dtype}")
