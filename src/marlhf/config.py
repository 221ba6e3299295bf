"""Typed configuration: dataclasses, strict YAML, dotted overrides.

pydantic checks types, bounds and unknown keys; this module turns its findings into one line each.
The docstring under a field is its line in `marlhf JOB --help`.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from marlhf.registry import Spec
from marlhf.types import UserError

_STRICT = ConfigDict(
    extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
)

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


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

    path: str
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
    """The value function. Ignored by estimators that have none."""

    init: Literal["auto", "policy", "reward"] = "auto"
    """Start from the policy or from the reward model (the paper); `auto`: the reward model where
    one with the policy's vocabulary is given."""
    path: str | None = None
    """Start from this sequence-classification model instead."""
    warmup_steps: Natural = 0
    """Updates at the start that train the critic alone."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class DataSettings:
    """Prompts: JSONL, JSON, CSV or Parquet file, a `save_to_disk` folder, or a hub name."""

    path: str
    """File, folder or hub name."""
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
    stop_strings: list[str] = Field(default_factory=list)
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
    whiten: Literal["macro", "token", "none"] = "macro"
    """Whiten advantages over all ranks, counting each macro action once or by its tokens."""
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
    where: Literal["reward", "loss"] = "reward"
    """`reward`: -coef * log(pi/ref) on each token (k1); `loss`: coef times the k3 estimate."""


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
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(
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


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class PPOConfig:
    """Everything a `marlhf ppo` run needs."""

    model: ModelSettings
    """The policy."""
    data: DataSettings | None = None
    """The prompts (in Python: `train_dataset` may be given instead)."""
    preset: Literal["reference"] | None = None
    """`reference`: the formulas of the paper's released code; other keys still override it."""
    output_dir: str = "runs/ppo"
    """Where the run writes."""
    overwrite: bool = False
    """Start again in an output_dir that already holds a run, deleting its files."""
    seed: int = 0
    """Fixes every random draw."""
    steps: Count = 100
    """PPO updates."""
    segmenter: Spec = "ngram"
    """What a macro action is: a name, an import path, or a mapping with `name` and arguments."""
    critic: CriticSettings = Field(default_factory=CriticSettings)
    """The value function."""
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
        return merge(read_yaml(path), values)

    @model_validator(mode="after")
    def _cross_checks(self) -> PPOConfig:
        rows = self.rollout.batch_size * self.rollout.responses_per_prompt
        if rows % self.ppo.minibatches:
            raise ValueError(
                f"ppo.minibatches: given {self.ppo.minibatches}, must divide the {rows} responses "
                "of an update (rollout.batch_size * rollout.responses_per_prompt)"
            )
        grouped = self.ppo.estimator in ("rloo", "grpo")
        if grouped and self.rollout.responses_per_prompt < 2:
            raise ValueError(
                f"rollout.responses_per_prompt: given {self.rollout.responses_per_prompt}, must be "
                f"at least 2 for ppo.estimator={self.ppo.estimator}"
            )
        if grouped and self.rollout.batch_size % self.ppo.minibatches:
            raise ValueError(
                f"ppo.minibatches: given {self.ppo.minibatches}, must divide "
                f"rollout.batch_size={self.rollout.batch_size} so that no group is split"
            )
        if self.rollout.min_new_tokens > self.rollout.max_new_tokens:
            raise ValueError(
                f"rollout.min_new_tokens: given {self.rollout.min_new_tokens}, must not exceed "
                f"rollout.max_new_tokens={self.rollout.max_new_tokens}"
            )
        return self


