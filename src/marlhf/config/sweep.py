"""The configuration of `marlhf sweep`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from marlhf.config.sections import STRICT, Count, Place, Text

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SweepConfig:
    """Everything a `marlhf sweep` needs: every arm with every point of the grid and every seed."""

    config: Place
    """The configuration file that all runs start from."""
    job: Literal["ppo", "sft", "reward"] = "ppo"
    """What to run on it."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of that configuration for all runs: {steps: 200}."""
    arms: dict[Text, dict[str, Any]] = Field(default_factory=dict)
    """Named sets of keys, of which each run has one: {token: {segmenter: token},
    five: {segmenter: {name: ngram, n: 5}, kl.coef: 0.04}}."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Lists of values of single keys, of which each run has one each: {kl.coef: [0.02, 0.05]}."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(default_factory=lambda: [0])
    """Every one of these with each of the above."""
    output_dir: Place = "runs/sweep"
    """Each run writes in a folder of its own below this one."""
    parallel: Count = 1
    """Runs at a time."""
    threads: Count | None = None
    """CPU threads of a run; default: the cores of the machine divided by `parallel`."""
