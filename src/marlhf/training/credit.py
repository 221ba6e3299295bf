"""Credit of macro actions on all ranks: a rollout and its segments -> advantages, weighted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from marlhf.algorithm.estimators import ESTIMATORS, Estimator
from marlhf.algorithm.experience import MacroBatch, Rollout, macro_batch
from marlhf.algorithm.kl import KLCoefficient
from marlhf.algorithm.loss_weights import LossWeights, weighted
from marlhf.common.types import AllReduceSum
from marlhf.config import PPOConfig
from marlhf.distributed import Distributed


@dataclass(frozen=True)
class CreditAssignment:
    """Calls estimator and loss weights; where one fails on a rank, all ranks fail."""

    config: PPOConfig
    estimator: Estimator
    loss_weights: tuple[LossWeights, ...]
    kl: KLCoefficient
    distributed: Distributed

    def __call__(self, starts: Tensor, rollout: Rollout) -> MacroBatch:
        """Advantages and weights of an update's macro actions, from `starts [B,T]`."""

        def credit(all_reduce: AllReduceSum) -> MacroBatch:
            batch = self._macro_batch(starts, rollout, all_reduce)
            return weighted(batch, self.loss_weights, rollout.responses)

        return self.distributed.reduce_together(ESTIMATORS.label(self.estimator), credit)

    def held_out(self, starts: Tensor, rollout: Rollout) -> MacroBatch:
        """Advantages of held-out responses, not whitened and without weights."""
        return self._macro_batch(starts, rollout, self.distributed.all_reduce, whiten=False)

    def _macro_batch(
        self, starts: Tensor, rollout: Rollout, all_reduce: AllReduceSum, whiten: bool = True
    ) -> MacroBatch:
        config = self.config
        return macro_batch(
            starts,
            rollout.token_data(self.kl.in_rewards_coef),
            config.macro if whiten else replace(config.macro, whiten="none"),
            config.ppo,
            config.rollout.responses_per_prompt,
            all_reduce,
            self.estimator,
        )
