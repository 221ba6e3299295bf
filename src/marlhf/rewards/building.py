"""Builds rewards from a configuration's `reward.models` or from Python objects."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from marlhf.common.errors import UserError
from marlhf.common.paths import local_path
from marlhf.common.registry import (
    Registry,
    Spec,
    check_names,
    construct,
    import_path,
    plugin_name,
    split_spec,
    without_arguments,
)
from marlhf.rewards.base import CombinedReward, NamedReward
from marlhf.rewards.calls import RewardFn, column_parameters

_REWARD_MODEL = "marlhf.rewards.learned.RewardModel"  # which needs transformers

REWARDS = Registry(
    kind="reward",
    group="marlhf.rewards",
    factories={
        "sentiment": "marlhf.rewards.text.Sentiment",
        "length": "marlhf.rewards.text.Length",
        "regex": "marlhf.rewards.text.Regex",
        "keyword": "marlhf.rewards.text.Keyword",
        "rouge": "marlhf.rewards.overlap.Rouge",
        "per_segment": "marlhf.rewards.segments.PerSegment",
        "embedding_similarity": "marlhf.rewards.overlap.EmbeddingSimilarity",
        "code": "marlhf.rewards.code.Code",
    },
)


def build_rewards(spec: Any) -> CombinedReward:
    """Build rewards from a configuration's `reward.models`, Python objects, or a mix of both.

    spec: a name, a path, an import path, a mapping with `name` (or a path), arguments and `weight`,
    a callable, a `(reward, weight)` pair, or a list of these. Raises UserError.
    """
    if isinstance(spec, CombinedReward):
        return spec
    specs = [spec] if not isinstance(spec, list | tuple) or is_pair(spec) else list(spec)
    if not specs:
        raise UserError(
            "reward.models: missing; must be a reward's name, a reward model's path, an import "
            "path, or a list of these"
        )
    rewards: list[NamedReward] = []
    for reward in map(_build, specs):
        name = free_name(reward.name, [r.name for r in rewards])
        rewards.append(NamedReward(name, reward.function, reward.weight))
    return CombinedReward(tuple(rewards))


def reward_models(spec: Spec | list[Spec]) -> list[dict[str, Any]]:
    """Arguments, `path` included, of every `RewardModel` in a configuration's `reward.models`.

    Those inside `per_segment` are in `segment_reward_models`. Builds nothing, and checks what needs
    no files, such as the names of other rewards. Raises UserError.
    """
    models = []
    factory = import_path(_REWARD_MODEL, "reward")
    for model_spec in spec if isinstance(spec, list) else [spec]:
        name, arguments = split_spec(model_spec, "reward")
        if _is_model_path(name):
            weight_of(arguments.pop("weight", 1.0))
            arguments, where = {"path": name, **arguments}, f"reward {name}"
            check_names(factory, arguments, where)
            try:
                factory.check_sizes(**arguments)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            models.append(arguments)
        elif "." not in name:  # what an import path names may need what is elsewhere
            REWARDS.find(name)
    return models


def segment_reward_models(spec: Spec | list[Spec]) -> list[dict[str, Any]]:
    """Arguments of every `RewardModel` inside a `per_segment`, at any depth, likewise."""
    models = []
    for model_spec in spec if isinstance(spec, list) else [spec]:
        name, arguments = split_spec(model_spec, "reward")
        if name == "per_segment":
            arguments.pop("weight", None)
            check_names(REWARDS.find(name), arguments, f"reward {name}")
            inner = arguments["reward"]
            models += [*reward_models(inner), *segment_reward_models(inner)]
    return models


def free_name(name: str, taken: Sequence[str]) -> str:
    """The name, with a suffix `_2`, `_3`, ... if it is taken."""
    names = (f"{name}_{i}" if i > 1 else name for i in range(1, len(taken) + 2))
    return next(n for n in names if n not in taken)


def is_pair(spec: Any) -> bool:
    """Whether a spec is `(reward, weight)`."""
    return isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[1], Real)


def _build(spec: Any) -> NamedReward:
    """Build one reward from one spec."""
    if is_pair(spec):
        reward, weight = _build(spec[0]), weight_of(spec[1])
        return NamedReward(reward.name, reward.function, reward.weight * weight)
    if isinstance(spec, str | dict):
        name, arguments = split_spec(spec, "reward")
        weight = weight_of(arguments.pop("weight", 1.0))
        return NamedReward(*_from_name(name, arguments), weight)
    if not callable(spec):
        raise UserError(
            f"reward: given {spec!r}, must be a name, a path, a mapping, a callable, or a pair of "
            "one of these and its weight"
        )
    if _reads_token_ids(spec):
        raise UserError(
            f"reward: given a {type(spec).__name__}, which reads token ids; must be its path (of "
            "save_pretrained, tokenizer included), or a function of prompts and completions"
        )
    function = construct(spec, {}, f"reward {spec.__name__}") if isinstance(spec, type) else spec
    return NamedReward(_function_name(function), function)


def _reads_token_ids(spec: Any) -> bool:
    """Whether an object is called as models of transformers and peft are."""
    forward = getattr(spec, "forward", None)
    if isinstance(spec, type) or not callable(forward):
        return False
    try:
        return "input_ids" in inspect.signature(forward).parameters
    except (TypeError, ValueError):  # Python cannot inspect it
        return False


def weight_of(weight: Any) -> float:
    """Check a weight and convert it to float. Raises UserError."""
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise UserError(f"reward: weight: given {weight!r}, must be a finite number")
    return float(weight)


def _from_name(name: str, arguments: dict[str, Any]) -> tuple[str, RewardFn]:
    """Resolve a directory, registered name, import path or hub name, in this order."""
    if _is_model_path(name):
        factory = import_path(_REWARD_MODEL, "reward")
        model = construct(factory, {"path": name, **arguments}, f"reward {name}")
        return local_path(name, "reward").resolve().name, model
    reward = REWARDS.find(name)
    if isinstance(reward, type):
        reward = construct(reward, arguments, f"reward {name}")
    elif arguments:
        reward = _bind(reward, arguments, name)
    return name.rpartition(".")[2], reward


def _is_model_path(name: str) -> bool:
    """Whether a name is a model's directory or hub name.

    Raises UserError for a path that does not exist.
    """
    folder = local_path(name, "reward")
    if name and folder.is_dir():
        # a folder that happens to be named `length` does not hide the reward of that name
        return (folder / "config.json").is_file() or name not in REWARDS.names()
    if name.startswith((".", "/", "~")):
        raise UserError(f"reward: given {name!r}, which is not a directory that exists")
    return "/" in name


def _bind(function: Any, arguments: dict[str, Any], name: str) -> RewardFn:
    """Bind a function's arguments from YAML."""
    parameters = column_parameters(function)
    names = [p.name for p in parameters if p.kind != p.VAR_KEYWORD]
    takes_any = len(names) < len(parameters)
    unknown = [a for a in arguments if a not in names]
    if unknown and not takes_any:
        raise UserError(
            f"reward {name}: given {', '.join(unknown)}; its parameters are "
            f"{', '.join(names) or 'none'}"
        )
    return functools.partial(function, **arguments)


def _function_name(function: Any) -> str:
    """A built-in reward's short name, else a function's name, else that of the class."""
    function = without_arguments(function)
    path = f"{type(function).__module__}.{type(function).__qualname__}"
    short = {path: name for name, path in REWARDS.factories.items()}.get(path)
    return short or plugin_name(function)
