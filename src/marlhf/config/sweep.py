"""The configuration of `marlhf sweep`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from marlhf.config.sections import STRICT, Count, NonEmptyPath, Text

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SweepConfig:
    """A `marlhf sweep`: every arm at every point of the grid with every seed."""

    config: NonEmptyPath
    """The configuration file that all runs start from."""
    job: Literal["ppo", "sft", "reward"] = "ppo"
    """Job to run with it."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of that configuration for all runs: {steps: 200}."""
    arms: dict[Text, dict[str, Any]] = Field(default_factory=dict)
    """Named sets of keys, one per run: {token: {segmenter: token},
    five: {segmenter: {name: ngram, n: 5}, kl.coef: 0.04}}."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Values of single keys, one of each per run: {kl.coef: [0.02, 0.05]}."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(default_factory=lambda: [0])
    """Seeds of every arm at every point of the grid."""
    output_dir: NonEmptyPath = "runs/sweep"
    """Folder of the sweep; each run writes in its own folder below it."""
    parallel: Count = 1
    """Concurrent runs."""
    threads: Count | None = None
    """CPU threads per run; default: the cores of the machine divided by `parallel`."""