Config = TypeVar("Config")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as everybody expects (YAML 1.1 wants 1.0e-5), and in which
    a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if str(key) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(str(key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """YAML text -> plain data; a syntax error becomes one UserError line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {str(path)!r} cannot be read: {error}") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold `key: value` lines, holds a {type(values).__name__}")
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, mapping by mapping; a mapping that changes its `name` replaces."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            changes_name = "name" in value and value["name"] != below.get("name")
            value = dict(value) if changes_name else merge(below, value)
        merged[key] = value
    return merged


def override(
    values: dict[str, Any], assignment: str, defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Apply one `key.sub=value`; the value is read as YAML.

    A name may be opened up: after `segmenter: ngram` (written, or by default), `segmenter.n=3`
    makes it `{name: ngram, n: 3}`.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"override {assignment!r}: must look like key.sub=value")
    value = parse_yaml(text, f"override {assignment!r}")
    *parents, leaf = key.split(".")
    result = dict(values)
    node = result
    for depth, part in enumerate(parents, 1):
        child = node.get(part, (defaults or {}).get(".".join(parents[:depth])))
        child = {"name": child} if isinstance(child, str) else child
        if child is not None and not isinstance(child, dict):
            raise UserError(f"override {assignment!r}: {part!r} is {child!r} and has no sub-keys")
        node[part] = dict(child or {})
        node = node[part]
    node[leaf] = value
    return result


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides, check everything.

    Raises UserError with one line that names the key, what was given and what is possible.
    """
    values = read_yaml(path)
    names = {f.key: json.loads(f.default) for f in config_fields(cls) if f.default[:1] == '"'}
    for assignment in overrides:
        values = override(values, assignment, names)
    return config_from_dict(cls, values)


def config_from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Plain data -> configuration; raises UserError."""
    try:
        return TypeAdapter(cls).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise UserError(_explain(cls, error)) from None


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain data that `config_from_dict` reads back."""
    return json.loads(json.dumps(asdict(config)))


def _explain(cls: Any, error: ValidationError) -> str:
    """The first, most telling finding as one line."""
    findings = error.errors()
    unknown = [f for f in findings if f["type"] == "unexpected_keyword_argument"]
    finding = (unknown or findings)[0]
    fields = {field.key: field for field in config_fields(cls)}
    location = [str(part) for part in finding["loc"]]
    key = ".".join(location)
    while key not in fields and not unknown and len(location) > 1:
        location.pop()  # pydantic adds the union member or list index that it tried
        key = ".".join(location)
    if unknown:
        siblings = _siblings(fields, location[:-1])
        close = difflib.get_close_matches(location[-1], siblings, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{key}: unknown key; {hint}Possible: {', '.join(siblings)}"
    if finding["type"] == "missing":
        return f"{key}: missing; it must be given ({fields[key].description})"
    if finding["type"] == "value_error":
        message = str(finding["ctx"]["error"])
        return f"{key}: {message}" if key else message
    given = finding["input"]
    shown = json.dumps(given) if not isinstance(given, str) else repr(given)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    message = finding["msg"].removeprefix("Input should be ")
    if key in fields and finding["type"] != "literal_error":
        alternatives = {
            f["msg"].removeprefix("Input should be ")
            for f in findings
            if [str(p) for p in f["loc"]][: len(location)] == location
        }
        message = " or ".join(sorted(alternatives))
    return f"{key}: given {shown}; must be {message}"


def _siblings(fields: Mapping[str, ConfigField], parent: Sequence[str]) -> list[str]:
    prefix = "".join(f"{p}." for p in parent)
    below = {k.removeprefix(prefix).split(".")[0] for k in fields if k.startswith(prefix)}
    return sorted(below - {""})


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class ConfigField:
    """One line of `--help`: dotted key, type, default as YAML, meaning."""

    key: str
    type: str
    default: str
    description: str


def config_fields(cls: Any, prefix: str = "") -> Iterator[ConfigField]:
    """Every key of a configuration class, sections before their keys."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for name, field in cls.__pydantic_fields__.items():
        key = f"{prefix}{name}"
        nested = _nested(hints[name])
        if field.is_required():
            default = "required"
        elif nested:
            default = ""
        else:
            value = field.get_default(call_default_factory=True)
            default = json.dumps(value)
        description = " ".join((field.description or "").split())
        shown = "section" if nested else _type_name(hints[name], field)
        yield ConfigField(key, shown, default, description)
        if nested:
            yield from config_fields(nested, f"{key}.")


def _nested(hint: Any) -> Any:
    """The settings class inside `X` or `X | None`, if there is one."""
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and is_dataclass(part):
            return part
    return None


def _type_name(hint: Any, field: Any = None) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        base = _type_name(arguments[0])
        return base + _bounds(arguments[1:])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        names = [_type_name(a) for a in arguments if a is not type(None)]
        null = ["null"] if type(None) in arguments else []
        return " or ".join(names + null)
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    return {str: "text", int: "int", float: "float", bool: "true|false"}.get(hint, str(hint))


def _bounds(metadata: Sequence[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = []
    for item in metadata:
        for constraint in (item, *getattr(item, "metadata", ())):
            found += [
                f" {sign}{getattr(constraint, name):g}"
                for name, sign in signs.items()
                if isinstance(getattr(constraint, name, None), int | float)
            ]
    return "".join(found)
