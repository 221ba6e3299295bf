"""The audit of a run's credit.

  1. check everything that needs no weights
  2. sample responses to held-out prompts                      rollouts/part-N.safetensors
  3. cut them by every arm, and continue them at each cut      returns.jsonl
  4. values, advantages and gradients against the truth        audit.json, audit.html

Responses and returns are on disk as soon as they exist; the same command continues from there, and
one with other arms samples only what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlhf.algorithm.estimators import continuation_plan, estimator_requires
from marlhf.algorithm.experience import MacroBatch, Rollout
from marlhf.algorithm.macro import expand, macro_lengths, macro_mask, reduce, segment_ids
from marlhf.algorithm.monte_carlo import spread_starts
from marlhf.common.errors import UserError, say
from marlhf.common.paths import write_atomically, writing
from marlhf.common.seeds import EVAL_STEP
from marlhf.common.types import Generation, RewardResult, Sequences
from marlhf.config import PPOConfig
from marlhf.config.loading import config_to_dict
from marlhf.credit import results
from marlhf.credit.arms import arm_config, arm_of, cut, estimator_of, per_arm
from marlhf.credit.gradients import inner_products, prompt_gradient, sketch
from marlhf.credit.options import THE_RUN, names_kl
from marlhf.credit.progress import duration, progress
from marlhf.credit.results import Evidence
from marlhf.credit.trained_run import (
    TrainedRun,
    check_auditable,
    chosen_checkpoint,
    held_out_prompts,
    load_run,
)
from marlhf.credit.truth import Part, ReturnStore
from marlhf.data.encoding import encode
from marlhf.data.prompts import Prompt
from marlhf.evaluation.records import RESUME_HINT, fingerprint
from marlhf.evaluation.records import identity as identity_of
from marlhf.rollout.transformers_engine import left_pad, pad_token_id
from marlhf.rollout.worker import RolloutWorker
from marlhf.runs.checkpoint import MANIFEST, Checkpoint
from marlhf.runs.directory import check_no_run, only_writer
from marlhf.runs.metrics import Timer
from marlhf.runs.rollouts import KeptRollout, joined, read_part, write_part
from marlhf.segmenters import build_segmenter, segmenter_requires
from marlhf.views.replay import Arm, Replay

TRUTH = "the truth"


@dataclass(frozen=True)
class AuditSettings:
    """What to audit, and with how much.

    arms            overrides of each arm by its label, the run's own first
    data            prompts instead of the run's held-out ones
    prompts, responses   how many prompts, and responses to each; None: as many as in the run
    continuations   of each prefix, for the truth; even
    places          prefixes of a response at most, spread over `max_new_tokens`; None: all
                    boundaries of all arms
    checkpoint      step-N; None: the latest
    critic          a model as for `critic.path`, in place of the checkpoint's critic
    """

    run: Path
    output: Path
    arms: Mapping[str, Sequence[str]]
    data: str | None = None
    prompts: int = 32
    responses: int | None = None
    continuations: int = 8
    places: int | None = None
    checkpoint: str | None = None
    critic: str | None = None


@dataclass(frozen=True)
class Audit:
    """A finished audit: its numbers, and the credit of the truth and of every arm."""

    numbers: dict[str, Any]
    replay: Replay


def audit(settings: AuditSettings) -> Audit:
    """Audit a run. Raises UserError, before any weights are loaded where that is possible."""
    with ExitStack() as stack:
        return _audit(settings, stack)


def _audit(settings: AuditSettings, stack: ExitStack) -> Audit:
    # 1. check
    assert settings.continuations % 2 == 0, "the two halves tell the truth's own noise"
    start = chosen_checkpoint(settings.run, settings.checkpoint)
    check_no_run(settings.output, "--output")
    of_run = arm_config(settings.run, [])
    in_run = of_run.rollout.responses_per_prompt
    copies = in_run if settings.responses is None else settings.responses
    has_critic = "values" in estimator_requires(estimator_of(of_run)) and not of_run.has_head
    if settings.critic is not None and not has_critic:
        raise UserError("--critic: the run has no separate critic that another could replace")
    configs = _configs(settings, copies)
    config = configs[THE_RUN]
    prompts = held_out_prompts(config, settings.data, settings.prompts)
    stack.enter_context(only_writer(settings.output, "--output"))
    _claim(settings, config, start, prompts)
    segmenters = per_arm(configs, lambda label: build_segmenter(configs[label].segmenter))
    required = frozenset[str]().union(*map(segmenter_requires, segmenters.values()))
    try:
        run = load_run(config, start, prompts, required, keeps_critic=settings.critic is not None)
    except UserError as error:
        key, _, fault = str(error).partition(": ")
        if settings.critic is None or key != "critic.path":
            raise
        raise UserError(f"--critic: {fault.partition('; critic.init')[0]}") from error
    stack.callback(run.worker.engine.close)
    learned = [label for label, arm in configs.items() if arm.segmenter == config.segmenter]
    segmenters |= dict.fromkeys(learned, run.segmenter)
    # 2. sample
    parts, kept = _responses(run, settings.output)
    # 3. continue
    tokenizer = run.worker.tokenizer
    starts = per_arm(configs, lambda label: cut(kept, configs[label], tokenizer, segmenters[label]))
    boundaries = results.union(list(starts.values()))
    places = spread_starts(boundaries, settings.places, config.rollout.max_new_tokens)
    plan = _sampled_values(configs, starts)
    of_arms: dict[str, Tensor] = {}

    def credit(label: str) -> Arm:
        return arm_of(
            label,
            kept,
            configs[label],
            tokenizer,
            own_kl=not names_kl(settings.arms[label]),
            segmenter=segmenters[label],
            starts=starts[label],
            continuation_values=of_arms.get(label),
        )

    # a plug-in that fails shall fail before continuations are paid for
    credits = per_arm([label for label in configs if label not in plan], credit)
    store = ReturnStore.of(settings.output, run.worker, run.kl_coef)
    seconds = _continue(run, store, parts, kept, places, plan, settings.continuations)
    count, first = settings.continuations, settings.continuations
    evidence = Evidence(
        kept,
        copies,
        places,
        _returns(store, parts, places, 0, count),
        run.kl_coef,
        config.ppo.gamma,
    )
    # 4. compare
    for label, (marked, continuations) in plan.items():
        returns_BTK = _returns(store, parts, marked, first, continuations)
        of_arms[label] = returns_BTK.mean(2)
    credits |= per_arm(plan, credit)
    arms = [credits[label] for label in configs]
    truth = _true_arm(evidence)
    gradients = _gradients(run, parts, [truth, *arms])
    numbers: dict[str, Any] = {
        "run": str(settings.run),
        "step": start.step,
        "data": settings.data,
        "prompts": evidence.prompts,
        "responses": len(kept.tensors["scores"]),
        "continuations": count,
        "prefixes": int(places.sum()),
        "distinct_prefixes": sum(store.distinct(part, _share(places, part)) for part in parts),
        "seconds": seconds,
        "kl_coef": run.kl_coef,
        "gamma": config.ppo.gamma,
        "critic_path": settings.critic,
        "notes": _notes(config, evidence.prompts),
        "critic": results.of_critic(evidence),
        "by_position": results.by_position(evidence),
        "truth": {"gradient": gradients[TRUTH]},
        "arms": [
            {
                "label": arm.label,
                "settings": list(settings.arms[arm.label]),
                **results.of_advantages(evidence, arm, starts[arm.label]),
                "values": results.of_arm_values(
                    evidence, arm, starts[arm.label], of_arms.get(arm.label)
                ),
                "gradient": gradients[arm.label],
            }
            for arm in arms
        ],
    }
    replay = Replay.of(kept, [truth, *arms], tokenizer, start.step)
    return Audit(numbers, replay)


# --- 1. check


def _configs(settings: AuditSettings, copies: int) -> dict[str, PPOConfig]:
    """Configuration of each arm. Raises UserError for one that the run has no numbers for."""
    configs = {
        label: _config(settings, overrides, copies) for label, overrides in settings.arms.items()
    }
    of_run = configs[THE_RUN]
    check_auditable(of_run)
    requirements = per_arm(configs, lambda label: estimator_requires(estimator_of(configs[label])))
    has_critic = "values" in requirements[THE_RUN]
    for label, requires in requirements.items():
        if "values" in requires and not has_critic:
            raise UserError(f"arm {label!r}: needs values, but the run has no critic")
        has_other_gamma = configs[label].ppo.gamma != of_run.ppo.gamma
        if "continuations" in requires and (has_other_gamma or names_kl(settings.arms[label])):
            raise UserError(f"arm {label!r}: its continuations have the run's ppo.gamma and kl")
    return configs


def _config(settings: AuditSettings, overrides: Sequence[str], copies: int) -> PPOConfig:
    fixed: dict[str, Any] = {"rollout": {"responses_per_prompt": copies}}
    if settings.critic is not None:
        fixed["critic"] = {"init": "auto", "path": settings.critic}
    try:
        return arm_config(settings.run, overrides, fixed)
    except UserError as error:
        if "rollout.responses_per_prompt: " not in str(error):
            raise
        raise UserError(f"{error}; raise --responses") from error


def _claim(
    settings: AuditSettings, config: PPOConfig, start: Checkpoint, prompts: Sequence[Prompt]
) -> None:
    """Check that what the output folder holds is of this audit. Raises UserError."""
    of_config = config_to_dict(config)
    sections = ("model", "rollout", "reward", "kl", "ppo", "critic", "seed")
    identity = fingerprint(
        (start.path / MANIFEST).read_text(encoding="utf-8"),
        {name: of_config[name] for name in sections},
        [[prompt.text, prompt.messages, prompt.columns] for prompt in prompts],
        settings.continuations,
        *([] if settings.critic is None else [identity_of(settings.critic)]),
    )
    file = settings.output / "identity.json"
    if file.exists() and (settings.output / "rollouts").is_dir():
        if json.loads(file.read_text(encoding="utf-8")) != identity:
            raise UserError(
                f"--output: {str(settings.output)!r} holds an audit of another checkpoint, critic "
                "or prompts, or with other --responses or --continuations; choose another"
            )
        return
    with writing("--output", settings.output, RESUME_HINT):
        write_atomically(file, json.dumps(identity) + "\n")


def _notes(config: PPOConfig, prompts: int) -> list[str]:
    notes = []
    if prompts < 10:
        notes.append(f"{prompts} prompts: intervals over so few are too narrow")
    if config.macro.reward == "mean":
        notes.append(
            "macro.reward=mean: the truth has the sum of the KL rewards, which the run's critic "
            "does not learn"
        )
    if config.ppo.bootstrap_truncated:
        notes.append(
            "ppo.bootstrap_truncated: the truth ends where the length limit cuts a response, which "
            "the run's critic looks beyond"
        )
    return notes


# --- 2. sample


def _responses(run: TrainedRun, folder: Path) -> tuple[list[Part], KeptRollout]:
    """Responses to all prompts: in parts, sampled unless they are on disk, and in one."""
    config, worker = run.config, run.worker
    size, copies = config.rollout.batch_size, config.rollout.responses_per_prompt
    begins = range(0, len(run.prompts), size)
    all_kept, all_prompts = [], []
    with progress(f"responses to {len(run.prompts)} prompts", len(begins)) as advance:
        for number, begin in enumerate(begins):
            prompts = [p for p in run.prompts[begin : begin + size] for _ in range(copies)]
            file = folder / "rollouts" / f"part-{number}.safetensors"
            if not file.exists():
                rows = range(begin * copies, begin * copies + len(prompts))
                clock = Timer()
                rollout = worker(prompts, list(rows), EVAL_STEP, clock, held_out=True)
                kept = KeptRollout.of(rollout, run.kl_coef)
                kept = replace(kept, facts=kept.facts | {"seconds": clock.total()})
                with writing("--output", folder, RESUME_HINT):
                    write_part(kept, file)
            all_kept.append(read_part(file))
            all_prompts.append(prompts)
            advance(1)
    parts = [
        Part(prompts, rollout_of(kept, prompts, worker), begin * copies)
        for begin, prompts, kept in zip(begins, all_prompts, all_kept, strict=True)
    ]
    seconds = sum(kept.facts["seconds"] for kept in all_kept)
    whole = joined(all_kept)
    return parts, replace(whole, facts=whole.facts | {"seconds": seconds})


def rollout_of(kept: KeptRollout, prompts: Sequence[Prompt], worker: RolloutWorker) -> Rollout:
    """A rollout again, from what was kept of it and its prompts."""
    tensors, config, ranks = kept.tensors, worker.config, worker.distributed
    texts = kept.facts["prompt_texts"]
    special = [prompt.messages is None for prompt in prompts]
    encoded, truncated = encode(
        texts, worker.tokenizer, config.rollout.max_prompt_length, special=special
    )
    pad_id = pad_token_id(worker.tokenizer, ranks.unwrap(worker.policy).eos_ids)
    responses = kept.responses(worker.tokenizer)
    of_responses = responses.token_ids, responses.response_mask, tensors["finished"]
    of_all = (*left_pad(encoded, pad_id), *of_responses)
    generation = Generation(*(x.to(ranks.device) for x in of_all))
    return Rollout(
        prompt_texts=texts,
        generation=generation,
        sequences=Sequences.of(generation),
        responses=responses,
        values=tensors.get("values"),
        last_values=tensors.get("last_values"),
        rewards=RewardResult(tensors["scores"].tolist(), [[] for _ in texts], {}),
        scores=tensors["scores"],
        task_rewards=tensors["task_rewards"],
        truncated=torch.tensor(truncated),
        extras={},
    )


# --- 3. continue

Plan = dict[str, tuple[Tensor, int]]


def _sampled_values(configs: Mapping[str, PPOConfig], starts: Mapping[str, Tensor]) -> Plan:
    """Prefixes [B,T] and continuations of each arm whose values are sampled ones."""
    plan: Plan = {}
    for label, config in configs.items():
        estimator = estimator_of(config)
        if "continuations" in estimator_requires(estimator):
            count, most = continuation_plan(estimator)
            limit = config.rollout.max_new_tokens
            plan[label] = (spread_starts(starts[label], most, limit), count)
    return plan


def _continue(
    run: TrainedRun,
    store: ReturnStore,
    parts: Sequence[Part],
    kept: KeptRollout,
    places: Tensor,
    plan: Plan,
    count: int,
) -> float:
    """Sample all continuations that are missing, and say before what they cost; seconds it took."""
    most = max((continuations for _, continuations in plan.values()), default=0)
    marked = results.union([torch.zeros_like(places), *(mask for mask, _ in plan.values())])
    wanted = [(places, 0, count), (marked, count, most)]  # arms have others than the truth
    lengths = kept.tensors["response_mask"].sum(1).tolist()
    work, tokens, sampled = [], 0, 0
    for part in parts:
        for where, first, number in wanted if most else wanted[:1]:
            prefixes = store.missing(part, _share(where, part), first, number)
            sampled += number * len(prefixes)
            # what follows a prefix is as long as what did follow it, in expectation
            tokens += number * sum(lengths[part.number + b] - t for b, t in prefixes)
            work.append((part, prefixes, first, number))
    if not sampled:
        return 0.0
    speed = sum(lengths) / max(kept.facts["seconds"], 1e-9)
    distinct = {(part.number, prefix) for part, of_part, _, _ in work for prefix in of_part}
    say(
        f"continuations: {len(distinct)} distinct prefixes of {len(lengths)} responses, {sampled} "
        f"samples, about {tokens:,} tokens; at the {speed:,.0f} tokens per second of the "
        f"responses about {duration(tokens / speed)}"
    )
    began = time.perf_counter()
    with progress("continuations", sum(len(item[1]) for item in work), is_said=True) as advance:
        for part, of_part, first, number in work:
            for done in store.sample(part, of_part, first, number):
                advance(done)
    return time.perf_counter() - began


def _share(mask: Tensor, part: Part) -> Tensor:
    """A part's rows and columns of a mask over all responses."""
    B, T = part.rollout.responses.response_mask.shape
    return mask[part.number : part.number + B, :T]


