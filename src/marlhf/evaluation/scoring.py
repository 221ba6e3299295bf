"""Rewards of the sampled responses: any that ppo takes, and ROUGE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marlhf.common.memory_errors import doing
from marlhf.config import EvaluateConfig
from marlhf.evaluation.bench import Bench
from marlhf.evaluation.records import Key, fingerprint, identity
from marlhf.rewards import (
    CombinedReward,
    EmbeddingSimilarity,
    NamedReward,
    RewardModel,
    build_rewards,
)
from marlhf.rollout.scores import reward_columns
from marlhf.runs.provenance import code_of

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


@dataclass(frozen=True)
class Measure:
    """A reward and its name in the results.

    weight     in `score`; None if it is no part of it
    identity   changes with the reward's configuration and files
    """

    name: str
    reward: NamedReward
    weight: float | None
    identity: list[Any]


def build_measures(config: EvaluateConfig) -> list[Measure]:
    """The configured rewards, then ROUGE. Raises UserError."""
    specs = config.rewards if isinstance(config.rewards, list) else [config.rewards]
    rewards = build_rewards(specs).rewards if specs else ()
    measures = [
        Measure(
            f"reward_{reward.name}", reward, reward.weight, [spec, *_files(reward), *code_of(spec)]
        )
        for spec, reward in zip(specs, rewards, strict=True)
    ]
    column = config.rouge_column
    for name, metric in ROUGE.items() if column is not None else ():
        (reward,) = build_rewards({"name": "rouge", "metric": metric, "column": column}).rewards
        measures.append(Measure(name, reward, None, [column]))
    return measures


def _files(reward: NamedReward) -> list[Any]:
    """Identity of a reward's model, where it is given by a path."""
    path = getattr(reward.function, "path", None)
    is_model = isinstance(reward.function, RewardModel | EmbeddingSimilarity)
    return [identity(path)] if is_model and isinstance(path, str) else []


@doing("scoring")
def apply_measure(bench: Bench, measure: Measure) -> None:
    """Score every response. Raises RewardError and UserError."""
    prompts, samples = bench.prompts, bench.samples.lines
    prompt_prints = [
        fingerprint(prompt.text, prompt.columns, prompt.messages) for prompt in prompts
    ]
    about = bench.from_main(measure.identity)
    prints = {
        key: fingerprint(about, samples[key]["response"], prompt_prints[key[2]])
        for key in bench.response_keys()
    }

    def prepare():
        placement = bench.distributed.placement(sharded=False)
        reward = CombinedReward((measure.reward,)).to(placement.device).load(placement)

        def values_of(keys: list[Key]) -> list[float | None]:
            chosen = [prompts[row] for _, _, row, _ in keys]
            texts = [samples[key]["response"] for key in keys]
            result = reward([p.text for p in chosen], texts, reward_columns(chosen))
            return result.by_name[measure.reward.name]

        return values_of

    bench.measure(measure.name, prints, prepare)


def total_score(values: Mapping[str, float | None], measures: Sequence[Measure]) -> float | None:
    """The weighted sum of a response's rewards; None where none is applicable."""
    applicable = [
        (measure.weight, value)
        for measure in measures
        if measure.weight is not None and (value := values[measure.name]) is not None
    ]
    return sum(weight * value for weight, value in applicable) if applicable else None
