"""One PPO update: `epochs` passes over the rollout, one optimiser step per minibatch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from marlhf.algorithm.experience import Experience
from marlhf.algorithm.kl import KLCoefficient
from marlhf.config import PPOConfig
from marlhf.distributed import Distributed
from marlhf.rollout.batching import minibatches
from marlhf.runs.metrics import Metrics
from marlhf.training.learner import Learner, Term, count_step
from marlhf.training.objectives import policy_objective, text_objective, value_objective
from marlhf.training.ptx import TextStream


@dataclass(frozen=True)
class Update:
    """Steps policy and critic on the experience of a rollout.

    texts   of the pretraining loss (PTX), or None
    """

    config: PPOConfig
    policy: Learner
    critic: Learner | None
    texts: TextStream | None
    kl: KLCoefficient
    distributed: Distributed

    def __call__(self, experience: Experience, update: int, metrics: Metrics) -> None:
        """Run update `update` of the run, from 0; the first ones may train the critic alone.

        Raises DivergedError after too many non-finite gradients in a row.
        """
        config = self.config
        group, count = config.rollout.responses_per_prompt, config.ppo.minibatches
        # the same minibatches in every epoch: no generator to checkpoint
        parts = minibatches(len(experience), group, count) * config.ppo.epochs
        self._announce(metrics)
        train_policy = self.critic is None or update >= config.critic.warmup_steps
        for step, rows in enumerate(parts, update * len(parts)):
            minibatch = experience.rows(rows)
            if train_policy:
                train_policy = self._step_policy(minibatch, step, metrics)
            if self.critic is not None:
                self._step_critic(self.critic, minibatch, metrics)
        self.policy.scheduler.step()
        if self.critic is not None:
            self.critic.scheduler.step()

    def _step_policy(self, minibatch: Experience, step: int, metrics: Metrics) -> bool:
        """Take optimiser step `step` of the run; returns whether to continue with the policy.

        In this update it stops at the first minibatch whose KL exceeds `ppo.target_kl`: that step
        is not taken, but the minibatch counts in the metrics.
        """
        model, of_minibatch = self.policy.model, Metrics()
        objective = partial(
            policy_objective, model, self.config, self.kl.in_loss_coef, of_minibatch
        )
        terms: list[Term] = [(minibatch, objective)]
        if self.texts is not None:
            of_texts = partial(text_objective, model, self.config, metrics)
            terms.append((self.texts.batch(step), of_texts))
        gradient = self.policy.accumulate(*terms)
        count_step("grad_norm_policy", gradient, metrics)
        metrics.include(of_minibatch)
        if self.config.ppo.target_kl is not None:
            reduced = of_minibatch.reduce(
                self.distributed.all_reduce, self.distributed.gather_objects
            )
            if reduced["approx_kl"] > self.config.ppo.target_kl:
                self.policy.discard()
                return False
            metrics.add("policy_steps", float(gradient.finite), 0.0)
        self.policy.step(gradient)
        return True

    def _step_critic(self, critic: Learner, minibatch: Experience, metrics: Metrics) -> None:
        objective = partial(value_objective, critic.model, self.config, metrics)
        gradient = critic.optimise((minibatch, objective))
        count_step("grad_norm_value", gradient, metrics)

    def _announce(self, metrics: Metrics) -> None:
        """Register metrics that every row must have, even if no step adds to them."""
        metrics.add("skipped_steps", 0.0, 1.0)
        if self.config.ppo.target_kl is not None:
            metrics.add("policy_steps", 0.0, 1.0)
        if self.texts is not None:
            metrics.add("ptx_loss", 0.0, 0.0)
