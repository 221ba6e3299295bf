"""Macro-action PPO.

One update, `PPOTrainer.step`:
  1. sample a response to each prompt, score it, get logprobs and values     rollout
  2. cut the responses into macro actions                                    segmenters
  3. rewards and values of macro actions -> advantages -> tokens             experience
  4. step policy and critic over minibatches                                 update, losses
  5. write metrics and samples                                               metrics
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from marlhf.algorithm.experience import MacroBatch, TokenData, macro_batch
from marlhf.algorithm.kl import KLCoefficient, reads_reference
from marlhf.algorithm.macro import isolate_last_token
from marlhf.common.errors import UserError
from marlhf.common.plugins import seed_generators
from marlhf.common.seeds import EVAL_STEP
from marlhf.common.signals import StopSignals, stop
from marlhf.common.types import REF_LOGPROBS
from marlhf.config import PPOConfig
from marlhf.data.encoding import check_prompts
from marlhf.data.order import PromptStream
from marlhf.data.prompts import Prompt, as_prompts, prompt_sets
from marlhf.data.template_checks import template_notes, with_date
from marlhf.distributed import Distributed
from marlhf.models import building, loading
from marlhf.models.sharded_base import check_ppo
from marlhf.rewards import RewardModel, build_rewards, build_token_rewards
from marlhf.rollout.batching import held_out_share
from marlhf.rollout.worker import Rollout, RolloutWorker, add_token_rewards, check_rewards
from marlhf.runs.directory import writing
from marlhf.runs.metrics import Metrics, Timer
from marlhf.runs.provenance import data_labels
from marlhf.runs.state import RunState, claim
from marlhf.segmenters import (
    build_segmenter,
    learn,
    segment,
    segmenter_metrics,
    segmenter_requires,
)
from marlhf.training import diagnostics
from marlhf.training.learner import Learner, keeping_batch
from marlhf.training.ptx import TextStream
from marlhf.training.update import Update


class PPOTrainer:
    """Trains a policy by PPO over macro actions.

    config          a PPOConfig
    reward          instead of config.reward.models: a callable, name, path, or a list of these
    token_reward    instead of config.reward.tokens: a TokenReward, a name, or a list of these
    segmenter       instead of config.segmenter: a callable `ResponseBatch -> starts`, or a name
    train_dataset   instead of config.data: a list of prompts or rows, or a `datasets.Dataset`;
                    nothing is held out of it
    eval_dataset    held-out prompts, likewise
    model           a transformers causal LM instead of config.model.path; give `tokenizer` with it
    critic          a transformers sequence classifier to start the critic from

    `train()` runs all updates, `step(prompts)` runs one. Raises UserError, where possible before
    loading any weights.
    """

    def __init__(
        self,
        config: PPOConfig,
        *,
        reward: Any = None,
        token_reward: Any = None,
        segmenter: Any = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | None = None,
        model: Any = None,
        tokenizer: Any = None,
        critic: Any = None,
    ) -> None:
        _check_kinds(config, model)
        self.distributed = Distributed(config.model.precision, config.distributed_timeout_minutes)
        self.segmenter = build_segmenter(segmenter if segmenter is not None else config.segmenter)
        self.reward = build_rewards(reward if reward is not None else config.reward.models)
        self.token_reward = build_token_rewards(
            token_reward if token_reward is not None else config.reward.tokens,
            [reward.name for reward in self.reward.rewards],
        ).to(self.distributed.device)
        train, self.eval_prompts = sets = prompt_sets(train_dataset, eval_dataset, config.data)
        self.stream = PromptStream(train, config.seed, config.data.shuffle)
        self.tokenizer = tokenizer or loading.load_tokenizer(config.model)
        self.config = config = with_date(config, [self.tokenizer], self.distributed, self.reward)
        lm_config = model.config if model is not None else loading.load_model_config(config.model)
        positions = loading.position_limit(lm_config)
        self._check([*train, *self.eval_prompts], positions)
        functions = [reward.function for reward in self.reward.rewards]
        reward_paths = [f.path for f in functions if isinstance(f, RewardModel)]
        first = next(iter(reward_paths), None) if critic is None else None
        start = building.critic_start(config, lm_config, self.tokenizer, first, critic=critic)
        self.notes += [start.line] if start.line else []
        self.texts = config.ptx and TextStream(
            config.ptx, config.seed, self.tokenizer, self.distributed, positions
        )
        if self.distributed.zero_stage == 3:
            check_ppo(config, lm_config, reward_paths, start, critic)
        labels = data_labels(config.data, train_dataset, eval_dataset)
        rows: dict[str, Any] = dict(zip(labels, sets, strict=True))
        if self.texts is not None and config.ptx is not None:
            rows[f"ptx.path {config.ptx.path!r}"] = self.texts.stream.prompts
        arguments = {"reward": reward, "token_reward": token_reward, "segmenter": segmenter}
        arguments |= {"model": model, "tokenizer": tokenizer, "critic": critic}
        claimed = claim(config, self.distributed, rows, arguments)
        self.run, found = claimed.run, claimed.found

        seed_generators(config.seed)
        policy, value_model = building.build_models(
            config, self.tokenizer, start, model, critic, lm_config, self.distributed.shard
        )
        self.reward.share(policy.model, config.model.path)
        required = self.token_reward.requires | segmenter_requires(self.segmenter)
        needed = reads_reference(config.kl, required)
        self.reference = loading.reference_of(policy, self.distributed.shard) if needed else None
        rate, critic_rate = config.optimizer.learning_rate, config.optimizer.critic_learning_rate
        critic_rate = rate if critic_rate is None else critic_rate
        self.policy = self._learner("policy", policy, rate)
        self.critic = value_model and self._learner("critic", value_model, critic_rate)
        self.worker = RolloutWorker(
            config,
            self.policy.model,
            self.reference,
            self.critic and self.critic.model,
            self.reward.to(self.distributed.device).load(self.distributed.shard),
            self.tokenizer,
            self.distributed,
            self.token_reward.requires - REF_LOGPROBS,
        )
        self.kl = KLCoefficient(config.kl, config.kl_in_loss)
        self.update = Update(
            config, self.policy, self.critic, self.texts, self.kl, self.distributed
        )
        self.state = RunState(self._parts(), config, self.distributed, claimed.made_of)
        self.step_count = 0 if found is None else self.state.load(found)

    def _parts(self) -> dict[str, Any]:
        """All state that an update changes, by name, for checkpoints."""
        return {
            "policy": self.policy,
            "critic": self.critic,
            "kl": self.kl,
            "segmenter": self.segmenter,
            **{f"reward {reward.name}": reward.function for reward in self.reward.rewards},
            **{f"token reward {named.name}": named.reward for named in self.token_reward.rewards},
        }

    def train(self) -> None:
        """Run all updates with their evaluations, then save the policy in `final/`.

        After SIGTERM or Ctrl-C the current update is finished and saved before the process ends.
        """
        config, fail_together = self.config, self.distributed.fail_together
        try:
            fail_together(lambda: self.run.open(config, config.steps, self.notes))
            with StopSignals(self.distributed.gather_objects) as signals:
                if self.step_count == 0 and self._evaluation_is_due():
                    self._write({"step": 0} | self.evaluate())
                while self.step_count < config.steps:
                    row = self.step(self.stream.batch(self.step_count, config.rollout.batch_size))
                    try:
                        if self._evaluation_is_due():
                            row |= self.evaluate()
                    finally:
                        self._write(row)
                    stopped_by = signals.requested()
                    if self.state.is_due(self.step_count, stopped_by is not None):
                        fail_together(self.run.sync)
                        score = row.get("eval_score_mean")
                        self.state.save(self.run.checkpoints, self.step_count, score)
                    if stopped_by is not None:
                        stop(stopped_by)
            self.save(self.run.path / "final.partial")
            fail_together(lambda: self.run.publish(self.run.path / "final.partial"))
        finally:
            self.run.close()

    def step(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Run one update on prompts (texts, message lists or rows); returns its metrics.

        Every rank is given the same prompts and takes its share of them.
        """
        config, metrics, timer = self.config, Metrics(), Timer()
        # 1. sample and score
        rows, row_ids = self._share(as_prompts(prompts, config.data))
        rollout = self.worker(rows, row_ids, self.step_count, timer)
        with timer("score"):
            rollout = add_token_rewards(rollout, self.token_reward, self.distributed, metrics)
        with timer("segment"):
            # 2. cut into macro actions
            starts = self.distributed.fail_together(lambda: self._segment(rollout))
            learn(self.segmenter, rollout.responses, self.distributed.gather_objects)
            # 3. rewards and values -> advantages
            batch = self._macro_batch(starts, rollout)
        with timer("train"):
            # 4. step policy and critic
            learning_rate = self.policy.learning_rate
            name = f"diverged-step-{self.step_count + 1}-rank-{self.distributed.rank}.pt"
            with keeping_batch(self.run.path / name):
                self.update(rollout.experience(batch), self.step_count, metrics)
        self.step_count += 1

        # 5. report
        diagnostics.measure(rollout, batch, self.kl.coef, metrics)
        if config.kl.target is not None:
            metrics.add("kl_coef", self.kl.coef)
        metrics.add_foreign(segmenter_metrics(self.segmenter), "segmenter")
        for sample in diagnostics.samples(rollout, starts, config.log.samples, batch):
            self.run.write_sample({"step": self.step_count, "held_out": False, **sample})
        reduced = metrics.reduce(self.distributed.all_reduce, self.distributed.gather_objects)
        self.kl.update(reduced["kl_mean"], len(prompts) * config.rollout.responses_per_prompt)
        return diagnostics.row(
            self.step_count, reduced, batch, learning_rate, timer, self.distributed.all_reduce
        )

    def evaluate(self) -> dict[str, Any]:
        """Metrics of held-out prompts, each sampled with its own fixed noise."""
        metrics = Metrics()
        waits = self.distributed.zero_stage == 3  # for weights on other ranks
        self.distributed.fail_together(lambda: self._evaluate_share(metrics), waits)
        return metrics.reduce(self.distributed.all_reduce, self.distributed.gather_objects)

    def _evaluate_share(self, metrics: Metrics) -> None:
        held_out, size = self.eval_prompts, self.config.rollout.batch_size
        rank, ranks = self.distributed.rank, self.distributed.world_size
        rows, own = held_out_share(len(held_out), rank, ranks)
        for start in range(0, len(rows), size):
            row_ids = rows[start : start + size]
            prompts = [held_out[row] for row in row_ids]
            shown = start == 0 and self.config.log.samples > 0
            rollout = self.worker(prompts, row_ids, EVAL_STEP, Timer(), True, with_values=shown)
            counted = slice(max(0, own - start))
            metrics.mean("eval_score_mean", rollout.scores[counted])
            log_ratio = rollout.log_ratio
            metrics.mean("eval_kl_mean", None if log_ratio is None else log_ratio.sum(1)[counted])
            metrics.mean("eval_response_length_mean", rollout.generation.lengths[counted])
            if not shown:
                continue
            starts = self._segment(rollout)
            batch = None if rollout.values is None else self._macro_batch(starts, rollout, True)
            for sample in diagnostics.samples(rollout, starts, self.config.log.samples, batch):
                self.run.write_sample({"step": self.step_count, "held_out": True, **sample})

    def save(self, folder: Path | str) -> None:
        """Write the policy and its tokenizer as a plain `from_pretrained` directory."""
        policy = self.distributed.unwrap(self.policy.model)
        write = partial(loading.save_policy, policy, self.tokenizer, Path(folder))
        with self.distributed.whole_on_cpu(policy), writing(self.run.path):
            self.distributed.fail_together(write if self.distributed.is_main else lambda: None)

    # -- one update ------------------------------------------------------------------------------

    def _share(self, prompts: list[Prompt]) -> tuple[list[Prompt], list[int]]:
        """This rank's prompts, repeated per response, and the responses' indices in the batch."""
        self._check_batch(len(prompts))
        each = len(prompts) // self.distributed.world_size
        copies = self.config.rollout.responses_per_prompt
        first = self.distributed.rank * each
        mine = [p for p in prompts[first : first + each] for _ in range(copies)]
        return mine, list(range(first * copies, first * copies + len(mine)))

    def _segment(self, rollout: Rollout) -> Tensor:
        responses = rollout.responses
        starts = segment(self.segmenter, responses)
        alone = self.config.macro.last_token_alone
        return isolate_last_token(starts, responses.response_mask) if alone else starts

    def _macro_batch(self, starts: Tensor, rollout: Rollout, held_out: bool = False) -> MacroBatch:
        config, mask = self.config, rollout.generation.response_mask
        tokens = TokenData(
            response_mask=mask,
            kl_rewards=rollout.kl_rewards(self.kl.in_rewards_coef),
            task_rewards=rollout.task_rewards,
            values=rollout.values,
            last_values=rollout.last_values,
            finished=rollout.generation.finished,
        )
        return macro_batch(
            starts,
            tokens,
            replace(config.macro, whiten="none") if held_out else config.macro,
            config.ppo,
            config.rollout.responses_per_prompt,
            self.distributed.all_reduce,
        )

    # -- set-up ----------------------------------------------------------------------------------

    def _check(self, prompts: list[Prompt], positions: int | None) -> None:
        """Check batch and data against ranks, model and rewards. Raises UserError."""
        data, rollout = self.config.data, self.config.rollout
        self._check_batch(rollout.batch_size)
        self.stream.check_batch(rollout.batch_size, "rollout.batch_size")
        check_prompts(prompts, self.tokenizer, data, rollout, positions)
        check_rewards(self.reward, prompts)
        self.notes = template_notes(self.reward, prompts, self.tokenizer, data)

    def _check_batch(self, prompts: int) -> None:
        """Check that all ranks get equally many prompts per minibatch. Raises UserError."""
        world, minibatches = self.distributed.world_size, self.config.ppo.minibatches
        if prompts % (world * minibatches):
            raise UserError(
                f"rollout.batch_size: given {prompts} prompts, must be a multiple of "
                f"{world * minibatches} ({world} ranks x ppo.minibatches={minibatches})"
            )

    def _learner(self, name: str, module: nn.Module, learning_rate: float) -> Learner:
        adapter = name if self.config.model.lora else None
        steps, settings = self.config.steps, self.config.optimizer
        return Learner(module, adapter, learning_rate, settings, steps, self.distributed)

    def _evaluation_is_due(self) -> bool:
        every, step = self.config.log.eval_every, self.step_count
        return bool(
            self.eval_prompts and every and (step % every == 0 or step == self.config.steps)
        )

    def _write(self, row: dict[str, Any]) -> None:
        self.distributed.fail_together(lambda: self.run.write(row))


def _check_kinds(config: Any, model: Any) -> None:
    if not isinstance(config, PPOConfig):
        raise UserError(
            f"config: given a {type(config).__name__}, must be a PPOConfig; "
            "load_config(PPOConfig, 'my_run.yaml') reads a file, config_from_dict a dict"
        )
    if isinstance(model, str | Path):
        raise UserError(
            f"model: given {str(model)!r}, must be a model; a path goes into config.model.path"
        )


def run(config: PPOConfig) -> None:
    """Run the job `marlhf ppo`."""
    PPOTrainer(config).train()
