"""The estimator contract: rewards and values of macro actions in, advantages out.

An estimator is any callable `CreditInputs -> Credit`, named in YAML by `ppo.estimator`. Its
attribute `requires` says what it reads beyond rewards: `values` loads and trains a critic, `groups`
wants several responses to each prompt, `continuations` samples the rest of responses again. The
built-in ones are frozen dataclasses whose fields are their configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from marlhf.algorithm.advantages import gae, group_relative, group_std
from marlhf.algorithm.lambdas import build_lambdas
from marlhf.common.errors import UserError, short_repr
from marlhf.common.plugins import copied, plugin_call, requirements
from marlhf.common.registry import Registry, Spec, plugin_name
from marlhf.common.types import AllReduceSum
from marlhf.config import PPOConfig

REQUIREMENTS = frozenset({"values", "groups", "continuations"})


@dataclass(frozen=True)
class CreditInputs:
    """What an estimator gets. M macro actions, T tokens; padding is at the end of both.

    [B,M] tensors are 0 where there is no macro action.

    segment_ids     [B,T] int64: the macro action of each token, -1 where masked
    mask_BM         [B,M] bool: which macro actions exist
    rewards_BM      reward of each, the KL penalty included where it is part of the reward
    discounts_BM    from the start of each to the start of the next
    lam_BM          lambda of each, see `ppo.lam`
    critic_lam_BM   lambda of the value targets
    returns_B       undiscounted sum of all token rewards of a response
    values_BM       the critic's; None unless `values` is required
    bootstrap_B     value after the last macro action: 0 for finished responses, and for all unless
                    `ppo.bootstrap_truncated`; None as above
    continuation_values_BM   mean return of continuations from the start of each, NaN where none
                    were sampled; None unless `continuations` are required
    finished_B      bool: not cut at the length limit
    group_size      consecutive responses that continue one prompt
    token_ids       [B,T] int64
    all_reduce      sums a tensor over ranks, for statistics of the full batch; every rank must call
                    it equally often
    """

    segment_ids: Tensor
    mask_BM: Tensor
    rewards_BM: Tensor
    discounts_BM: Tensor
    lam_BM: Tensor
    critic_lam_BM: Tensor
    returns_B: Tensor
    values_BM: Tensor | None
    bootstrap_B: Tensor | None
    finished_B: Tensor
    group_size: int
    token_ids: Tensor | None
    all_reduce: AllReduceSum = lambda x: x
    continuation_values_BM: Tensor | None = None


@dataclass(frozen=True)
class Credit:
    """What an estimator returns; entries outside the mask are ignored.

    advantages_BM   of each macro action, the same for all its tokens
    returns_BM      targets of the values; required with `values`
    weights_BM      non-negative weight of each in the policy loss; None: all 1
    """

    advantages_BM: Tensor
    returns_BM: Tensor | None = None
    weights_BM: Tensor | None = None


Estimator = Callable[[CreditInputs], Credit]

ESTIMATORS = Registry(
    kind="estimator",
    group="marlhf.estimators",
    factories={
        "gae": "marlhf.algorithm.estimators.GAE",
        "rloo": "marlhf.algorithm.estimators.RLOO",
        "grpo": "marlhf.algorithm.estimators.GRPO",
        "reinforce": "marlhf.algorithm.estimators.Reinforce",
        "prefix_tree": "marlhf.algorithm.prefix_tree.PrefixTree",
        "monte_carlo": "marlhf.algorithm.monte_carlo.MonteCarlo",
    },
    arguments=("inputs",),
)


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation with a critic; see `advantages.gae`.

    The value targets use `ppo.critic_lam` (Yuan et al. 2025, VC-PPO, arXiv 2503.01491).
    """

    requires: ClassVar[frozenset[str]] = frozenset({"values"})

    def __call__(self, inputs: CreditInputs) -> Credit:
        assert inputs.values_BM is not None
        of_macro_actions = inputs.rewards_BM, inputs.values_BM, inputs.mask_BM, inputs.discounts_BM
        advantages_BM, returns_BM = gae(*of_macro_actions, inputs.lam_BM, inputs.bootstrap_B)
        if not torch.equal(inputs.lam_BM, inputs.critic_lam_BM):
            _, returns_BM = gae(*of_macro_actions, inputs.critic_lam_BM, inputs.bootstrap_B)
        return Credit(advantages_BM, returns_BM)


