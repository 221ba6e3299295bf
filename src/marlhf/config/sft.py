"""The configuration of `marlhf sft`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from marlhf.config.sections import (
    STRICT,
    Count,
    DataSettings,
    ModelSettings,
    NonEmptyPath,
)
from marlhf.config.supervised import SupervisedConfig, SupervisedOptimizerSettings


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SFTDataSettings(DataSettings):
    """Prompts with completions, conversations, or plain text.

    A JSONL, JSON, CSV or Parquet file, a `save_to_disk` folder, or a hub name."""

    completion_column: str = "completion"
    """Column with the completion: text, or a list of chat messages after those of the prompt."""
    completion_template: str | None = None
    """Build the completion from the row's columns, such as " {summary}"."""
    text_column: str | None = None
    """Train on this column alone, without a prompt: conversations (lists of chat messages) or plain
    text."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SFTConfig(SupervisedConfig):
    """Everything a `marlhf sft` run needs."""

    model: ModelSettings
    """The model to fine-tune."""
    data: SFTDataSettings = Field(default_factory=SFTDataSettings)
    """The demonstrations."""
    output_dir: NonEmptyPath = "runs/sft"
    """Where the run writes."""
    batch_size: Count = 64
    """Sequences per optimiser step, over all ranks; with `packing` one holds many examples."""
    max_length: Count = 1024
    """Tokens per sequence. A longer example loses tokens of its prompt on the left, then of its
    completion at the end; both are counted in `truncated_fraction`."""
    loss_on: Literal["completion", "all"] = "completion"
    """Train on completions (of a conversation: the assistant's turns) alone, or on all tokens.
    Plain text is trained on completely."""
    packing: bool = False
    """Fill sequences of `max_length` tokens with several examples. Each keeps its own positions and
    attends to itself alone, so that its loss is the same as without packing."""
    optimizer: SupervisedOptimizerSettings = Field(default_factory=SupervisedOptimizerSettings)
    """AdamW."""

    @model_validator(mode="after")
    def _cross_checks(self) -> SFTConfig:
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
                        f"data.{key}: given {getattr(data, key)!r} with data.text_column, which "
                        "has no prompts; give only one of them"
                    )
        if data.completion_template is not None and data.completion_column != "completion":
            raise ValueError(
                f"data.completion_column: given {data.completion_column!r} with "
                "data.completion_template; give only one of them"
            )
        return self
