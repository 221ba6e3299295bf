"""The optimiser steps of one update: several passes over a rollout, in each a step a minibatch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from marlhf.batching import minibatches
from marlhf.config import PPOConfig
from marlhf.diagnostics import count_step
from marlhf.distributed import Distributed
from marlhf.experience import Experience
from marlhf.kl_control import KLCoefficient
from marlhf.learner import Learner, Term
from marlhf.metrics import Metrics
from marlhf.objectives import policy_objective, text_objective, value_objective
from marlhf.ptx import TextStream


@dataclass(frozen=True)
class Update:
    """Steps policy and critic on the experience of a rollout.

    texts   to model beside, or None
    """

    config: PPOConfig
    policy: Learner
    critic: Learner | None
    texts: TextStream | None
    kl: KLCoefficient
    distributed: Distributed

    def __call__(self, experience: Experience, update: int, metrics: Metrics) -> None:
        """Update number `update` of the run, from 0; the first ones may train the critic alone.

        Raises DivergedError where too many steps in a row are not finite.
        """
        config = self.config
        group, count = config.rollout.responses_per_prompt, config.ppo.minibatches
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
        """The optimiser step `step` of the run. False: it was not taken, because the minibatch
        shows the policy already beyond `ppo.target_kl`; in the metrics the minibatch counts."""
        model, here = self.policy.model, Metrics()
        objective = partial(policy_objective, model, self.config, self.kl.in_loss_coef, here)
        terms: list[Term] = [(minibatch, objective)]
        if self.texts is not None:
            of_texts = partial(text_objective, model, self.config, metrics)
            terms.append((self.texts.batch(step), of_texts))
        norm = self.policy.accumulate(*terms)
        is_finite = count_step("grad_norm_policy", norm, metrics)
        metrics.include(here)
        if self.config.ppo.target_kl is not None:
            kl = here.reduce(self.distributed.all_reduce, self.distributed.gather_objects)
            if kl["approx_kl"] > self.config.ppo.target_kl:
                self.policy.discard()
                return False
            metrics.add("policy_steps", float(is_finite), 0.0)
        self.policy.step()
        return True

    def _step_critic(self, critic: Learner, minibatch: Experience, metrics: Metrics) -> None:
        objective = partial(value_objective, critic.model, self.config, metrics)
        count_step("grad_norm_value", critic.optimise((minibatch, objective)), metrics)

    def _announce(self, metrics: Metrics) -> None:
        """Metrics that are there whatever happens: counts of steps, which go into sums alone, and a
        loss of texts that is null where the policy waits for its critic."""
        metrics.add("skipped_steps", 0.0, 1.0)
        if self.config.ppo.target_kl is not None:
            metrics.add("policy_steps", 0.0, 1.0)
        if self.texts is not None:
            metrics.add("ptx_loss", 0.0, 0.0)
