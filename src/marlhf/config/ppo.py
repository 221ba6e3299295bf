"""The configuration of `marlhf ppo`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from marlhf.common.registry import Spec, split_spec
from marlhf.compat.pydantic import call_arguments
from marlhf.config.loading import merge, read_yaml
from marlhf.config.sections import (
    STRICT,
    CheckpointSettings,
    Count,
    DataSettings,
    Fraction,
    LogSettings,
    ModelSettings,
    Natural,
    NonEmptyPath,
    NonNegative,
    OptimizerSettings,
    Positive,
    RewardSettings,
    RolloutSettings,
    Text,
    TrainingConfig,
)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CriticSettings:
    """The value function."""

    init: Literal["auto", "policy", "reward"] = "auto"
    """Start from the policy or from the reward model (the paper); `auto`: the reward model, if it
    is a decoder with the policy's tokens and, with `model.lora`, an adapter of the same base (any
    other would be a second model in memory: set `reward` for it), else the policy. The run prints
    its choice."""
    path: NonEmptyPath | None = None
    """Start from this sequence-classification model instead."""
    warmup_steps: Natural = 0
    """Updates at the start that train the critic alone."""
    backbone: Literal["own", "policy"] = "own"
    """`policy`: the value head reads the policy's last hidden states, and one pass and one step
    minimise the policy's loss plus `coef` times the critic's, whose gradient moves the policy's
    weights (or adapter) too. Half the time and memory of training, but no critic of its own."""
    coef: Positive = 0.1
    """Weight of the critic's loss relative to the policy's, for `backbone: policy`."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
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


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PPOSettings:
    """Advantages and the policy update."""

    estimator: Spec = "gae"
    """Advantages: `gae` trains a critic; `rloo`, `grpo`, `reinforce` and `prefix_tree` compare
    responses, `monte_carlo` samples continuations, and none is loaded; an import path, or a mapping
    with `name` and arguments."""
    gamma: Fraction = 1.0
    """Discount per token (or per macro action, see `macro.discount`)."""
    lam: Fraction | Spec = 0.95
    """GAE lambda per macro action: a number, `{name: per_token, lam: 0.99}` (lam^w for w tokens),
    `{name: length_adaptive, alpha: 0.05}` (VAPO), or an import path."""
    critic_lam: Fraction | Spec | None = None
    """Lambda of the critic's targets alone (VC-PPO); null: that of the advantages."""
    bootstrap_truncated: bool = False
    """Use the critic's value after the last token of a response cut at the limit; else 0."""
    epochs: Annotated[Count, Field(le=1000)] = 1
    """Passes over each rollout."""
    minibatches: Count = 1
    """Optimiser steps per pass."""
    redraw_minibatches: bool = False
    """Split the prompts into minibatches anew in every pass after the first; else all passes have
    the same ones, in the same order."""
    clip_range: Positive | Annotated[list[Positive], Field(min_length=2, max_length=2)] = 0.2
    """The ratio is clipped to [1 - clip_range, 1 + clip_range]; two numbers: how far below and
    above 1 (`[0.2, 0.28]`: DAPO's clip-higher)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Where the advantage is negative, the loss grows with the ratio up to this one only; null:
    without bound."""
    aggregate: Literal["token", "response", "constant"] = "token"
    """Policy loss: mean over all tokens; or over the tokens of each response, then over responses
    (GRPO's paper); or sums over responses, divided by `rollout.max_new_tokens` (Dr. GRPO)."""
    entropy_coef: NonNegative = 0.0
    """Weight of an entropy bonus in the policy loss: the policy's entropy before each token, nats,
    averaged as the loss is."""
    weights: Spec | list[Spec] = Field(default_factory=list)
    """Weights of tokens in the policy loss: `low_probability`, `positive`, an import path, a
    mapping with `name` and arguments, or a list of these, multiplied."""
    value_clip_range: Positive | None = 0.2
    """Values are clipped to this distance from the old ones; null: not at all."""
    logprob_temperature: Literal["sampling", "one"] = "sampling"
    """Temperature of log-probabilities: that of sampling, or 1 (the released code)."""
    target_kl: Positive | None = None
    """Stop the policy's steps in an update once `approx_kl`, the new policy's KL from the sampling
    policy, is above this (nats) at the start of a step; a critic with its own backbone
    continues."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class KLSettings:
    """The KL penalty, which keeps the policy near the reference."""

    coef: NonNegative = 0.05
    """Weight of the KL penalty. At 0 there is no reference, and KL metrics are null, unless the
    segmenter or a token reward reads the reference's log-probabilities."""
    where: Literal["auto", "reward", "loss"] = "auto"
    """`reward`: -coef * log(pi/ref) on each token (k1); `loss`: coef times the k3 estimate;
    `auto`: `loss` for grpo, `reward` otherwise."""
    target: Positive | None = None
    """Adapt the coefficient, which starts at `coef`, to keep `kl_mean` (nats per response) at
    this value."""
    horizon: Count = 10_000
    """Responses over which the coefficient may change by 20%; for `target`."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PTXSettings:
    """Mix language modelling of other texts into every policy step (InstructGPT's PPO-ptx)."""

    path: NonEmptyPath
    """The texts: a file, a folder or a hub name, as `data.path`."""
    name: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split to read."""
    limit: Count | None = None
    """Use the first rows only."""
    text_column: Text = "text"
    """Column with the text to model."""
    prompt_column: Text | None = None
    """Column with a prompt that the text completes, which is not modelled itself."""
    max_length: Annotated[int, Field(ge=2, lt=2**31)] = 512
    """Tokens per sequence. A longer text is cut at the end, a prompt before it on the left."""
    batch_size: Count = 8
    """Sequences per policy step, over all ranks."""
    coef: Positive = 1.0
    """Weight of their loss (nats per token) relative to the policy's loss."""


_MOST_RESPONSES = 2**20  # an update keeps all of them in memory

# keys that an estimator without a critic does not use
_CRITIC_KEYS = (
    "critic.init",
    "critic.path",
    "critic.warmup_steps",
    "critic.backbone",
    "critic.coef",
    "macro.value",
    "macro.value_loss",
    "ppo.critic_lam",
    "ppo.bootstrap_truncated",
    "ppo.value_clip_range",
    "optimizer.critic_learning_rate",
)
_MACRO_REWARD_KEYS = ("macro.reward", "macro.discount", "ppo.gamma")
# nor one that gives all macro actions of a response the same advantage
_RESPONSE_LEVEL = (*_CRITIC_KEYS, *_MACRO_REWARD_KEYS, "ppo.lam")


def keys_without_critic(estimator: Spec) -> tuple[str, ...]:
    """Keys that an estimator without a critic does not use. Raises UserError."""
    name, arguments = split_spec(estimator, "ppo.estimator")
    if name == "monte_carlo":
        return (*_CRITIC_KEYS, "ppo.lam")
    if name in ("rloo", "grpo", "reinforce", "prefix_tree"):
        to_go = _MACRO_REWARD_KEYS if arguments.get("return_to_go") else ()
        return tuple(key for key in _RESPONSE_LEVEL if key not in to_go)
    return _CRITIC_KEYS


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PPOConfig(TrainingConfig):
    """Everything a `marlhf ppo` run needs."""

    model: ModelSettings
    """The policy."""
    data: DataSettings = Field(default_factory=DataSettings)
    """The prompts."""
    preset: Literal["paper_code"] | None = None
    """`paper_code`: the formulas of the paper's released code; other keys still override it."""
    output_dir: NonEmptyPath = "runs/ppo"
    """Where the run writes."""
    steps: Count = 100
    """PPO updates."""
    segmenter: Spec = "ngram"
    """Rule of the macro actions: a name, an import path, or a mapping with `name` and arguments."""
    critic: CriticSettings = Field(default_factory=CriticSettings)
    """The value function; estimators other than `gae` have none and use nothing of this."""
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    """Sampling."""
    reward: RewardSettings = Field(default_factory=RewardSettings)
    """Scores."""
    kl: KLSettings = Field(default_factory=KLSettings)
    """KL penalty."""
    macro: MacroSettings = Field(default_factory=MacroSettings)
    """Macro actions."""
    ppo: PPOSettings = Field(default_factory=PPOSettings)
    """The update."""
    ptx: PTXSettings | None = None
    """Language modelling of other texts in addition to PPO (PTX)."""
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    """AdamW."""
    offload: list[Literal["reference", "reward", "optimizer"]] = Field(default_factory=list)
    """What is in the host's memory while it is not used: the reference, reward models, the states
    of AdamW. It comes to the GPU for its phase, over the bus; results are the same."""
    log: LogSettings = Field(default_factory=LogSettings)
    """Outputs."""
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    """Checkpoints."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, arguments: Any) -> Any:
        values = call_arguments(arguments)
        if not isinstance(values, Mapping) or not isinstance(values.get("preset"), str):
            return arguments
        presets = {path.stem: path for path in (Path(__file__).parent / "presets").glob("*.yaml")}
        if values["preset"] not in presets:
            return arguments  # the field's own check names what is possible
        preset = read_yaml(presets[values["preset"]])
        for section in preset.keys() & values.keys():
            if is_dataclass(values[section]):
                raise ValueError(
                    f"{section}: given as an object, which preset={values['preset']!r} cannot "
                    "merge with its own values; give one of the two, or use config_from_dict"
                )
        return merge(preset, values)

    @model_validator(mode="after")
    def _cross_checks(self) -> PPOConfig:
        if self.rollout.old_logprobs == "engine" and self.rollout.importance is not None:
            raise ValueError(
                "rollout.importance: given with rollout.old_logprobs=engine, where the ratio "
                "divides by the engine's probabilities already; leave one of them out"
            )
        if self.rollout.ahead and not self.rollout.needs_sampling_logprobs:
            raise ValueError(
                "rollout.ahead: given 1, which samples with weights one update old; the loss must "
                "know: set rollout.importance={cap: 2} or rollout.old_logprobs=engine"
            )
        if self.rollout.batch_size % self.ppo.minibatches:
            raise ValueError(
                f"ppo.minibatches: given {self.ppo.minibatches}, must divide "
                f"rollout.batch_size={self.rollout.batch_size}, the prompts of an update"
            )
        if self.rollout.batch_size * self.rollout.responses_per_prompt > _MOST_RESPONSES:
            raise ValueError(
                f"rollout.batch_size: given {self.rollout.batch_size}, with "
                f"rollout.responses_per_prompt={self.rollout.responses_per_prompt} must make at "
                f"most {_MOST_RESPONSES} responses per update"
            )
        if self.ppo.redraw_minibatches and 1 in (self.ppo.epochs, self.ppo.minibatches):
            raise ValueError(
                f"ppo.redraw_minibatches: given true with ppo.epochs={self.ppo.epochs} and "
                f"ppo.minibatches={self.ppo.minibatches}; both must be above 1, or there is "
                "nothing to draw anew"
            )
        if fault := self._unused_by_estimator():
            raise ValueError(fault)
        self._check_kl()
        self._check_backbone()
        if "reference" in self.offload and self.model.lora is not None:
            raise ValueError(
                "offload: given 'reference' with model.lora, where the reference is the policy's "
                "base with the adapters off; leave it out"
            )
        if self.critic.path is not None and self.critic.init != "auto":
            raise ValueError(
                f"critic.init: given {self.critic.init!r} with critic.path; give only one of them"
            )
        if self.rollout.min_new_tokens > self.rollout.max_new_tokens:
            raise ValueError(
                f"rollout.min_new_tokens: given {self.rollout.min_new_tokens}, must not exceed "
                f"rollout.max_new_tokens={self.rollout.max_new_tokens}"
            )
        return self

    def _unused_by_estimator(self) -> str | None:
        """A line on a key that a built-in estimator does not use, or lacks."""
        name, _ = split_spec(self.ppo.estimator, "ppo.estimator")
        unused = keys_without_critic(self.ppo.estimator)
        if name == "monte_carlo":
            fault = self.estimator_fault(name, groups=False, unused=unused)
            return fault or self.continuation_fault(name)
        if name in ("rloo", "grpo", "reinforce", "prefix_tree"):
            return self.estimator_fault(name, groups=name != "reinforce", unused=unused)
        return None

    def estimator_fault(
        self, name: str, *, groups: bool, unused: Sequence[str] = _CRITIC_KEYS
    ) -> str | None:
        """A line on what does not fit an estimator without a critic, or None.

        groups   whether it compares the responses to a prompt
        unused   keys that it does not use
        """
        if groups and self.rollout.responses_per_prompt < 2:
            return (
                f"rollout.responses_per_prompt: given {self.rollout.responses_per_prompt}, must be "
                f"at least 2 for ppo.estimator={name}"
            )
        for key in unused:
            section_name, field = key.split(".")
            section = getattr(self, section_name)
            setting = getattr(section, field)
            if setting != getattr(type(section)(), field):
                return (
                    f"{key}: given {setting!r}, but ppo.estimator={name} has no critic and does "
                    "not use it; leave it out"
                )
        return None

    def continuation_fault(self, name: str) -> str | None:
        """A line on what does not fit an estimator that reads continuations, or None."""
        per_macro = self.macro.discount == "per_macro" and self.ppo.gamma < 1
        faults = {
            "reward.whiten=true": ("are another batch to whiten over", self.reward.whiten),
            "reward.tokens": ("have no token rewards", bool(self.reward.tokens)),
            "macro.reward=mean": ("return the sum of their rewards", self.macro.reward == "mean"),
            "macro.discount=per_macro": ("have no macro actions to discount by", per_macro),
        }
        for key, (reason, is_set) in faults.items():
            if is_set:
                return (
                    f"{key}: given with ppo.estimator={name}, whose continuations {reason}; leave "
                    "it out"
                )
        return None

    def _check_backbone(self) -> None:
        critic = self.critic
        if critic.backbone == "own":
            if critic.coef != CriticSettings.coef:
                raise ValueError(
                    f"critic.coef: given {critic.coef:g}, but a critic with its own backbone has "
                    "a step of its own; leave it out, or set critic.backbone=policy"
                )
            return
        unused = {
            "critic.init": "reward" if critic.init == "reward" else None,
            "critic.path": critic.path,
            "critic.warmup_steps": critic.warmup_steps,
            "optimizer.critic_learning_rate": self.optimizer.critic_learning_rate,
        }
        for key, setting in unused.items():
            if setting not in (None, False, 0):
                raise ValueError(
                    f"{key}: given {setting!r}, but with critic.backbone=policy the critic is a "
                    "head on the policy, which starts at 0 and steps with it; leave it out"
                )

    def _check_kl(self) -> None:
        kl, responses = self.kl, self.rollout.batch_size * self.rollout.responses_per_prompt
        if kl.target is None and kl.horizon != KLSettings.horizon:
            raise ValueError(
                f"kl.horizon: given {kl.horizon}, but without kl.target the coefficient is fixed"
            )
        if kl.target is not None and kl.coef == 0:
            raise ValueError(
                "kl.coef: given 0 with kl.target, must be above 0: it is adapted from there"
            )
        if kl.target is not None and kl.horizon < responses:
            raise ValueError(
                f"kl.horizon: given {kl.horizon}, must be at least the {responses} responses of "
                "an update"
            )
        if self.ppo.target_kl is not None and self.ppo.epochs * self.ppo.minibatches == 1:
            raise ValueError(
                f"ppo.target_kl: given {self.ppo.target_kl:g}, but an update has one policy step "
                "alone, which starts at the policy that sampled; raise ppo.epochs or "
                "ppo.minibatches"
            )

    @property
    def logprob_settings(self) -> dict[str, Any]:
        """Arguments of `Policy` that fix the distribution of every log-probability."""
        samples = self.ppo.logprob_temperature == "sampling"
        temperature = self.rollout.temperature if samples else 1.0
        return {"temperature": temperature, "min_tokens": self.rollout.min_new_tokens}

    @property
    def has_head(self) -> bool:
        """Whether the critic is a head on the policy."""
        return self.critic.backbone == "policy"

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the policy reads."""
        return max(self.rollout.longest, 0 if self.ptx is None else self.ptx.max_length)

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL penalty is part of the policy's loss, and not of the rewards."""
        if self.kl.where == "auto":
            return split_spec(self.ppo.estimator, "ppo.estimator")[0] == "grpo"
        return self.kl.where == "loss"
