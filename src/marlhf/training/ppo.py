"""Macro-action PPO.

One update, `PPOTrainer.step`:
  1. sample a response to each prompt, score it, get logprobs and values     rollout
  2. cut the responses into macro actions                                    segmenters
  3. rewards and values of macro actions -> advantages -> tokens             experience
  4. step policy and critic over minibatches                                 update, losses
  5. write metrics and samples                                               diagnostics
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from marlhf.algorithm.experience import Rollout
from marlhf.algorithm.kl import KLCoefficient, reads_reference
from marlhf.algorithm.macro import isolate_last_token
from marlhf.common.errors import UserError
from marlhf.common.plugins import seed_generators
from marlhf.common.seeds import EVAL_STEP
from marlhf.common.signals import StopSignals, stop
from marlhf.common.types import REF_LOGPROBS
from marlhf.config import PPOConfig
from marlhf.config.loading import check_kind
from marlhf.data.encoding import check_prompts
from marlhf.data.order import PromptStream
from marlhf.data.prompts import Prompt, as_prompts, kinds_of, prompt_sets
from marlhf.data.template_checks import strip_bos_for_rewards, template_notes, with_template_date
from marlhf.distributed import Distributed
from marlhf.models import building, loading, saving
from marlhf.models.quantized_base import base_notes
from marlhf.models.sharded_base import check_ppo_adapters
from marlhf.rewards import RewardModel
from marlhf.rollout.batching import check_minibatches, held_out_share, rank_share
from marlhf.rollout.continuations import ContinuationSampler
from marlhf.rollout.engine import EngineContext, start_engine
from marlhf.rollout.scores import add_token_rewards, check_rewards
from marlhf.rollout.worker import RolloutWorker
from marlhf.runs.directory import writing
from marlhf.runs.metrics import Metrics, Timer
from marlhf.runs.provenance import data_labels
from marlhf.runs.rollouts import keep_rollout
from marlhf.runs.state import RunState, claim_run
from marlhf.segmenters import learn, segment, segmenter_metrics, segmenter_requires
from marlhf.training import diagnostics
from marlhf.training.credit import CreditAssignment
from marlhf.training.learner import Learner, keeping_batch
from marlhf.training.offload import check_offload, offload
from marlhf.training.plug_ins import build_plug_ins
from marlhf.training.ptx import TextStream
from marlhf.training.update import PPOUpdate


class PPOTrainer:
    """Trains a policy with PPO over macro actions.

    config          a PPOConfig
    reward          instead of config.reward.models: a callable, name, path, or a list of these
    token_reward    instead of config.reward.tokens: a TokenReward, a name, or a list of these
    segmenter       instead of config.segmenter: a callable `ResponseBatch -> starts`, or a name
    estimator       instead of config.ppo.estimator: a callable `CreditInputs -> Credit`, or a name
    engine          instead of config.rollout.engine: a factory `EngineContext -> Engine`, or a name
    train_dataset   instead of config.data: a list of prompts or rows, or a `datasets.Dataset`;
                    none of it is held out
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
        estimator: Any = None,
        engine: Any = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | None = None,
        model: Any = None,
        tokenizer: Any = None,
        critic: Any = None,
    ) -> None:
        check_kind(config, PPOConfig)
        if isinstance(model, str | Path):
            raise UserError(f"model: given {str(model)!r}; a path goes into config.model.path")
        timeout = config.distributed_timeout_minutes
        ranks = self.distributed = Distributed(config.model.precision, timeout)
        check_minibatches(config.rollout.batch_size, ranks.world_size, config.ppo.minibatches)
        arguments = {"reward": reward, "token_reward": token_reward, "segmenter": segmenter}
        arguments |= {"estimator": estimator, "engine": engine}
        built = build_plug_ins(config, arguments)
        self.segmenter, self.estimator, self.reward = built.segmenter, built.estimator, built.reward
        self.token_reward = built.token_reward.to(ranks.device)
        train, self.eval_prompts = sets = prompt_sets(train_dataset, eval_dataset, config.data)
        self.stream = PromptStream(train, config.seed, config.data.shuffle)
        self.tokenizer = tokenizer or loading.load_tokenizer(config.model)
        self.config = config = with_template_date(config, [self.tokenizer], ranks, self.reward)
        lm_config = loading.config_of(config.model, model)
        positions = loading.position_limit(lm_config)
        self._check(sets, positions)
        strip_bos_for_rewards(self.reward, self.tokenizer)
        start = self._critic_start(lm_config, critic)
        labels = data_labels(config.data, train_dataset, eval_dataset)
        datasets: dict[str, Any] = dict(zip(labels, sets, strict=True))
        self.texts = None
        if config.ptx is not None:
            self.texts = TextStream(config.ptx, config.seed, self.tokenizer, ranks, positions)
            datasets[f"ptx.path {config.ptx.path!r}"] = self.texts.stream.prompts
        arguments |= {"model": model, "tokenizer": tokenizer, "critic": critic}
        claimed = claim_run(config, ranks, datasets, arguments)
        self.run_dir, checkpoint = claimed.directory, claimed.checkpoint

        # all is checked that can be without weights; from here on they are loaded
        seed_generators(config.seed)
        self._dtype = saving.final_dtype(config.model, lm_config)
        self._load_models(start, model, critic, lm_config)
        context = EngineContext(self.policy.model, self.tokenizer, ranks, config.rollout.longest)
        self.engine = start_engine(built.engine, context)
        self.worker = RolloutWorker(
            config=config,
            policy=self.policy.model,
            reference=self.reference,
            critic=None if self.critic is None else self.critic.model,
            reward=self.reward,
            tokenizer=self.tokenizer,
            distributed=ranks,
            engine=self.engine,
            requested_extras=self.token_reward.requires - REF_LOGPROBS,
            stream=self.stream,
        )
        self.kl = KLCoefficient(config.kl, config.kl_in_loss)
        of_plug_ins = built.estimator, built.loss_weights
        self.credit = CreditAssignment(config, *of_plug_ins, self.kl, ranks)
        self.continued = ContinuationSampler(self.worker, self.estimator, self.kl)
        self.update = PPOUpdate(config, self.policy, self.critic, self.texts, self.kl, ranks)
        self.state = RunState(self._parts(), config, ranks, claimed.provenance)
        self.step_count = 0 if checkpoint is None else self.state.load(checkpoint)
        self.worker.update_engine()

    def _parts(self) -> dict[str, Any]:
        """Everything with state that updates change, by name, for checkpoints."""
        return {
            "policy": self.policy,
            "critic": self.critic,
            "kl": self.kl,
            "ahead": self.worker.ahead,
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
            fail_together(lambda: self.run_dir.open(config, config.steps, self.notes))
            with StopSignals(self.distributed.gather_objects) as signals:
                if self.step_count == 0 and self._evaluation_is_due():
                    fail_together(partial(self.run_dir.write, {"step": 0} | self.evaluate()))
                while self.step_count < config.steps:
                    row = self.step(self.stream.batch(self.step_count, config.rollout.batch_size))
                    with self.run_dir.kept_on_error(row):
                        if self._evaluation_is_due():
                            row |= self.evaluate()
                    fail_together(partial(self.run_dir.write, row))
                    stopped_by = signals.requested()
                    if self.state.is_due(self.step_count, stopped_by is not None):
                        fail_together(self.run_dir.sync)
                        score = row.get("eval_score_mean")
                        self.state.save(self.run_dir.checkpoints, self.step_count, score)
                    if stopped_by is not None:
                        stop(stopped_by)
            self.save(self.run_dir.path / "final.partial")
            fail_together(lambda: self.run_dir.publish(self.run_dir.path / "final.partial"))
        finally:
            self.engine.close()
            self.run_dir.close()

    def step(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Run one update on prompts (texts, message lists or rows); returns its metrics.

        Every rank gets the same prompts and samples its share of them.
        """
        config, metrics, timer = self.config, Metrics(), Timer()
        # 1. sample and score
        records, ranks = as_prompts(prompts, config.data), self.distributed
        check_minibatches(len(records), ranks.world_size, config.ppo.minibatches)
        copies = config.rollout.responses_per_prompt
        share = rank_share(records, copies, ranks.rank, ranks.world_size)
        rollout = self.worker(*share, self.step_count, timer)
        with timer("score"):
            rollout = add_token_rewards(rollout, self.token_reward, ranks, metrics)
        with timer("segment"):
            # 2. cut into macro actions
            starts = ranks.fail_together(lambda: self._segment(rollout))
            # from the next update on, segmenters that learn have seen these responses
            learn(self.segmenter, rollout.responses, ranks.gather_objects, ranks.fail_together)
        # 3. rewards and values -> advantages
        rollout = self.continued(starts, share[0], rollout, timer, metrics)
        with timer("segment"):
            batch = self.credit(starts, rollout)
        with timer("train"):
            # 4. step policy and critic
            learning_rate = self.policy.learning_rate
            name = f"diverged-step-{self.step_count + 1}-rank-{ranks.rank}.pt"
            experience = rollout.experience(batch, config.rollout, config.macro.ratio)
            with keeping_batch(self.run_dir.path / name):
                self.update(experience, self.step_count, metrics)
        with timer("generate"):
            self.worker.update_engine()
        self.step_count += 1

        # 5. report
        diagnostics.measure(rollout, batch, self.kl.coef, metrics)
        if config.kl.target is not None:
            metrics.add("kl_coef", self.kl.coef)
        of_segmenter = ranks.fail_together(partial(segmenter_metrics, self.segmenter))
        metrics.add_foreign(of_segmenter, "segmenter")
        for sample in diagnostics.samples(rollout, starts, config.log.samples, batch):
            self.run_dir.write_sample({"step": self.step_count, "held_out": False, **sample})
        kept = rollout, starts, batch, self.kl.in_rewards_coef, self.run_dir.path, config.log
        ranks.fail_together(lambda: keep_rollout(*kept, self.step_count, ranks.rank))
        reduced = metrics.reduce(self.distributed)
        responses = len(prompts) * copies
        self.kl.update(reduced["kl_mean"], responses)
        return diagnostics.row(self.step_count, reduced, responses, learning_rate, timer)

    def evaluate(self) -> dict[str, Any]:
        """Metrics of held-out prompts, each sampled with its own fixed noise."""
        metrics = Metrics()
        work, blocks = partial(self._evaluate_share, metrics), self.distributed.needs_peers
        self.distributed.fail_together(work, blocks_on_peers=blocks)
        return metrics.reduce(self.distributed)

    def _evaluate_share(self, metrics: Metrics) -> None:
        held_out, size = self.eval_prompts, self.config.rollout.batch_size
        ranks = self.distributed
        indices, count = held_out_share(len(held_out), ranks.rank, ranks.world_size)
        for start in range(0, len(indices), size):
            row_ids = indices[start : start + size]
            prompts = [held_out[index] for index in row_ids]
            with_samples = start == 0 and self.config.log.samples > 0
            rollout = self.worker(
                prompts, row_ids, EVAL_STEP, Timer(), held_out=True, with_values=with_samples
            )
            counted = max(0, count - start)  # the others are another rank's
            diagnostics.measure_held_out(rollout, counted, metrics)
            if not with_samples:
                continue
            starts, batch = self._segment(rollout), None
            if rollout.values is not None:
                batch = self.credit.held_out(starts, rollout)
            for sample in diagnostics.samples(rollout, starts, self.config.log.samples, batch):
                self.run_dir.write_sample({"step": self.step_count, "held_out": True, **sample})

    def save(self, folder: Path | str) -> None:
        """Write the policy and its tokenizer as a plain `from_pretrained` directory."""
        policy = self.distributed.unwrap(self.policy.model)
        write = partial(saving.save_policy, policy, self.tokenizer, Path(folder), self._dtype)
        with self.distributed.unsharded_on_cpu(policy), writing(self.run_dir.path):
            self.distributed.fail_together(write if self.distributed.is_main else lambda: None)

    # -- one update ------------------------------------------------------------------------------

    def _segment(self, rollout: Rollout) -> Tensor:
        responses = rollout.responses
        starts = segment(self.segmenter, responses)
        alone = self.config.macro.last_token_alone
        return isolate_last_token(starts, responses.response_mask) if alone else starts

    # -- set-up ----------------------------------------------------------------------------------

    def _check(self, sets: Sequence[Sequence[Prompt]], positions: int | None) -> None:
        """Check the data against model and rewards. Raises UserError."""
        rollout = self.config.rollout
        self.stream.check_batch(rollout.batch_size, "rollout.batch_size")
        check_prompts(sets, self.tokenizer, rollout, positions)
        check_rewards(self.reward, sets)
        self.notes = template_notes(self.reward, kinds_of(*sets), self.tokenizer)

    def _critic_start(self, lm_config: Any, critic: Any) -> building.CriticStart:
        """Choose the critic's initialisation, from configurations alone. Raises UserError."""
        functions = [reward.function for reward in self.reward.rewards]
        paths = [f.path for f in functions if isinstance(f, RewardModel)]
        first = next(iter(paths), None) if critic is None else None
        start = building.critic_start(
            self.config, lm_config, self.tokenizer, first, critic=critic, estimator=self.estimator
        )
        self.notes += [*base_notes(self.config.model, paths), *([start.line] if start.line else [])]
        check_offload(self.config, self.distributed.zero_stage)
        if self.distributed.zero_stage == 3:
            check_ppo_adapters(self.config, lm_config, paths, start, critic)
        return start

    def _load_models(
        self, start: building.CriticStart, model: Any, critic: Any, lm_config: Any
    ) -> None:
        """Load policy, critic, reference and reward models; optimisers for those in training."""
        config, placement = self.config, self.distributed.placement()
        required = self.token_reward.requires | segmenter_requires(self.segmenter)
        with_reference = reads_reference(config.kl, required)
        policy, value_model, self.reference = building.build_models(
            config, self.tokenizer, start, model, critic, lm_config, placement, with_reference
        )
        self.reward.share_base(policy.model, config.model.path)
        self.policy = self._learner("policy", policy, config.optimizer.learning_rate)
        self.critic = None
        if value_model is not None:
            self.critic = self._learner("critic", value_model, config.optimizer.critic_rate)
        device = self.distributed.device
        self.reward.to(device).load(placement)
        learners = self.policy, self.critic
        self.notes += offload(config, self.reference, self.reward, learners, device)

    def _learner(self, name: str, module: nn.Module, learning_rate: float) -> Learner:
        adapter = name if self.config.model.lora else None
        steps, settings = self.config.steps, self.config.optimizer
        return Learner(module, adapter, learning_rate, settings, steps, self.distributed)

    def _evaluation_is_due(self) -> bool:
        every, step, last = self.config.log.eval_every, self.step_count, self.config.steps
        return bool(self.eval_prompts and every and (step % every == 0 or step == last))


def run(config: PPOConfig) -> None:
    """Run the job `marlhf ppo`."""
    PPOTrainer(config).train()
