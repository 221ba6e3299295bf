"""A run's models from a checkpoint, to sample and score with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from marlhf.algorithm.kl import KLCoefficient, reads_reference
from marlhf.common.errors import UserError
from marlhf.common.plugins import plugin_call
from marlhf.common.state_files import read_tensors
from marlhf.config import PPOConfig
from marlhf.credit.arms import check_is_run
from marlhf.data.encoding import check_prompts
from marlhf.data.prompts import Prompt, load_rows
from marlhf.data.template_checks import strip_bos_for_rewards, with_template_date
from marlhf.distributed import Distributed
from marlhf.distributed.trained import load_weights
from marlhf.models import building, loading
from marlhf.models.adapters import trainable_parameters
from marlhf.rewards import RewardModel
from marlhf.rollout.engine import EngineContext, start_engine
from marlhf.rollout.policy_weights import policy_weights
from marlhf.rollout.scores import check_rewards
from marlhf.rollout.worker import RolloutWorker
from marlhf.runs import checkpoint
from marlhf.runs.checkpoint import Checkpoint
from marlhf.runs.directory import notice
from marlhf.segmenters import SegmenterFn, segmenter_requires
from marlhf.training.plug_ins import PlugIns, build_plug_ins


@dataclass(frozen=True)
class TrainedRun:
    """A run at a checkpoint.

    segmenter   with what it has learned by then
    kl_coef     weight of the KL penalty in the rewards at that update
    trained     the policy's parameters that an update changes
    """

    config: PPOConfig
    worker: RolloutWorker
    prompts: Sequence[Prompt]
    segmenter: SegmenterFn
    kl_coef: float
    trained: list[nn.Parameter]


def chosen_checkpoint(run: Path, name: str | None) -> Checkpoint:
    """The checkpoint `step-N` of a run, or its latest complete one. Raises UserError.

    name   `step-N`, or the path of that folder; None: the latest
    """
    check_is_run(run)
    root = run / "checkpoints"
    if name is not None:
        names = {folder.name: folder for folder in checkpoint.steps(root)}
        path = Path(name).expanduser()
        if path.name not in names or (name != path.name and not _is_same(path, root / path.name)):
            possible = f"must be one of {', '.join(names)}" if names else "the run has none"
            raise UserError(f"--checkpoint: given {name!r}; {possible}")
        return checkpoint.read_named(names[path.name], root, "--checkpoint")
    latest = checkpoint.latest(root, notice, "audit", hint="")
    if latest is None:
        raise UserError(
            f"audit: {str(run)!r} has no checkpoint, which holds its policy and critic; train with "
            "checkpoint.every=50, say"
        )
    return latest


def _is_same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


def held_out_prompts(config: PPOConfig, data: str | None, most: int) -> list[Prompt]:
    """The first held-out prompts of a run, or of other data. Raises UserError."""
    settings = config.data
    if data is not None:
        of_file: dict[str, Any] = {"path": data, "limit": most, "eval_rows": 0}
        if settings.preset is None:
            of_file |= {"split": "train", "name": None, "eval_path": None, "eval_split": None}
        settings = replace(settings, **of_file)
    elif settings.path is None and settings.preset is None:
        raise UserError("audit: the run's prompts were given in Python; name a file with --data")
    elif settings.eval_rows == 0:
        raise UserError(
            "audit: the run holds out no prompts (data.eval_rows=0); name a file with --data"
        )
    try:
        rows, held_out = load_rows(settings, "ppo" if data is None else "evaluate")
        prompts = held_out if data is None else held_out or rows
        return [prompts[i] for i in range(min(most, len(prompts)))]
    except UserError as error:
        if data is None:
            raise
        raise UserError(f"--data: {str(error).removeprefix('data.path: ')}") from error


def check_auditable(config: PPOConfig) -> None:
    """Check that continuations of a run have its rewards. Raises UserError."""
    if not config.reward.models:
        raise UserError("audit: the run's reward was given in Python, not by reward.models")
    faults = {
        "reward.whiten=true": ("are another batch to whiten over", config.reward.whiten),
        "reward.tokens": ("have no token rewards", bool(config.reward.tokens)),
        "macro.discount=per_macro with ppo.gamma below 1": (
            "have no macro actions to discount by",
            config.macro.discount == "per_macro" and config.ppo.gamma < 1,
        ),
    }
    for key, (reason, is_set) in faults.items():
        if is_set:
            raise UserError(f"audit: the run has {key}, but continuations {reason}")


def load_run(
    config: PPOConfig,
    start: Checkpoint,
    prompts: Sequence[Prompt],
    required: frozenset[str] = frozenset(),
    keeps_critic: bool = False,
) -> TrainedRun:
    """Load the models of a run and start its engine. Raises UserError.

    required       by segmenters other than the run's
    keeps_critic   that of the configuration instead of the checkpoint's
    """
    ranks = Distributed(config.model.precision, config.distributed_timeout_minutes)
    if ranks.world_size > 1:
        raise UserError(f"audit: given {ranks.world_size} processes, runs in one")
    built = build_plug_ins(config, {})
    tokenizer = loading.load_tokenizer(config.model)
    config = with_template_date(config, [tokenizer], ranks, built.reward)
    lm_config = loading.load_model_config(config.model)
    check_prompts([prompts], tokenizer, config.rollout, loading.position_limit(lm_config))
    check_rewards(built.reward, [prompts])
    strip_bos_for_rewards(built.reward, tokenizer)
    functions = [reward.function for reward in built.reward.rewards]
    paths = [f.path for f in functions if isinstance(f, RewardModel)]
    critic_start = building.critic_start(
        config, lm_config, tokenizer, next(iter(paths), None), estimator=built.estimator
    )
    placement = ranks.placement()
    required |= segmenter_requires(built.segmenter)
    needs_reference = reads_reference(config.kl, required)
    policy, critic, reference = building.build_models(
        config,
        tokenizer,
        critic_start,
        lm_config=lm_config,
        placement=placement,
        needs_reference=needs_reference,
    )
    built.reward.share_base(policy.model, config.model.path)
    has_adapters = config.model.lora is not None
    trained = _load(start, "policy", policy, has_adapters)
    if critic is not None:
        critic.to(ranks.device)
        if not keeps_critic:
            _load(start, "critic", critic, has_adapters)
    built.reward.to(ranks.device).load(placement)
    engine = start_engine(
        built.engine, EngineContext(policy.to(ranks.device), tokenizer, ranks, config.longest)
    )
    engine.update_weights(policy_weights(policy))
    worker = RolloutWorker(
        config=config,
        policy=policy,
        reference=reference,
        critic=critic,
        reward=built.reward,
        tokenizer=tokenizer,
        distributed=ranks,
        engine=engine,
    )
    kl_coef = _load_states(start, config, built)
    return TrainedRun(config, worker, prompts, built.segmenter, kl_coef, trained)


def _load(
    start: Checkpoint, name: str, module: nn.Module, has_adapters: bool
) -> list[nn.Parameter]:
    """Set the trained weights of a part to those of the checkpoint; returns them."""
    trained = trainable_parameters(module, name if has_adapters else None)
    known = {id(parameter) for parameter in trained}
    weights = {n: p for n, p in module.named_parameters() if id(p) in known}
    try:
        load_weights(start.path / name, weights)
    except (OSError, UserError) as error:
        raise UserError(
            f"audit: checkpoint {start.path} does not fit the run's configuration: {name}: {error}"
        ) from error
    return trained


def _load_states(start: Checkpoint, config: PPOConfig, built: PlugIns) -> float:
    """Load what segmenter and rewards have learned; returns the KL coefficient in the rewards."""
    states = read_tensors(start.path / "rank-0.pt")["parts"]
    kl = KLCoefficient(config.kl, config.kl_in_loss)
    parts: dict[str, Any] = {"kl": kl, "segmenter": built.segmenter}
    parts |= {f"reward {reward.name}": reward.function for reward in built.reward.rewards}
    for name, part in parts.items():
        if name in states and hasattr(part, "load_state_dict"):
            with plugin_call(name):
                part.load_state_dict(states[name])
    return kl.in_rewards_coef
