"""The configuration of `marlhf sft`."""

from __future__ import annotations

from typing import Annotated, Literal

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
    Place,
    Positive,
    check_resume,
)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SFTDataSettings(DataSettings):
    """Prompts with completions, conversations, or plain text: JSONL, JSON, CSV or Parquet file, a
    `save_to_disk` folder, or a hub name."""

    completion_column: str = "completion"
    """Column with the completion: text, or a list of chat messages after those of the prompt."""
    completion_template: str | None = None
    """Build the completion from the row's columns, such as " {summary}"."""
    text_column: str | None = None
    """Train on this column alone, without a prompt: conversations (lists of chat messages) or plain
    text."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SFTOptimizerSettings(AdamWSettings):
    """AdamW."""

    learning_rate: NonNegative = 1e-5
    """At its highest, after the warm-up."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SFTConfig:
    """Everything a `marlhf sft` run needs."""

    model: ModelSettings
    """The model to fine-tune."""
    data: SFTDataSettings = Field(default_factory=SFTDataSettings)
    """The demonstrations."""
    output_dir: Place = "runs/sft"
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
    """Rows in an optimiser step, over all ranks; with `packing` a row holds many examples."""
    max_length: Count = 1024
    """Tokens in a row. Of a longer example the prompt loses tokens on its left, and what is too
    long without its prompt is cut at the end; both are counted in `truncated_fraction`."""
    loss_on: Literal["completion", "all"] = "completion"
    """Train on completions (of a conversation: the assistant's turns) alone, or on all tokens.
    Plain text is trained on whole."""
    packing: bool = False
    """Fill rows of `max_length` tokens with several examples. Each keeps its own positions and
    attends to itself alone, so that an example's loss is the same as in a row of its own."""
    early_stopping: Count | None = None
    """Stop after this many evaluations in a row without a lower held-out loss; `final/` is then the
    model with the lowest."""
    optimizer: SFTOptimizerSettings = Field(default_factory=SFTOptimizerSettings)
    """AdamW."""
    log: MetricsSettings = Field(default_factory=MetricsSettings)
    """Outputs."""
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    """Checkpoints."""

    @model_validator(mode="after")
    def _cross_checks(self) -> SFTConfig:
        check_resume(self.resume, self.overwrite)
        check_early_stopping(self.early_stopping, self.log, self.data)
        data, defaults = self.data, SFTDataSettings()
        if data.text_column is not None:
            for key in (
                "prompt_column",
                "prompt_template",
                "completion_column",
                "completion_template",
                "apply_chat_template",
            ):
                if getattr(data, key) != getattr(defaults, key):
                    raise ValueError(
                        f"data.{key}: given {getattr(data, key)!r} beside data.text_column, which "
                        "has no prompts; give only one of them"
                    )
        if data.completion_template is not None and data.completion_column != "completion":
            raise ValueError(
                f"data.completion_column: given {data.completion_column!r} beside "
                "data.completion_template; give only one of them"
            )
        return self


def check_early_stopping(patience: int | None, log: MetricsSettings, data: DataSettings) -> None:
    """Early stopping needs held-out rows and a time to look at them. Raises ValueError."""
    for key, value in (("log.eval_every", log.eval_every), ("data.eval_rows", data.eval_rows)):
        if patience is not None and value == 0:
            raise ValueError(f"{key}: given 0, must be at least 1 for early_stopping={patience}")