@dataclass(frozen=True)
class RLOO:
    """Return less the mean return of the prompt's other responses.

    return_to_go   from each macro action on, less the others' from the macro action at the same
                   place (from their last one, where they have fewer), so that rewards inside a
                   response decide where credit goes; with rewards at the end alone, the same
    """

    return_to_go: bool = False
    requires: ClassVar[frozenset[str]] = frozenset({"groups"})

    def __call__(self, inputs: CreditInputs) -> Credit:
        if not self.return_to_go:
            relative_B = group_relative(inputs.returns_B, inputs.group_size, "rloo")
            return Credit(relative_B[:, None].expand_as(inputs.rewards_BM))
        to_go_GKM = _returns_to_go(inputs)
        others_GKM = to_go_GKM.sum(1, keepdim=True) - to_go_GKM
        relative_GKM = to_go_GKM - others_GKM / (inputs.group_size - 1)
        return Credit(relative_GKM.reshape(inputs.rewards_BM.shape))


@dataclass(frozen=True)
class GRPO:
    """Return less the group's mean, over the group's standard deviation of returns.

    return_to_go   as for `RLOO`, with the mean of all responses of the group
    """

    return_to_go: bool = False
    requires: ClassVar[frozenset[str]] = frozenset({"groups"})

    def __call__(self, inputs: CreditInputs) -> Credit:
        if not self.return_to_go:
            relative_B = group_relative(inputs.returns_B, inputs.group_size, "grpo")
            return Credit(relative_B[:, None].expand_as(inputs.rewards_BM))
        to_go_GKM = _returns_to_go(inputs)
        centred_GKM = to_go_GKM - to_go_GKM.mean(1, keepdim=True)
        returns_GK = inputs.returns_B.reshape(-1, inputs.group_size)
        relative_GKM = centred_GKM / group_std(returns_GK)[:, :, None]
        return Credit(relative_GKM.reshape(inputs.rewards_BM.shape))


@dataclass(frozen=True)
class Reinforce:
    """Return less the mean return of the full batch, over all ranks."""

    requires: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, inputs: CreditInputs) -> Credit:
        relative_B = group_relative(inputs.returns_B, 1, "reinforce", inputs.all_reduce)
        return Credit(relative_B[:, None].expand_as(inputs.rewards_BM))


def _returns_to_go(inputs: CreditInputs) -> Tensor:
    """Discounted return from each macro action on, [G,K,M] for G groups of K responses.

    Places beyond a response's last macro action hold the return from that one on.
    """
    mask_BM = inputs.mask_BM
    zeros_BM = torch.zeros_like(inputs.rewards_BM)
    to_go_BM, _ = gae(inputs.rewards_BM, zeros_BM, mask_BM, inputs.discounts_BM, 1.0)
    last_B = (mask_BM.sum(1) - 1).clamp(min=0)
    places_M = torch.arange(mask_BM.shape[1], device=mask_BM.device)
    held_BM = to_go_BM.gather(1, torch.minimum(places_M, last_B[:, None]))
    return held_BM.reshape(-1, inputs.group_size, mask_BM.shape[1])


def build_estimator(spec: Spec | Estimator) -> Estimator:
    """Build an estimator, see `Registry.build`. Raises UserError."""
    return ESTIMATORS.build(spec)


def estimator_requires(estimator: Estimator) -> frozenset[str]:
    """The attribute `requires`: names of `REQUIREMENTS`, none by default. Raises UserError."""
    return requirements(estimator, ESTIMATORS.label(estimator), REQUIREMENTS, frozenset())


