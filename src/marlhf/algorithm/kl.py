"""The coefficient of the KL penalty: fixed, or adapted towards a target KL."""

from __future__ import annotations

import math
from collections.abc import Collection

from marlhf.common.errors import UserError
from marlhf.common.types import REF_LOGPROBS
from marlhf.config import KLSettings

_LARGEST_ERROR = 0.2


def reads_reference(settings: KLSettings, required: Collection[str]) -> bool:
    """Whether an update needs the reference's log-probabilities.

    It does for the KL penalty, and where a segmenter or token reward requires `ref_logprobs`.
    """
    return settings.coef > 0 or not REF_LOGPROBS.isdisjoint(required)


class KLCoefficient:
    """The current coefficient of the KL penalty, and where it applies.

    in_loss   the penalty is part of the policy's loss, not of the rewards
    """

    def __init__(self, settings: KLSettings, in_loss: bool) -> None:
        self.settings = settings
        self.in_loss = in_loss
        self.coef = settings.coef

    @property
    def in_rewards_coef(self) -> float:
        """Weight of the penalty in the rewards; 0 where it is in the loss."""
        return 0.0 if self.in_loss else self.coef

    @property
    def in_loss_coef(self) -> float:
        """Weight of the penalty in the policy's loss; 0 where it is in the rewards."""
        return self.coef if self.in_loss else 0.0

    def update(self, kl: float, responses: int) -> None:
        """Adapt the coefficient after an update whose mean KL is `kl` nats per response:

            coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * responses / horizon

        Without a target the coefficient is fixed. Source: Ziegler et al. 2019 (arXiv 1909.08593),
        section 2.2, with the gain given as a horizon, as in their code.
        """
        target, horizon = self.settings.target, self.settings.horizon
        if target is not None and math.isfinite(kl):
            error = min(max(kl / target - 1, -_LARGEST_ERROR), _LARGEST_ERROR)
            self.coef *= 1 + error * responses / horizon

    def state_dict(self) -> dict[str, float]:
        """The coefficient, for checkpoints."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Resume from a saved coefficient. Raises UserError."""
        if not isinstance(state["coef"], int | float) or not math.isfinite(state["coef"]):
            raise UserError(f"coef is {state['coef']!r}, must be a finite number")
        self.coef = state["coef"]
