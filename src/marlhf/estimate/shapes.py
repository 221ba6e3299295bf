"""What one rank computes at a time in each job, at its longest lengths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from marlhf.common.errors import UserError
from marlhf.common.registry import construct, split_spec
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


class Texts(NamedTuple):
    """Texts that a reward model scores at a time.

    longest   most tokens of one; None: any number
    segments  whether they are segments of responses, of which there may be any number
    """

    sequences: int
    longest: int | None
    segments: bool = False


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


def fitted(config: JobConfig, positions: int | None) -> JobConfig:
    """A job's config, with lengths that a model of so many positions admits.

    positions   None: any number

    The job itself compares the lengths of its data. Raises UserError where no prompt is left room.
    """
    if positions is None:
        return config
    if isinstance(config, SFTConfig | RewardConfig):
        return replace(config, max_length=min(config.max_length, positions))
    rollout = config.rollout
    room = positions - rollout.max_new_tokens
    if room < 1:
        raise UserError(
            f"rollout.max_new_tokens: given {rollout.max_new_tokens}, must be less than the "
            f"{positions} positions of the model"
        )
    prompt = min(rollout.max_prompt_length, room)
    config = replace(config, rollout=replace(rollout, max_prompt_length=prompt))
    if isinstance(config, PPOConfig) and config.ptx is not None:
        longest = min(config.ptx.max_length, positions)
        config = replace(config, ptx=replace(config.ptx, max_length=longest))
    return config


def shapes_of(
    config: JobConfig, trained: Iterable[str], texts: Mapping[str, Texts], ranks: int
) -> Shapes:
    """Passes of one of `ranks` ranks.

    trained   names of the models that are trained
    texts     what each reward model scores at a time
    """
    if isinstance(config, PPOConfig):
        return _ppo(config, trained, texts, ranks)
    if isinstance(config, EvaluateConfig):
        return _evaluate(config, texts, ranks)
    per_row = 1 if isinstance(config, SFTConfig) else 2  # a pair is two
    limit, rows = config.optimizer.micro_batch_size, _share(config.batch_size, ranks)
    length = config.max_length

    def batch(size: int) -> Batch:
        return Batch(per_row * size, length, length - 1)

    return Shapes(
        training={"model": [batch(min(limit, rows))]},
        accumulates=frozenset({"model"} if rows > limit else ()),
        scoring={"model": batch(limit)},
    )


def _ppo(
    config: PPOConfig, trained: Iterable[str], texts: Mapping[str, Texts], ranks: int
) -> Shapes:
    rollout, limit = config.rollout, config.optimizer.micro_batch_size
    responses = _share(rollout.batch_size * rollout.responses_per_prompt, ranks)
    step = max(1, responses // config.ppo.minibatches)
    length, T = rollout.longest, rollout.max_new_tokens
    training = {name: [Batch(min(limit, step), length, T)] for name in trained}
    accumulates = set(training) if step > limit else set()
    if config.ptx is not None:
        rows, longest = max(1, config.ptx.batch_size // ranks), config.ptx.max_length
        training["policy"].append(Batch(min(limit, rows), longest, longest - 1))
        accumulates.add("policy")
    scored = Batch(min(rollout.micro_batch_size or limit, responses), length, T)
    return Shapes(
        training,
        frozenset(accumulates),
        dict.fromkeys(training, scored) | _of_rewards(texts, responses, length),
        _sampled(rollout, responses),
    )


def _evaluate(config: EvaluateConfig, texts: Mapping[str, Texts], ranks: int) -> Shapes:
    rollout = config.rollout
    responses = _share(rollout.batch_size, ranks)
    size = min(rollout.micro_batch_size or responses, responses)
    return Shapes(
        scoring={"policy": Batch(size, rollout.longest, rollout.max_new_tokens)}
        | _of_rewards(texts, responses, rollout.longest),
        sampling=_sampled(rollout, responses),
    )


def _of_rewards(texts: Mapping[str, Texts], responses: int, length: int) -> dict[str, Batch]:
    return {
        name: Batch(
            size if segments else min(size, responses),
            length if limit is None else min(length, limit),
            0,
        )
        for name, (size, limit, segments) in texts.items()
    }


def _sampled(rollout: RolloutSettings, responses: int) -> Sampled | None:
    name, engine = engine_settings(rollout)
    if name != "transformers":
        return None
    size = min(responses, engine.batch_size or responses)
    return Sampled(size, rollout.max_prompt_length, rollout.max_new_tokens)


def engine_settings(rollout: RolloutSettings) -> tuple[str, Any]:
    """Name and settings of the engine; None for one of the user's. Raises UserError."""
    from marlhf.rollout.engine import ENGINES  # which needs torch
    from marlhf.rollout.transformers_engine import Transformers
    from marlhf.rollout.vllm_engine import VLLMSettings

    name, arguments = split_spec(rollout.engine, "rollout.engine")
    factory = {"transformers": Transformers, "vllm": VLLMSettings}.get(name)
    if factory is not None:
        return name, construct(factory, arguments, f"engine {name}")
    if "." not in name:  # an import path may be of another machine
        ENGINES.find(name)
    return name, None


def _share(total: int, ranks: int) -> int:
    """A rank's share of a batch over all ranks, rounded up."""
    return max(1, -(-total // ranks))
