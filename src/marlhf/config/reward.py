"""The configuration of `marlhf reward`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from marlhf.config.sections import (
    STRICT,
    AdamWSettings,
    CheckpointSettings,
    Count,
    DataSettings,
    MetricsSettings,
    Minutes,
    ModelSettings,
    NonNegative,
    PathText,
    Place,
    Positive,
    check_resume,
)
from marlhf.config.sft import check_early_stopping


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PairDataSettings(DataSettings):
    """Pairs of answers, one preferred: JSONL, JSON, CSV or Parquet file, a `save_to_disk` folder,
    or a hub name."""

    chosen_column: str = "chosen"
    """Column with the preferred answer: text, or a list of chat messages, those after the prompt
    or all."""
    rejected_column: str = "rejected"
    """Column with the other answer, likewise."""
    full_texts: bool = False
    """The two columns hold prompt and answer together; there is no column with the prompt."""
    margin_column: str | None = None
    """Column with a number of at least 0: by how much the chosen answer should win."""
    demonstrations_path: PathText | None = None
    """Rows with prompts and demonstrations, whose mean score becomes 0: another file, folder or hub
    name. Default: the training pairs."""
    demonstrations_column: str | None = None
    """Column with the demonstration. Default: `chosen_column`."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RewardOptimizerSettings(AdamWSettings):
    """AdamW."""

    learning_rate: NonNegative = 1e-5
    """At its highest, after the warm-up."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RewardConfig:
    """Everything a `marlhf reward` run needs."""

    model: ModelSettings
    """The model to start from: a causal LM (the SFT model), which gets a new scalar head, or a
    reward model."""
    data: PairDataSettings = Field(default_factory=PairDataSettings)
    """The preference pairs."""
    output_dir: Place = "runs/reward"
    """Where the run writes."""
    overwrite: bool = False
    """Start again in an output_dir that already holds a run, deleting its files."""
    resume: Place | None = None
    """`auto`: go on from the latest whole checkpoint in output_dir, or begin where there is no run;
    a path: go on from that checkpoint; null: refuse an output_dir that holds a run."""
    resume_changed: bool = False
    """Go on from a checkpoint although data, weights or code of plug-ins have changed since."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Fixes every random draw."""
    distributed_timeout_minutes: Minutes = 360
    """How long a rank waits for the others, as while one writes a checkpoint, before the run
    fails."""
    epochs: Positive = 1.0
    """Passes over the data, rounded up to whole batches."""
    steps: Count | None = None
    """Optimiser steps; default: those of `epochs`."""
    batch_size: Count = 64
    """Pairs in an optimiser step, over all ranks."""
    max_length: Count = 1024
    """Tokens of prompt and answer; longer texts lose their start, and are counted in
    `truncated_fraction`."""
    centring: NonNegative = 0.0
    """Weight of (chosen + rejected)^2 in the loss, which keeps scores around 0; 0.01 is usual."""
    early_stopping: Count | None = None
    """Stop after this many evaluations in a row without a lower held-out loss; `final/` is then the
    model with the lowest."""
    optimizer: RewardOptimizerSettings = Field(default_factory=RewardOptimizerSettings)
    """AdamW; `micro_batch_size` counts pairs."""
    log: MetricsSettings = Field(default_factory=MetricsSettings)
    """Outputs."""
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    """Checkpoints."""

    @model_validator(mode="after")
    def _cross_checks(self) -> RewardConfig:
        check_resume(self.resume, self.overwrite)
        check_early_stopping(self.early_stopping, self.log, self.data)
        data, defaults = self.data, PairDataSettings()
        for key in ("prompt_column", "prompt_template", "apply_chat_template"):
            if data.full_texts and getattr(data, key) != getattr(defaults, key):
                raise ValueError(
                    f"data.{key}: given {getattr(data, key)!r} beside data.full_texts, which has "
                    "no prompts; give only one of them"
                )
        return self
