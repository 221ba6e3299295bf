"""What one rank computes at a time in each job, at its longest lengths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from marlhf.common.registry import split_spec
from marlhf.config import EvaluateConfig, PPOConfig, RewardConfig, RolloutSettings, SFTConfig

JobConfig: TypeAlias = PPOConfig | SFTConfig | RewardConfig | EvaluateConfig
JOBS: Mapping[str, type] = {
    "ppo": PPOConfig,
    "sft": SFTConfig,
    "reward": RewardConfig,
    "evaluate": EvaluateConfig,
}


class Batch(NamedTuple):
    """Sequences of one pass.

    length  tokens of each
    scored  its last tokens, which get log-probabilities or values
    """

    sequences: int
    length: int
    scored: int


class Sampled(NamedTuple):
    """Responses that one rank samples at a time, and the tokens of each."""

    sequences: int
    prompt: int
    response: int


@dataclass(frozen=True)
class Shapes:
    """Passes of one rank.

    training     trained model -> its micro-batches
    accumulates  trained models of which several micro-batches make an optimiser step
    scoring      model -> its largest pass without gradients
    sampling     None where nothing is sampled, or not on this rank's device
    """

    training: Mapping[str, Sequence[Batch]] = field(default_factory=dict)
    accumulates: frozenset[str] = frozenset()
    scoring: Mapping[str, Batch] = field(default_factory=dict)
    sampling: Sampled | None = None


def shapes_of(
    config: JobConfig, trained: Iterable[str], text_batches: Mapping[str, int], ranks: int
) -> Shapes:
    """Passes of one of `ranks` ranks.

    trained        names of the models that are trained
    text_batches   reward model -> texts that it scores at a time
    """
    if isinstance(config, PPOConfig):
        return _ppo(config, trained, text_batches, ranks)
    if isinstance(config, EvaluateConfig):
        return _evaluate(config, text_batches, ranks)
    texts = 1 if isinstance(config, SFTConfig) else 2  # a pair is two
    limit, rows = config.optimizer.micro_batch_size, _share(config.batch_size, ranks)
    length = config.max_length

    def batch(size: int) -> Batch:
        return Batch(texts * size, length, length - 1)

    return Shapes(
        training={"model": [batch(min(limit, rows))]},
        accumulates=frozenset({"model"} if rows > limit else ()),
        scoring={"model": batch(limit)},
    )


def _ppo(
    config: PPOConfig, trained: Iterable[str], text_batches: Mapping[str, int], ranks: int
) -> Shapes:
    rollout, limit = config.rollout, config.optimizer.micro_batch_size
    responses = _share(rollout.batch_size * rollout.responses_per_prompt, ranks)
    step = max(1, responses // config.ppo.minibatches)
    length, T = rollout.longest, rollout.max_new_tokens
    training = {name: [Batch(min(limit, step), length, T)] for name in trained}
    accumulates = set(training) if step > limit else set()
    if config.ptx is not None:
        texts, longest = max(1, config.ptx.batch_size // ranks), config.ptx.max_length
        training["policy"].append(Batch(min(limit, texts), longest, longest - 1))
        accumulates.add("policy")
    scored = Batch(min(rollout.micro_batch_size or limit, responses), length, T)
    return Shapes(
        training,
        frozenset(accumulates),
        dict.fromkeys(training, scored) | _of_rewards(text_batches, responses, length),
        _sampled(rollout, responses),
    )


def _evaluate(config: EvaluateConfig, text_batches: Mapping[str, int], ranks: int) -> Shapes:
    rollout = config.rollout
    responses = _share(rollout.batch_size, ranks)
    size = min(rollout.micro_batch_size or responses, responses)
    return Shapes(
        scoring={"policy": Batch(size, rollout.longest, rollout.max_new_tokens)}
        | _of_rewards(text_batches, responses, rollout.longest),
        sampling=_sampled(rollout, responses),
    )


def _of_rewards(text_batches: Mapping[str, int], responses: int, length: int) -> dict[str, Batch]:
    return {name: Batch(min(size, responses), length, 0) for name, size in text_batches.items()}


def _sampled(rollout: RolloutSettings, responses: int) -> Sampled | None:
    name, arguments = engine_spec(rollout)
    if name != "transformers":
        return None
    size = min(responses, int(arguments.get("batch_size") or responses))
    return Sampled(size, rollout.max_prompt_length, rollout.max_new_tokens)


def engine_spec(rollout: RolloutSettings) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the engine. Raises UserError."""
    return split_spec(rollout.engine, "rollout.engine")


def _share(total: int, ranks: int) -> int:
    """A rank's share of a batch over all ranks, rounded up."""
    return max(1, -(-total // ranks))
