"""The configuration of `marlhf ppo`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from marlhf.common.registry import Spec
from marlhf.config.loading import merge, read_yaml
from marlhf.config.sections import (
    STRICT,
    CheckpointSettings,
    Count,
    DataSettings,
    Fraction,
    LogSettings,
    Minutes,
    ModelSettings,
    Natural,
    NonNegative,
    OptimizerSettings,
    Place,
    Positive,
    RewardSettings,
    RolloutSettings,
    Text,
    check_resume,
)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CriticSettings:
    """The value function."""

    init: Literal["auto", "policy", "reward"] = "auto"
    """Start from the policy or from the reward model (the paper); `auto`: the reward model where
    one is given that is a decoder with the policy's tokens, and with `model.lora` only one that is
    an adapter of the same base (any other would be a second model in memory: ask for it by
    `reward`). The run says which it was."""
    path: Place | None = None
    """Start from this sequence-classification model instead."""
    warmup_steps: Natural = 0
    """Updates at the start that train the critic alone."""
    backbone: Literal["own", "policy"] = "own"
    """`policy`: the value head reads the policy's last hidden states, and one pass and one step
    minimise the policy's loss plus `coef` times the critic's, whose gradient moves the policy's
    weights (or adapter) too. Half the time and memory of training, but no critic of its own."""
    coef: Positive = 0.1
    """Weight of the critic's loss beside the policy's, for `backbone: policy`."""


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
    target_kl: Positive | None = None
    """Take no further policy step in an update once `approx_kl`, the new policy's KL from the one
    that sampled, is above this (nats) at the start of a step; a critic that is no head on the
    policy goes on."""


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
    """Steer the coefficient, which starts at `coef`, so that `kl_mean` (nats a response) stays
    here."""
    horizon: Count = 10_000
    """Responses over which the coefficient may change by 20%; for `target`."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PTXSettings:
    """Mix language modelling of other texts into every policy step (InstructGPT's PPO-ptx)."""

    path: Place
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
    """Tokens in a row. A longer text is cut at the end, a prompt before it on the left."""
    batch_size: Count = 8
    """Rows in a policy step, over all ranks."""
    coef: Positive = 1.0
    """Weight of their loss (nats a token) beside the policy's loss."""


_MOST_RESPONSES = 2**20  # an update keeps all of them in memory

# Without a critic every macro action of a response has the same advantage, and these have no say.
_OF_THE_CRITIC = (
    "critic.init",
    "critic.path",
    "critic.warmup_steps",
    "critic.backbone",
    "critic.coef",
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


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PPOConfig:
    """Everything a `marlhf ppo` run needs."""

    model: ModelSettings
    """The policy."""
    data: DataSettings = Field(default_factory=DataSettings)
    """The prompts."""
    preset: Literal["reference"] | None = None
    """`reference`: the formulas of the paper's released code; other keys still override it."""
    output_dir: Place = "runs/ppo"
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
    """KL penalty."""
    macro: MacroSettings = Field(default_factory=MacroSettings)
    """Macro actions."""
    ppo: PPOSettings = Field(default_factory=PPOSettings)
    """The update."""
    ptx: PTXSettings | None = None
    """Language modelling of other texts beside PPO."""
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    """AdamW."""
    log: LogSettings = Field(default_factory=LogSettings)
    """Outputs."""
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    """Checkpoints."""

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
        check_resume(self.resume, self.overwrite)
        if self.rollout.batch_size % self.ppo.minibatches:
            raise ValueError(
                f"ppo.minibatches: given {self.ppo.minibatches}, must divide "
                f"rollout.batch_size={self.rollout.batch_size}, the prompts of an update"
            )
        if self.rollout.batch_size * self.rollout.responses_per_prompt > _MOST_RESPONSES:
            raise ValueError(
                f"rollout.batch_size: given {self.rollout.batch_size}, with "
                f"rollout.responses_per_prompt={self.rollout.responses_per_prompt} must make at "
                f"most {_MOST_RESPONSES} responses an update"
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
        self._check_kl()
        self._check_backbone()
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

    def _check_backbone(self) -> None:
        critic = self.critic
        if critic.backbone == "own":
            if critic.coef != CriticSettings.coef:
                raise ValueError(
                    f"critic.coef: given {critic.coef:g}, but a critic with its own backbone has "
                    "a step of its own; leave it out, or set critic.backbone=policy"
                )
            return
        alone = {
            "critic.init": critic.init == "reward" and critic.init,
            "critic.path": critic.path,
            "critic.warmup_steps": critic.warmup_steps,
            "optimizer.critic_learning_rate": self.optimizer.critic_learning_rate,
        }
        for key, given in alone.items():
            if given not in (None, False, 0):
                raise ValueError(
                    f"{key}: given {given!r}, but with critic.backbone=policy the critic is a head "
                    "on the policy, which starts at 0 and steps with it; leave it out"
                )

    def _check_kl(self) -> None:
        kl, responses = self.kl, self.rollout.batch_size * self.rollout.responses_per_prompt
        if kl.target is None and kl.horizon != KLSettings.horizon:
            raise ValueError(
                f"kl.horizon: given {kl.horizon}, but without kl.target the coefficient is fixed"
            )
        if kl.target is not None and kl.coef == 0:
            raise ValueError("kl.coef: given 0 beside kl.target; it is where the steering starts")
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
    def sampled_from(self) -> dict[str, Any]:
        """What makes the distribution of every log-probability, as arguments of `Policy`."""
        one = self.ppo.logprob_temperature == "one"
        temperature = 1.0 if one else self.rollout.temperature
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
    def has_critic_model(self) -> bool:
        """Whether the critic is a model beside the policy."""
        return self.ppo.estimator == "gae" and not self.has_head

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL penalty is part of the policy's loss, and not of the rewards."""
        if self.kl.where == "auto":
            return self.ppo.estimator == "grpo"
        return self.kl.where == "loss"