def check_estimator(estimator: Estimator, config: PPOConfig) -> None:
    """Check an estimator, and lambda, against the keys of a run. Raises UserError."""
    for lam in (config.ppo.lam, config.ppo.critic_lam):
        if lam is not None:
            build_lambdas(lam)
    requires = estimator_requires(estimator)
    if "values" not in requires:
        name, groups = plugin_name(estimator), "groups" in requires
        if fault := config.estimator_fault(name, groups=groups):
            raise UserError(fault)
    if "continuations" in requires:
        continuation_plan(estimator)
        if fault := config.continuation_fault(plugin_name(estimator)):
            raise UserError(fault)


def continuation_plan(estimator: Estimator) -> tuple[int, int | None]:
    """What an estimator that requires continuations asks for. Raises UserError.

    Its attribute `continuations`, how many of each prefix, and `max_prefixes`, of how many prefixes
    of a response at most; None, the default: of all that end where a macro action starts.
    """
    with plugin_call(ESTIMATORS.label(estimator)):
        names = "continuations", "max_prefixes"
        plan: dict[str, Any] = {name: getattr(estimator, name, None) for name in names}
    for name, number in plan.items():
        if number is None and name == "max_prefixes":
            continue
        if type(number) is not int or number < 1:
            raise UserError(
                f"{ESTIMATORS.label(estimator)}: {name} is {short_repr(number)}, must be a whole "
                "number of at least 1"
            )
    return plan["continuations"], plan["max_prefixes"]


def estimate_credit(estimator: Estimator, inputs: CreditInputs) -> Credit:
    """Call an estimator and validate its result; its faults become a UserError that names it.

    Both inputs and result are copied, so that it cannot change the run's tensors. Returns 0 outside
    the mask.
    """
    name = ESTIMATORS.label(estimator)
    with plugin_call(name):
        credit = estimator(copied(inputs))
    return validated(credit, inputs, name)


def validated(credit: Any, inputs: CreditInputs, name: str) -> Credit:
    """What the estimator `name` returned for `inputs`: a copy, 0 outside the mask.

    Raises UserError.
    """
    if not isinstance(credit, Credit):
        raise UserError(f"{name}: returned {type(credit).__name__}, must be a marlhf.Credit")
    if credit.returns_BM is None and inputs.values_BM is not None:
        raise UserError(f"{name}: requires values, but gave no returns_BM for the critic to learn")
    checked: dict[str, Tensor | None] = {}
    for field in fields(Credit):
        x: Any = getattr(credit, field.name)
        checked[field.name] = None if x is None else _checked(x, inputs, f"{name}: {field.name}")
    weights = checked["weights_BM"]
    if weights is not None and bool((weights < 0).any()):
        raise UserError(f"{name}: weights_BM holds {float(weights.min()):g}, must be at least 0")
    assert checked["advantages_BM"] is not None
    return Credit(checked["advantages_BM"], checked["returns_BM"], weights)


def _are_finite(inputs: CreditInputs) -> bool:
    """Whether rewards and values are numbers; those of a model that has diverged are not."""
    tensors = [x for x in (inputs.rewards_BM, inputs.values_BM, inputs.returns_B) if x is not None]
    kept = [x[inputs.mask_BM] if x.dim() == 2 else x for x in tensors]
    return all(bool(x.isfinite().all()) for x in kept)


def _checked(x: Any, inputs: CreditInputs, where: str) -> Tensor:
    """A copy of a [B,M] tensor, 0 outside the mask. Raises UserError."""
    mask, like = inputs.mask_BM, inputs.rewards_BM
    if not isinstance(x, Tensor):
        raise UserError(f"{where} is {short_repr(x)}, must be a tensor")
    if x.shape != mask.shape:
        raise UserError(
            f"{where} has shape {tuple(x.shape)}, must be {tuple(mask.shape)}, one entry per macro "
            "action"
        )
    x = torch.where(mask, x.detach().to(like), torch.zeros_like(like))
    if not bool(x.isfinite().all()) and _are_finite(inputs):
        row = int((~x.isfinite()).any(1).nonzero()[0])
        raise UserError(f"{where} of response {row} is not finite")
    return x
