"""The reward contract, and the weighted sum of several rewards.

A reward is any callable

    reward(prompts: list[str], completions: list[str], **columns) -> list

with one entry per row: a number, None ("not applicable to this row"), or a list of
`(end_char, number)` pairs, rewards inside the response that land on the token that writes the
response's character `end_char - 1`. `columns` holds the dataset's other columns, each a list with
one entry per row; a callable without `**kwargs` gets only the columns that its signature names.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from marlhf.common.paths import local_path
from marlhf.common.plugins import called
from marlhf.common.registry import Registry, Spec, construct, import_path, split_spec
from marlhf.common.tokenization import Span
from marlhf.common.types import UserError
from marlhf.rewards.calls import (
    Columns,
    Pairs,
    RewardFn,
    column_parameters,
    evaluate,
    needed_columns,
    texts_by_place,
)

Shard = Callable[[Any, Any], Any]

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


@runtime_checkable
class Shardable(Protocol):
    """A reward whose model can be sharded over the ranks."""

    def shard(self, shard: Shard) -> None:
        """Shard the model with `shard(model, backbone)`; see `Distributed.shard`."""


@dataclass(frozen=True)
class RewardResult:
    """Rewards of a batch of B responses.

    scores   [B] weighted sum of each response's scalar rewards; 0.0 where there is none
    spans    [B] each response's weighted `(end_char, reward)` pairs, for `place_spans`
    by_name  unweighted values of each reward, None where not applicable; rewards inside a
             response are summed
    """

    scores: list[float]
    spans: list[Pairs]
    by_name: dict[str, list[float | None]]

    @property
    def unscored(self) -> list[int]:
        """Indices of responses to which no reward applied: their score of 0.0 means nothing."""
        columns = list(self.by_name.values())
        return [i for i in range(len(self.scores)) if all(c[i] is None for c in columns)]


@dataclass(frozen=True)
class NamedReward:
    """A reward, its weight, and its name in messages and metrics."""

    name: str
    function: RewardFn
    weight: float = 1.0


@dataclass(frozen=True)
class CombinedReward:
    """A weighted sum of rewards.

    A row for which every reward returns None scores 0.0 rather than stopping the run, as mixtures
    of datasets have such rows. `RewardResult.unscored` lists them.
    """

    rewards: tuple[NamedReward, ...]

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Columns | None = None
    ) -> RewardResult:
        """Score B responses.

        Raises RewardError where a reward raises or returns an invalid value, and UserError where
        it needs a missing column.
        """
        prompts, completions, columns = list(prompts), list(completions), dict(columns or {})
        self.check_columns(columns)
        scores = [0.0] * len(prompts)
        spans: list[Pairs] = [[] for _ in prompts]
        by_name: dict[str, list[float | None]] = {}
        for reward in self.rewards:
            values = evaluate(reward.name, reward.function, prompts, completions, columns)
            by_name[reward.name] = [_total(value) for value in values]
            for row, value in enumerate(values):
                if isinstance(value, list):
                    spans[row] += [(end, reward.weight * x) for end, x in value]
                elif value is not None:
                    scores[row] += reward.weight * value
        return RewardResult(scores, spans, by_name)

    def check_columns(self, available: Iterable[str]) -> None:
        """Raise UserError where a reward's parameters do not fit the data's columns.

        It needs a missing column, or the parameter for its prompts or completions is named like a
        column.
        """
        available = sorted(available)
        for reward in self.rewards:
            for column in texts_by_place(reward.function):
                if column in available:
                    raise UserError(
                        f"reward {reward.name}: its parameter {column!r} is given prompts or "
                        f"completions, but the data has a column {column!r} too; call the two "
                        "`prompts` and `completions`"
                    )
            for column in needed_columns(reward.function):
                if column not in available:
                    raise UserError(
                        f"reward {reward.name}: needs the column {column!r}; the data's other "
                        f"columns are {', '.join(available) or 'none'}"
                    )

    def load(self, shard: Shard | None = None) -> CombinedReward:
        """Load every model now rather than at first use. Raises UserError.

        shard   shards a frozen model over the ranks, as `Distributed.shard`
        """
        for reward in self.rewards:
            with called(f"reward {reward.name}"):
                if callable(load := getattr(reward.function, "load", None)):
                    try:
                        load()
                    except UserError as error:
                        raise UserError(f"reward {reward.name}: {error}") from error
            if shard is not None and isinstance(reward.function, Shardable):
                reward.function.shard(shard)
        return self

    def share(self, policy: Any, base: str) -> None:
        """Run reward models that are adapters of the policy's frozen base on that same base.

        policy   a PEFT model around the base, or any other model
        base     path that the base was loaded from
        """
        for reward in self.rewards:
            if callable(share := getattr(reward.function, "share", None)):
                share(policy, base)

    def to(self, device: Any) -> CombinedReward:
        """Move every reward that runs a model to `device`."""
        for reward in self.rewards:
            with called(f"reward {reward.name}"):
                if callable(to := getattr(reward.function, "to", None)):
                    to(device)
        return self


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
    for each in specs:
        reward = _build(each)
        name = free_name(reward.name, [r.name for r in rewards])
        rewards.append(NamedReward(name, reward.function, reward.weight))
    return CombinedReward(tuple(rewards))


def place_spans(
    spans: Sequence[Sequence[tuple[int, float]]],
    offsets: Sequence[Sequence[Span]],
    shape: Sequence[int],
) -> Tensor:
    """Place `(end_char, reward)` pairs on tokens: float32 rewards of shape `[B,T]`.

    offsets: each token's half-open character span, as `ResponseBatch.offsets`. A reward lands on
    the token whose span holds character `end_char - 1`, the last one where several tokens share
    that character; rewards on one token add up. Raises ValueError for a character of no token.
    """
    rewards = torch.zeros(*shape)
    for row, (pairs, row_offsets) in enumerate(zip(spans, offsets, strict=True)):
        starts = [start for start, _ in row_offsets]
        for end_char, reward in pairs:
            # spans never move backwards: the last one that starts before is the only candidate
            token = bisect_right(starts, end_char - 1) - 1
            if end_char < 1 or token < 0 or row_offsets[token][1] < end_char:
                raise ValueError(f"row {row}: no token writes character {end_char - 1}")
            rewards[row, token] += reward
    return rewards


def reward_models(spec: Spec | list[Spec]) -> list[dict[str, Any]]:
    """Arguments, `path` included, of every `RewardModel` in a configuration's `reward.models`.

    Builds nothing. Raises UserError.
    """
    models = []
    for each in spec if isinstance(spec, list) else [spec]:
        name, arguments = split_spec(each, "reward")
        if _is_model_path(name):
            models.append({"path": name, **arguments})
    return models


def require(module: str, extra: str) -> None:
    """Raise UserError, naming the extra to install, where an optional package is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"needs a package that is not installed: pip install 'marlhf[{extra}]'")


