"""The configuration of every job, as typed dataclasses.

The docstring under a field is its line in `marlhf JOB --help`. `config_loading` reads them from
YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from marlhf.config_loading import merge, read_yaml
from marlhf.registry import Spec

_STRICT = ConfigDict(
    extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
)

# torch counts in 64 bits at most, and nobody means a billion of anything
Count = Annotated[int, Field(ge=1, lt=2**31)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(config=_STRICT, frozen=True, kw_only=True)
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


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class ModelSettings:
    """The policy."""

    path: Text
    """A hub name, a directory of safetensors, or a directory with a GGUF file."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the matrix products; trainable weights are fp32 in either case."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraSettings | None = None
    """Train adapters instead of all weights; policy and critic then share one frozen base, and
    the reference is that base with the adapters off."""
    chat_template: str | None = None
    """A Jinja chat template, for a tokenizer that has none."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class CriticSettings:
    """The value function."""

    init: Literal["auto", "policy", "reward"] = "auto"
    """Start from the policy or from the reward model (the paper); `auto`: the reward model where
    one with the policy's vocabulary is given."""
    path: Text | None = None
    """Start from this sequence-classification model instead."""
    warmup_steps: Natural = 0
    """Updates at the start that train the critic alone."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class DataSettings:
    """Prompts: JSONL, JSON, CSV or Parquet file, a `save_to_disk` folder, or a hub name."""

    path: str | None = None
    """File, folder or hub name. Must be given, unless Python code passes `train_dataset`."""
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
    limit: Count | None = None
    """Use the first rows only."""
    shuffle: bool = True
    """Draw prompts in a new order, fixed by the seed, every pass over the data."""
    eval_path: str | None = None
    """Held-out prompts from another file, folder or hub name."""
    eval_split: str | None = None
    """Held-out prompts from another split of `path`."""
    eval_rows: Natural = 64
    """Held-out prompts: this many of `eval_path` or `eval_split`, or else taken off the end of the
    data before training; 0 for none."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class RolloutSettings:
    """Sampling responses."""

    batch_size: Count = 64
    """Prompts an update, over all ranks."""
    responses_per_prompt: Count = 1
    """Responses sampled for each prompt; at least 2 for `rloo` and `grpo`."""
    max_prompt_length: Count = 512
    """Longer prompts lose tokens on their left, and are counted in `prompt_truncated_fraction`."""
    max_new_tokens: Count = 128
    """Length limit of a response, in tokens."""
    min_new_tokens: Natural = 0
    """No EOS before this many tokens."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in every log-probability alike."""
    top_k: Natural = 0
    """Sample from the k most likely tokens; 0: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this probability."""
    stop_strings: list[Text] = Field(default_factory=list)
    """Also stop at these; their tokens stay in the response, which counts as finished."""
    micro_batch_size: Count | None = None
    """Rows in one scoring pass; default: the training micro-batch size times 2."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class RewardSettings:
    """Where scores come from, and what is done to them."""

    models: Spec | list[Spec] = "sentiment"
    """A reward-model path, a reward's name, an import path, a mapping with `name`, arguments and
    `weight`, or a list of these, added up."""
    clip: Positive | None = None
    """Clip scores to [-clip, clip]."""
    whiten: bool = False
    """Divide scores by their standard deviation over the batch, after subtracting the mean."""
    missing_eos_penalty: NonNegative = 0.0
    """Taken off the score of a response cut at the length limit."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class MacroSettings:
    """From tokens to macro actions, and back."""

    value: Literal["equal", "position", "last", "first"] = "equal"
    """Value of a macro action: weighted mean of its tokens' values."""
    reward: Literal["sum", "mean"] = "sum"
    """Rewards inside a macro action: discounted sum, or (the released code) KL rewards averaged
    with the value weights and task rewards added. Compare the two at equal KL."""
    discount: Literal["per_token", "per_macro"] = "per_token"
    """Discount over a macro action of length w: gamma^w, or gamma."""
    ratio: Literal["token", "macro_mean", "macro_product"] = "token"
    """Probability ratio of the policy loss: of each token, geometric mean over the macro action,
    or product over it."""
    whiten: Literal["auto", "macro", "token", "none"] = "auto"
    """Whiten advantages over all ranks, counting each macro action once or by its tokens;
    `auto`: `macro` with a critic, `none` without."""
    value_loss: Literal["token", "macro"] = "token"
    """Regress every token's value on its macro action's return, or the macro action's value."""
    last_token_alone: bool = False
    """Make the last token a macro action of its own, as the released code does."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class PPOSettings:
    """Advantages and the policy update."""

    estimator: Literal["gae", "rloo", "grpo", "reinforce"] = "gae"
    """`gae` trains a critic; the others compare responses and load none."""
    gamma: Fraction = 1.0
    """Discount a token (or a macro action, see `macro.discount`)."""
    lam: Fraction = 0.95
    """GAE lambda, over macro actions."""
    bootstrap_truncated: bool = False
    """Use the critic's value after the last token of a response cut at the limit; else 0."""
    epochs: Count = 1
    """Passes over each rollout."""
    minibatches: Count = 1
    """Optimiser steps in a pass."""
    clip_range: Positive = 0.2
    """The ratio is clipped to [1 - clip_range, 1 + clip_range]."""
    value_clip_range: Positive | None = 0.2
    """Values are clipped to this distance from the old ones; null: not at all."""
    logprob_temperature: Literal["sampling", "one"] = "sampling"
    """Temperature of log-probabilities: that of sampling, or 1 (the released code)."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class KLSettings:
    """The leash to the reference policy."""

    coef: NonNegative = 0.05
    """Weight of the KL penalty."""
    where: Literal["auto", "reward", "loss"] = "auto"
    """`reward`: -coef * log(pi/ref) on each token (k1); `loss`: coef times the k3 estimate;
    `auto`: `loss` for grpo, `reward` otherwise."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW for policy and critic."""

    learning_rate: NonNegative = 1e-6
    """Of the policy."""
    critic_learning_rate: NonNegative | None = None
    """Of the critic; default: the policy's."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to 0 over the run, or none."""
    warmup_steps: Natural = 0
    """Updates over which the learning rate rises from 0."""
    micro_batch_size: Count = 8
    """Rows in one forward and backward pass on a rank; gradients accumulate over the minibatch."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient norm of policy and critic, each by itself."""
    betas: Annotated[list[Decay], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: [0.9, 0.95]
    )
    """Adam's decay rates."""
    eps: Positive = 1e-5
    """Adam's epsilon."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class LogSettings:
    """What a run writes besides metrics.jsonl."""

    samples: Natural = 4
    """Responses an update written to samples.jsonl."""
    eval_every: Natural = 10
    """Evaluate on held-out prompts every this many updates, and before the first and after the
    last; 0: never."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases (install `marlhf[wandb]`)."""
    progress: bool = True
    """Show a progress bar."""