def _returns(
    store: ReturnStore, parts: Sequence[Part], places: Tensor, first: int, count: int
) -> Tensor:
    returns_BTK = torch.full((*places.shape, count), torch.nan, dtype=torch.float64)
    for part in parts:
        of_part = store.returns(part, _share(places, part), first, count)
        rows = slice(part.number, part.number + len(of_part))
        returns_BTK[rows, : of_part.shape[1]] = of_part
    return returns_BTK


# --- 4. compare


def _true_arm(evidence: Evidence) -> Arm:
    """The truth at all prefixes that are known, as an arm."""
    mask_BT = evidence.kept.tensors["response_mask"]
    ids = segment_ids(evidence.places, mask_BT)
    mask_BM = macro_mask(ids)
    advantages_BM = torch.zeros(mask_BM.shape, dtype=torch.float64)
    advantages_BM[mask_BM] = torch.from_numpy(evidence.advantages(evidence.places).mean)
    values_BM = reduce(evidence.returns_BTK.mean(2), ids, "first")
    batch = MacroBatch(
        segment_ids=ids,
        mask_BM=mask_BM,
        lengths_BM=macro_lengths(ids),
        advantages_BM=advantages_BM,
        advantages_BT=expand(advantages_BM, ids),
        returns_BM=None,
        returns_BT=None,
        values_BM=values_BM,
    )
    return Arm(TRUTH, batch)