def free_name(name: str, taken: Sequence[str]) -> str:
    """The name, or with a suffix `_2`, `_3`, ... where it is taken."""
    names = (f"{name}_{i}" if i > 1 else name for i in range(1, len(taken) + 2))
    return next(n for n in names if n not in taken)


def is_pair(spec: Any) -> bool:
    """Whether a spec is `(reward, weight)`."""
    return isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[1], Real)


def _build(spec: Any) -> NamedReward:
    """Build one reward from one spec."""
    if is_pair(spec):
        inner, weight = spec
        reward = _build(inner)
        return NamedReward(reward.name, reward.function, reward.weight * weight_of(weight))
    if isinstance(spec, str | dict):
        name, arguments = split_spec(spec, "reward")
        weight = weight_of(arguments.pop("weight", 1.0))
        return NamedReward(*_from_name(name, arguments), weight)
    if not callable(spec):
        raise UserError(
            f"reward: given {spec!r}, must be a name, a path, a mapping, a callable, or a pair of "
            "one of these and its weight"
        )
    function = construct(spec, {}, f"reward {spec.__name__}") if isinstance(spec, type) else spec
    return NamedReward(_function_name(function), function)


def weight_of(weight: Any) -> float:
    """Check a weight and convert it to float. Raises UserError."""
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise UserError(f"reward: weight: given {weight!r}, must be a finite number")
    return float(weight)


def _from_name(name: str, arguments: dict[str, Any]) -> tuple[str, RewardFn]:
    """Resolve a directory, registered name, import path or hub name, in this order."""
    if _is_model_path(name):
        factory = import_path("marlhf.rewards.learned.RewardModel", "reward")
        model = construct(factory, {"path": name, **arguments}, f"reward {name}")
        return local_path(name, "reward").resolve().name, model
    found = REWARDS.find(name)
    short = name.rpartition(".")[2]
    if isinstance(found, type):
        found = construct(found, arguments, f"reward {name}")
    elif arguments:
        found = _bind(found, arguments, name)
    return short, found


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
    known = [p.name for p in parameters if p.kind != p.VAR_KEYWORD]
    takes_any = len(known) < len(parameters)
    unknown = [a for a in arguments if a not in known]
    if unknown and not takes_any:
        raise UserError(
            f"reward {name}: given {', '.join(unknown)}; its parameters are "
            f"{', '.join(known) or 'none'}"
        )
    return functools.partial(function, **arguments)


def _function_name(function: Any) -> str:
    """A built-in reward's short name, else a function's name, else that of the class."""
    if isinstance(function, functools.partial):
        return _function_name(function.func)
    path = f"{type(function).__module__}.{type(function).__qualname__}"
    short = {path: name for name, path in REWARDS.factories.items()}.get(path)
    return short or getattr(function, "__name__", None) or type(function).__name__


def _total(value: float | Pairs | None) -> float | None:
    return sum((x for _, x in value), 0.0) if isinstance(value, list) else value