# Without a critic every macro action of a response has the same advantage, and these have no say.
_OF_THE_CRITIC = (
    "critic.init",
    "critic.path",
    "critic.warmup_steps",
    "macro.value",
    "macro.reward",
    "macro.discount",
    "macro.value_loss",
    "ppo.gamma",
    "ppo.lam",
    "ppo.bootstrap_truncated",
    "ppo.value_clip_range",
    "optimizer.critic_learning_rate",
)


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class PPOConfig:
    """Everything a `marlhf ppo` run needs."""

    model: ModelSettings
    """The policy."""
    data: DataSettings = Field(default_factory=DataSettings)
    """The prompts."""
    preset: Literal["reference"] | None = None
    """`reference`: the formulas of the paper's released code; other keys still override it."""
    output_dir: Text = "runs/ppo"
    """Where the run writes."""
    overwrite: bool = False
    """Start again in an output_dir that already holds a run, deleting its files."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    """Fixes every random draw."""
    steps: Count = 100
    """PPO updates."""
    segmenter: Spec = "ngram"
    """What a macro action is: a name, an import path, or a mapping with `name` and arguments."""
    critic: CriticSettings = Field(default_factory=CriticSettings)
    """The value function; estimators other than `gae` have none and use nothing of this."""
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    """Sampling."""
    reward: RewardSettings = Field(default_factory=RewardSettings)
    """Scores."""
    kl: KLSettings = Field(default_factory=KLSettings)
    """The leash."""
    macro: MacroSettings = Field(default_factory=MacroSettings)
    """Macro actions."""
    ppo: PPOSettings = Field(default_factory=PPOSettings)
    """The update."""
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    """AdamW."""
    log: LogSettings = Field(default_factory=LogSettings)
    """Outputs."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        values = dict(given.kwargs or {}) if isinstance(given, ArgsKwargs) else given
        if not isinstance(values, Mapping) or not isinstance(values.get("preset"), str):
            return given
        path = Path(__file__).parent / "presets" / f"{values['preset']}.yaml"
        if not path.is_file():
            return given  # the field's own check names what is possible
        preset = read_yaml(path)
        for section in preset.keys() & values.keys():
            if is_dataclass(values[section]):
                raise ValueError(
                    f"{section}: given as an object, of which preset={values['preset']!r} cannot "
                    "tell what to keep; give one of the two, or use config_from_dict"
                )
        return merge(preset, values)

    @model_validator(mode="after")
    def _cross_checks(self) -> PPOConfig:
        if self.rollout.batch_size % self.ppo.minibatches:
            raise ValueError(
                f"ppo.minibatches: given {self.ppo.minibatches}, must divide "
                f"rollout.batch_size={self.rollout.batch_size}, the prompts of an update"
            )
        grouped = self.ppo.estimator in ("rloo", "grpo")
        if grouped and self.rollout.responses_per_prompt < 2:
            raise ValueError(
                f"rollout.responses_per_prompt: given {self.rollout.responses_per_prompt}, must be "
                f"at least 2 for ppo.estimator={self.ppo.estimator}"
            )
        for key in _OF_THE_CRITIC if self.ppo.estimator != "gae" else ():
            section_name, name = key.split(".")
            section = getattr(self, section_name)
            given = getattr(section, name)
            if given != getattr(type(section)(), name):
                raise ValueError(
                    f"{key}: given {given!r}, but ppo.estimator={self.ppo.estimator} has no critic "
                    "and does not use it; leave it out"
                )
        if self.critic.path is not None and self.critic.init != "auto":
            raise ValueError(
                f"critic.init: given {self.critic.init!r} beside critic.path; give only one of them"
            )
        if self.rollout.min_new_tokens > self.rollout.max_new_tokens:
            raise ValueError(
                f"rollout.min_new_tokens: given {self.rollout.min_new_tokens}, must not exceed "
                f"rollout.max_new_tokens={self.rollout.max_new_tokens}"
            )
        return self
