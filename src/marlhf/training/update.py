"""One PPO update: `epochs` passes over the rollout, one optimiser step per minibatch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from marlhf.algorithm.experience import Experience
from marlhf.algorithm.kl import KLCoefficient
from marlhf.common.seeds import row_seed
from marlhf.config import PPOConfig
from marlhf.distributed import Distributed
from marlhf.rollout.batching import minibatches, redrawn_minibatches
from marlhf.runs.metrics import Metrics
from marlhf.training.learner import Learner, Term, count_step
from marlhf.training.objectives import policy_objective, text_objective, value_objective
from marlhf.training.ptx import TextStream


@dataclass(frozen=True)
class PPOUpdate:
    """Optimiser steps of policy and critic on the experience of a rollout.

    texts   of the pretraining loss (PTX), or None
    """

    config: PPOConfig
    policy: Learner
    critic: Learner | None
    texts: TextStream | None
    kl: KLCoefficient
    distributed: Distributed

    def __call__(self, experience: Experience, index: int, metrics: Metrics) -> None:
        """Run PPO update `index` of the run, counted from 0.

        The first `critic.warmup_steps` updates train the critic alone.
        Raises DivergedError after too many consecutive non-finite gradients.
        """
        config = self.config
        indices = self._minibatches(len(experience), index)
        self._announce(metrics)
        train_policy = self.critic is None or index >= config.critic.warmup_steps
        with self.policy.in_use(), nullcontext() if self.critic is None else self.critic.in_use():
            for step, responses in enumerate(indices, index * len(indices)):
                minibatch = experience.select(responses)
                if train_policy:
                    train_policy = self._step_policy(minibatch, step, metrics)
                if self.critic is not None:
                    self._step_critic(self.critic, minibatch, metrics)
        self.policy.scheduler.step()
        if self.critic is not None:
            self.critic.scheduler.step()

    def _minibatches(self, responses: int, index: int) -> list[Tensor]:
        """The responses of each optimiser step of update `index`, epoch after epoch."""
        ppo, seed = self.config.ppo, self.config.seed
        size = responses, self.config.rollout.responses_per_prompt, ppo.minibatches
        first = minibatches(*size)
        if not ppo.redraw_minibatches:
            return first * ppo.epochs
        draw = partial(redrawn_minibatches, *size, row_seed(seed, index, 0))
        later = [draw(epoch, self.distributed.rank) for epoch in range(1, ppo.epochs)]
        return [part for epoch in (first, *later) for part in epoch]

    def _step_policy(self, minibatch: Experience, step: int, metrics: Metrics) -> bool:
        """Take optimiser step `step` of the run, and return whether to train the policy further.

        The policy's updates stop at the first minibatch whose KL exceeds `ppo.target_kl`: its step
        is not taken, but it counts in the metrics.
        """
        model, minibatch_metrics = self.policy.model, Metrics()
        objective = partial(
            policy_objective, model, self.config, self.kl.in_loss_coef, minibatch_metrics
        )
        terms: list[Term] = [(minibatch, objective)]
        if self.texts is not None:
            texts_objective = partial(text_objective, model, self.config, metrics)
            terms.append((self.texts.batch(step), texts_objective))
        gradient = self.policy.accumulate(*terms)
        count_step("grad_norm_policy", gradient, metrics)
        metrics.include(minibatch_metrics)
        if self.config.ppo.target_kl is not None:
            reduced = minibatch_metrics.reduce(self.distributed)
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
