"""The configuration of `marlhf reward`."""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from marlhf.config.sections import (
    STRICT,
    Count,
    DataSettings,
    ModelSettings,
    NonEmptyPath,
    NonNegative,
    PathText,
)
from marlhf.config.supervised import SupervisedConfig, SupervisedOptimizerSettings


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PairDataSettings(DataSettings):
    """Pairs of answers, one preferred.

    A JSONL, JSON, CSV or Parquet file, a `save_to_disk` folder, or a hub name."""

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
class RewardConfig(SupervisedConfig):
    """Everything a `marlhf reward` run needs."""

    model: ModelSettings
    """The model to start from: a causal LM (the SFT model), which gets a new scalar head, or a
    reward model."""
    data: PairDataSettings = Field(default_factory=PairDataSettings)
    """The preference pairs."""
    output_dir: NonEmptyPath = "runs/reward"
    """Where the run writes."""
    batch_size: Count = 64
    """Pairs per optimiser step, over all ranks."""
    max_length: Count = 1024
    """Tokens of prompt and answer; longer texts lose their start, and are counted in
    `truncated_fraction`."""
    centring: NonNegative = 0.0
    """Weight of (chosen + rejected)^2 in the loss, which keeps scores around 0; 0.01 is usual."""
    optimizer: SupervisedOptimizerSettings = Field(default_factory=SupervisedOptimizerSettings)
    """AdamW; `micro_batch_size` counts pairs."""

    @model_validator(mode="after")
    def _cross_checks(self) -> RewardConfig:
        data, defaults = self.data, PairDataSettings()
        for key in ("prompt_column", "prompt_template", "apply_chat_template"):
            if data.full_texts and getattr(data, key) != getattr(defaults, key):
                raise ValueError(
                    f"data.{key}: given {getattr(data, key)!r} with data.full_texts, which has "
                    "no prompts; give only one of them"
                )
        return self
