"""Sections that several jobs share.

The docstring under a field is its line in `marlhf JOB --help`.
"""

from __future__ import annotations

from dataclasses import fields
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from marlhf.common.paths import checked_path
from marlhf.common.registry import Spec

STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

# torch counts in 64 bits at most, and nobody means a billion of anything
Count = Annotated[int, Field(ge=1, lt=2**31)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Minutes = Annotated[int, Field(ge=1, le=365 * 24 * 60)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[str, AfterValidator(checked_path)]  # which a hub name is too
NonEmptyPath = Annotated[str, Field(min_length=1), AfterValidator(checked_path)]

# YAML reads a date where no quotes tell it otherwise
Day = Annotated[str, BeforeValidator(lambda day: str(day) if type(day) is date else day)]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class LoraSettings:
    """Train low-rank adapters on a frozen base (any key of `peft.LoraConfig` under `extra`)."""

    r: Count = 16
    """Rank of the update."""
    alpha: Positive = 32.0
    """Scale of the update is alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: names, a regex, or `all-linear`."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further keys for `peft.LoraConfig`, passed through."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class QuantizationSettings:
    """Hold the frozen base of adapters in few bits (QLoRA; install `marlhf[quantization]`)."""

    bits: Literal[4] = 4
    """Bits of a weight: NF4 in blocks of 64, their scales in 8 bits. Linear layers alone;
    embeddings, norms and heads stay as they are."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ModelSettings:
    """The policy."""

    path: Text
    """A hub name, a directory of safetensors, or a directory with a GGUF file."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the matrix products (`tf32`: of NVIDIA GPUs since Ampere); trainable weights are
    fp32 in every case."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraSettings | None = None
    """Train adapters instead of all weights; policy and critic then share one frozen base, and
    the reference is that base with the adapters off."""
    quantization: QuantizationSettings | None = None
    """With `lora`: hold the base in 4 bits, `{bits: 4}`, about half a byte per parameter; null: in
    the precision of its files."""
    attention: Text | None = None
    """Attention of policy, reference and critic, by its name in transformers: `sdpa`, `eager`,
    `flash_attention_2`, `flash_attention_3`, or a kernel's name on the hub; null: the model's."""
    chat_template: str | None = None
    """A Jinja chat template, for a tokenizer that has none."""
    final_dtype: Literal["fp32", "bf16", "checkpoint"] = "fp32"
    """Dtype of the weights in `final/`; `checkpoint`: that of the model in `path`."""

    @model_validator(mode="after")
    def _quantizes_a_base(self) -> ModelSettings:
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                f"model.quantization: given bits={self.quantization.bits} without model.lora, but "
                "quantised weights cannot be trained; give model.lora, or leave it out"
            )
        return self


_WITH_PRESET = ("part", "part_seed", "min_good_rows")
# some of these belong to one job's section alone
_NOT_WITH_PRESET = (
    *("name", "prompt_column", "prompt_template", "columns", "completion_column"),
    *("completion_template", "text_column", "chosen_column", "rejected_column", "full_texts"),
    *("margin_column", "demonstrations_column"),
)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class DataSettings:
    """Prompts: JSONL, JSON, CSV or Parquet file, a `save_to_disk` folder, or a hub name."""

    path: PathText | None = None
    """File, folder or hub name. Must be given, unless Python code passes `train_dataset` or
    `preset` knows it; with `preset`, a copy in the same schema."""
    preset: Spec | None = None
    """A dataset of the paper, or yours by import path, that knows its columns, prompts and parts:
    openai/summarize_from_feedback, Dahoas/full-hh-rlhf, openai/webgpt_comparisons,
    codeparrot/apps; a name, or a mapping with `name` and arguments (docs/datasets.md)."""
    part: Literal["auto", "sft", "reward", "ppo", "all", "held_out"] = "auto"
    """Documents of `preset` to use; `auto`: those of the job, for evaluation the held-out ones."""
    part_seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 1234
    """Seed of the division of `preset` into parts; the same in all jobs, or parts overlap."""
    min_good_rows: Fraction = 0.95
    """Least share of `preset`'s rows that must fit its schema; the others are left out."""
    name: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split to train on."""
    prompt_column: str = "prompt"
    """Column with the prompt: text, or a list of chat messages."""
    prompt_template: str | None = None
    """Build the prompt from the row's columns, such as "Summarize:\\n{document}"."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Rename columns: {new name: name in the file}."""
    apply_chat_template: bool = False
    """Wrap plain-text prompts as one user message in the model's chat template."""
    template_date: Day | None = None
    """Today's date for chat templates that ask for it (`strftime_now`), YYYY-MM-DD. Default: the
    day on which the run began, kept on a resume."""
    limit: Count | None = None
    """Use the first rows only."""
    shuffle: bool = True
    """Draw prompts in a new order, fixed by the seed, every pass over the data."""
    eval_path: PathText | None = None
    """Held-out prompts from another file, folder or hub name."""
    eval_split: str | None = None
    """Held-out prompts from another split of `path`."""
    eval_rows: Natural = 64
    """Held-out prompts: this many of `eval_path` or `eval_split`, or else taken off the end of the
    data before training (with `preset`: of its held-out documents); 0 for none."""

    @model_validator(mode="after")
    def _is_a_date(self) -> DataSettings:
        try:
            date.fromisoformat(self.template_date or "2000-01-01")
        except ValueError:
            raise ValueError(
                f"data.template_date: given {self.template_date!r}, must be a date, YYYY-MM-DD"
            ) from None
        return self

    @model_validator(mode="after")
    def _check_preset(self) -> DataSettings:
        default = {f.name: f.default for f in fields(self)}
        has_preset = self.preset is not None
        for key in default.keys() & {*(_NOT_WITH_PRESET if has_preset else _WITH_PRESET)}:
            unset = {} if key == "columns" else default[key]
            if getattr(self, key) != unset:
                reason = (
                    "preset makes the prompts itself" if has_preset else "it belongs to data.preset"
                )
                raise ValueError(f"data.{key}: given {getattr(self, key)!r}, but {reason}")
        return self


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ImportanceSettings:
    """Truncated importance weights of the policy loss."""

    cap: Annotated[float, Field(ge=1)] = 2.0
    """Largest weight."""


# arguments of engines that change no sample but by rounding
_ENGINE_ARGUMENTS = {
    "transformers": ("batch_size",),
    "vllm": ("address", "timeout_seconds", "on_failure"),
}


def sampling_engine(engine: Spec) -> Spec:
    """An engine without the arguments that change no sample but by rounding."""
    if isinstance(engine, str):
        return engine
    name = engine.get("name")
    without_effect = _ENGINE_ARGUMENTS.get(str(name), ())
    kept = {key: value for key, value in engine.items() if key not in without_effect}
    return str(name) if kept == {"name": name} else kept


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RolloutSettings:
    """Sampling responses."""

    engine: Spec = "transformers"
    """What samples: a name, an import path, or a mapping with `name` and arguments."""
    batch_size: Count = 64
    """Prompts per update, over all ranks."""
    responses_per_prompt: Annotated[int, Field(ge=1, le=2**16)] = 1
    """Responses sampled for each prompt; at least 2 for `rloo` and `grpo`."""
    max_prompt_length: Count = 512
    """Longer prompts lose tokens on their left, and are counted in `prompt_truncated_fraction`."""
    max_new_tokens: Count = 128
    """Length limit of a response, in tokens."""
    min_new_tokens: Natural = 0
    """No EOS before this many tokens, in sampling and in every log-probability alike."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in every log-probability alike."""
    top_k: Natural = 0
    """Sample from the k most likely tokens; 0: from all. Log-probabilities are over all tokens, so
    that the probability of tokens that are never drawn drifts: keep a KL penalty."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this probability. See `top_k`."""
    stop_strings: list[Text] = Field(default_factory=list)
    """Also stop at these; their tokens stay in the response, which counts as finished."""
    skip_special_tokens: bool = False
    """Leave all special tokens out of the text that rewards, segmenters and samples see. By default
    only EOS and padding at its end are, so that <think> or <tool_call> are there."""
    micro_batch_size: Count | None = None
    """Sequences in one log-prob pass; default: those of a training pass, so that old and new
    log-probabilities come from batches of the same shape (in bf16 other shapes round otherwise)."""
    old_logprobs: Literal["recompute", "engine"] = "recompute"
    """Denominator of the ratio: log-probabilities of the policy's own pass, or those that the
    engine sampled with (after `top_k` and `top_p`). KL and entropy are of the policy in both."""
    importance: ImportanceSettings | None = None
    """Weigh each term of the policy loss by min(policy / engine, `cap`), which corrects for an
    engine that rounds otherwise and for `top_k` and `top_p`; null: not at all."""
    ahead: Annotated[int, Field(ge=0, le=1)] = 0
    """Updates that sampling is ahead of training. 1: servers sample the next update's responses
    while this one trains, with weights one update old; needs `importance` or
    `old_logprobs: engine`."""

    @property
    def needs_sampling_logprobs(self) -> bool:
        """Whether the update needs the log-probabilities that the engine sampled with."""
        return self.importance is not None or self.old_logprobs == "engine"

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and response."""
        return self.max_prompt_length + self.max_new_tokens


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RewardSettings:
    """Sources of scores, and their processing."""

    models: Spec | list[Spec] = Field(default_factory=list)
    """A reward-model path, a reward's name, an import path, a mapping with `name`, arguments and
    `weight`, or a list of these, added up. Must be given, unless Python code passes `reward`."""
    tokens: Spec | list[Spec] = Field(default_factory=list)
    """Rewards that look inside the policy, token by token: `curiosity`, an import path, a mapping
    with `name`, arguments and `weight`, or a list of these. They are added to the others, unclipped
    and unwhitened, and are no part of the score."""
    clip: Positive | None = None
    """Clip scores to [-clip, clip]."""
    whiten: bool = False
    """Divide scores by their standard deviation over the batch, after subtracting the mean."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the score of a response cut at the length limit."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class AdamWSettings:
    """AdamW."""

    learning_rate: NonNegative = 1e-6
    """Of the policy, or of the model that the job trains."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to 0 over the run, or none."""
    warmup_steps: Natural = 0
    """Updates over which the learning rate rises from 0."""
    micro_batch_size: Count = 8
    """Sequences in one forward and backward pass on a rank; gradients accumulate over the batch of
    an optimiser step."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient norm, of policy and critic separately."""
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: [0.9, 0.95]
    )
    """Adam's decay rates."""
    eps: Positive = 1e-5
    """Adam's epsilon."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_skipped_steps: Count = 5
    """Optimiser steps whose loss or gradient is not finite are skipped; stop after this many
    consecutive ones, the last batch saved in output_dir."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class OptimizerSettings(AdamWSettings):
    """AdamW for policy and critic."""

    critic_learning_rate: NonNegative | None = None
    """Of the critic; default: the policy's."""

    @property
    def critic_rate(self) -> float:
        """The critic's learning rate."""
        rate = self.critic_learning_rate
        return self.learning_rate if rate is None else rate


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MetricsSettings:
    """Outputs of a run in addition to metrics.jsonl."""

    eval_every: Natural = 10
    """Evaluate on held-out rows every this many updates, and before the first and after the
    last; 0: never."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases (install `marlhf[wandb]`)."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class LogSettings(MetricsSettings):
    """Outputs of a run in addition to metrics.jsonl."""

    samples: Natural = 4
    """Responses per update written to samples.jsonl."""
    rollouts_every: Natural = 0
    """Keep whole rollouts of every this many updates in rollouts/, for `marlhf replay`: some 40
    bytes for each token, padding included; 0: never."""
    warnings: bool = True
    """Print a line when metrics show that training goes wrong; docs/metrics.md lists the signs."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CheckpointSettings:
    """Checkpoints, from which a stopped run resumes."""

    every: Natural = 50
    """Write a checkpoint every this many updates, after the last one, and when SIGTERM or Ctrl-C
    stops the run; 0: never."""
    keep: Count = 2
    """Number of recent checkpoints to keep."""
    keep_best: bool = True
    """Also keep the one with the highest held-out score (of `sft` and `reward`: the lowest held-out
    loss); only checkpoints of an evaluated step have one, so let `log.eval_every` divide
    `every`."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TrainingConfig:
    """Keys that every job which trains has; their order is that of `--help`."""

    model: ModelSettings
    data: DataSettings = Field(default_factory=DataSettings)
    output_dir: NonEmptyPath
    overwrite: bool = False
    """Start again in an output_dir that already holds a run, deleting its files."""
    resume: NonEmptyPath | None = None
    """`auto`: resume from the latest complete checkpoint in output_dir, or begin where there is no
    run; a path: resume from that checkpoint; null: refuse an output_dir that holds a run."""
    resume_changed: bool = False
    """Resume from a checkpoint although data, weights or code of plug-ins have changed since."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Fixes every random draw."""
    distributed_timeout_minutes: Minutes = 360
    """How long a rank waits for the others, as while one writes a checkpoint, before the run
    fails."""

    @model_validator(mode="after")
    def _overwrite_or_resume(self) -> TrainingConfig:
        if self.resume is not None and self.overwrite:
            raise ValueError(
                f"resume: given {self.resume!r} with overwrite=true, which deletes what there is "
                "to resume; give only one of them"
            )
        return self