def _gradients(
    run: TrainedRun, parts: Sequence[Part], arms: Sequence[Arm]
) -> dict[str, dict[str, Any]]:
    """Signal and noise of the policy gradient under every arm."""
    copies = run.config.rollout.responses_per_prompt
    sketches: dict[str, list[Tensor]] = {arm.label: [] for arm in arms}
    total = sum(len(part.prompts) // copies for part in parts) * len(arms)
    with progress("gradients", total) as advance:
        for part in parts:
            sequences = part.rollout.sequences
            T = sequences.response_mask.shape[1]
            for begin in range(0, len(part.prompts), copies):
                rows = torch.arange(begin, begin + copies)
                of_prompt = sequences.select(rows)
                for arm in arms:
                    batch, index = arm.batch, part.number + rows
                    credit_BT = batch.advantages_BT[index]
                    if batch.weights_BT is not None:
                        credit_BT = credit_BT * batch.weights_BT[index]
                    credit_BT = credit_BT[:, : min(T, of_prompt.response_mask.shape[1])]
                    gradient = prompt_gradient(
                        run.worker.policy,
                        run.trained,
                        of_prompt,
                        credit_BT.to(of_prompt.response_mask.device),
                        run.config,
                        run.worker.distributed,
                    )
                    sketches[arm.label].append(sketch(gradient))
                    advance(1)
    return {label: results.of_gradient(inner_products(x)) for label, x in sketches.items()}
