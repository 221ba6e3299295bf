"""Keys that the configurations of `marlhf sft` and `marlhf reward` share."""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from marlhf.config.sections import (
    STRICT,
    AdamWSettings,
    CheckpointSettings,
    Count,
    MetricsSettings,
    NonNegative,
    Positive,
    TrainingConfig,
)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SupervisedOptimizerSettings(AdamWSettings):
    """AdamW."""

    learning_rate: NonNegative = 1e-5
    """The highest, after the warm-up."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SupervisedConfig(TrainingConfig):
    """Keys of the jobs that train on rows of data, in the order of `--help`."""

    epochs: Positive = 1.0
    """Passes over the data, rounded up to full batches."""
    steps: Count | None = None
    """Optimiser steps; default: those of `epochs`."""
    batch_size: Count = 64
    max_length: Count = 1024
    early_stopping: Count | None = None
    """Stop after this many consecutive evaluations without a lower held-out loss; `final/` is then
    the model with the lowest."""
    optimizer: SupervisedOptimizerSettings = Field(default_factory=SupervisedOptimizerSettings)
    log: MetricsSettings = Field(default_factory=MetricsSettings)
    """Outputs."""
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    """Checkpoints."""

    @model_validator(mode="after")
    def _check_early_stopping(self) -> SupervisedConfig:
        """Early stopping needs held-out rows and evaluations."""
        for key, value in (
            ("log.eval_every", self.log.eval_every),
            ("data.eval_rows", self.data.eval_rows),
        ):
            if self.early_stopping is not None and value == 0:
                raise ValueError(
                    f"{key}: given 0, must be at least 1 for early_stopping={self.early_stopping}"
                )
        return self
