"""The laws of estimators hold for those built in, and plausible mistakes are each caught."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marlhf import Credit, CreditInputs
from marlhf.algorithm.estimators import RLOO
from marlhf.algorithm.macro import macro_lengths, reduce
from marlhf.common.errors import UserError
from marlhf.testing import check_estimator
from marlhf.testing.toy import Toy

BIASED = ["grpo", {"name": "grpo", "return_to_go": True}, "prefix_tree"]


@pytest.mark.parametrize(
    "spec", ["gae", "rloo", {"name": "rloo", "return_to_go": True}, "reinforce", "monte_carlo"]
)
def test_the_built_in_estimators_obey_every_law(spec: Any) -> None:
    check_estimator(spec)


@pytest.mark.parametrize("spec", BIASED)
def test_these_are_biased_and_obey_the_others(spec: Any) -> None:
    check_estimator(spec, unbiased=False)
    with pytest.raises(AssertionError, match="gradient: over all pairs of responses"):
        check_estimator(spec)


def test_the_toys_gradient_is_that_of_finite_differences() -> None:
    toy, step = Toy(), 1e-6
    for s, a in [(0, 0), (1, 2), (4, 1)]:
        values = []
        for sign in (1, -1):
            moved = Toy()
            logits = toy.logits.clone()
            logits[s, a] += sign * step
            moved.__dict__["logits"] = logits
            values.append(moved.value(()))
        slope = (values[0] - values[1]) / (2 * step)
        assert float(toy.gradient(range(toy.longest))[s, a]) == pytest.approx(slope, abs=1e-6)


def to_go(inputs: CreditInputs) -> Tensor:
    """Undiscounted reward from each macro action on."""
    rewards = inputs.rewards_BM.where(inputs.mask_BM, 0.0)
    return rewards.flip(1).cumsum(1).flip(1)


def values_of(inputs: CreditInputs) -> Tensor:
    assert inputs.values_BM is not None
    return inputs.values_BM.where(inputs.mask_BM, 0.0)


def with_values(function: Callable[[CreditInputs], Tensor]) -> Any:
    class Wrong:
        requires = frozenset({"values"})

        def __call__(self, inputs: CreditInputs) -> Credit:
            advantages = function(inputs)
            return Credit(advantages, advantages + values_of(inputs))

    return Wrong()


def from_returns(function: Callable[[CreditInputs], Tensor]) -> Any:
    class Wrong:
        requires = frozenset({"groups"})

        def __call__(self, inputs: CreditInputs) -> Credit:
            return Credit(function(inputs))

    return Wrong()


def next_values(inputs: CreditInputs) -> Tensor:
    return torch.nn.functional.pad(values_of(inputs)[:, 1:], (0, 1))


def groups(inputs: CreditInputs) -> Tensor:
    return inputs.returns_B.reshape(-1, inputs.group_size)


def group_mean(inputs: CreditInputs) -> Tensor:
    mean = groups(inputs).mean(1, keepdim=True)
    return mean.expand_as(groups(inputs)).reshape(-1, 1)


def per_response(inputs: CreditInputs, x: Tensor) -> Tensor:
    return x[:, None].expand_as(inputs.rewards_BM)


def mean_over_padding(inputs: CreditInputs) -> Tensor:
    return to_go(inputs) - inputs.rewards_BM.mean()


def whitened_on_each_rank(inputs: CreditInputs) -> Tensor:
    kept = to_go(inputs)[inputs.mask_BM]
    return (to_go(inputs) - kept.mean()) / kept.std()


def cut_at_holes(inputs: CreditInputs) -> Tensor:
    """The reward of what comes after an environment's tokens is lost."""
    before_hole = (inputs.segment_ids >= 0).int().cumprod(1)
    reached = reduce(before_hole.double(), inputs.segment_ids, "first")
    return to_go(inputs) * reached - values_of(inputs)


def all_reduce_where_it_pays(inputs: CreditInputs) -> Tensor:
    for column in inputs.rewards_BM.T:  # the ranks' longest responses differ
        inputs.all_reduce(column.sum())
    return to_go(inputs)


def whitened(inputs: CreditInputs, mistake: str) -> Tensor:
    """Returns from each macro action on, less the mean, over the standard deviation."""
    mask = torch.ones_like(inputs.mask_BM) if mistake == "padding" else inputs.mask_BM
    kept = to_go(inputs) * mask
    sums = inputs.all_reduce(torch.stack([kept.sum(), (kept**2).sum(), mask.sum()]))
    mean, variance = sums[0] / sums[2], sums[1] / sums[2] - (sums[0] / sums[2]) ** 2
    spread = (variance.clamp(min=0) + 1e-8).sqrt()
    return (kept - (sums[0] if mistake == "sum" else mean)) / spread


def discounted(inputs: CreditInputs, mistake: str = "") -> Credit:
    """One step of temporal difference, with the value after the last macro action."""
    mask = inputs.mask_BM
    assert inputs.bootstrap_B is not None
    is_last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    after = torch.where(is_last, inputs.bootstrap_B[:, None], next_values(inputs))
    if mistake == "bootstrap":
        after = after + is_last * inputs.bootstrap_B[:, None]
    discounts = inputs.discounts_BM
    if mistake == "discount":
        discounts = torch.nn.functional.pad(discounts[:, 1:], (0, 1))
    reward = inputs.rewards_BM
    targets = discounts * (reward + after) if mistake == "reward" else reward + discounts * after
    advantages = targets - values_of(inputs)
    return Credit(advantages, advantages if mistake == "targets" else targets)


def gae(inputs: CreditInputs, mistake: str = "") -> Credit:
    """GAE in plain loops, with the lambdas of the run."""
    bootstrap_B = inputs.bootstrap_B
    assert bootstrap_B is not None
    values, (B, M) = values_of(inputs), inputs.mask_BM.shape

    def summed(lam: Tensor) -> Tensor:
        advantages = torch.zeros_like(values)
        for b in range(B):
            count = int(inputs.mask_BM[b].sum())
            for k in range(count):
                weight = 1.0
                for j in range(k, count):
                    at_end = j + 1 == (M if mistake == "last column" else count)
                    after = bootstrap_B[b] if at_end else values[b, j + 1] if j + 1 < M else 0
                    discount = inputs.discounts_BM[b, j]
                    if mistake == "bootstrap not discounted" and at_end:
                        discount = 1.0
                    delta = inputs.rewards_BM[b, j] + discount * after - values[b, j]
                    advantages[b, k] += weight * delta
                    step = lam[b, min(j + 1, M - 1) if mistake == "next lambda" else j]
                    weight = weight * step
                    if mistake != "lambda not discounted":
                        weight = weight * inputs.discounts_BM[b, j]
        return advantages

    swapped = mistake == "lambdas swapped"
    lam, critic_lam = inputs.lam_BM, inputs.critic_lam_BM
    advantages, targets = (
        summed(critic_lam if swapped else lam),
        summed(lam if swapped else critic_lam),
    )
    return Credit(advantages, targets + values)


class PlainGAE:
    requires = frozenset({"values"})

    def __init__(self, mistake: str = "") -> None:
        self.mistake = mistake

    def __call__(self, inputs: CreditInputs) -> Credit:
        return gae(inputs, self.mistake)


class OneStep:
    requires = frozenset({"values"})

    def __init__(self, mistake: str = "") -> None:
        self.mistake = mistake

    def __call__(self, inputs: CreditInputs) -> Credit:
        return discounted(inputs, self.mistake)


MISTAKES: dict[str, tuple[Any, str]] = {
    "a sum where a mean belongs": (
        from_returns(lambda i: per_response(i, i.returns_B * macro_lengths(i.segment_ids).sum(1))),
        "gradient: ",
    ),
    "a mean where a sum belongs": (
        from_returns(lambda i: per_response(i, i.returns_B / i.mask_BM.sum(1))),
        "gradient: ",
    ),
    "the reward before is the macro action's": (
        with_values(lambda i: torch.nn.functional.pad(to_go(i)[:, :-1], (1, 0)) - values_of(i)),
        "gradient: ",
    ),
    "the value after the macro action is the baseline": (
        with_values(lambda i: to_go(i) - next_values(i)),
        "gradient: ",
    ),
    "the macro action's own reward is lost": (
        with_values(lambda i: to_go(i) - i.rewards_BM - values_of(i)),
        "rewards: 1 more for the first",
    ),
    "nothing follows": (with_values(lambda i: i.rewards_BM - values_of(i)), "gradient: "),
    "the baseline depends on the action": (
        from_returns(lambda i: per_response(i, i.returns_B.clamp(min=0))),
        "gradient: ",
    ),
    "the group's best is the baseline": (
        from_returns(
            lambda i: (
                (groups(i) - groups(i).amax(1, keepdim=True)).reshape(-1, 1).expand_as(i.rewards_BM)
            )
        ),
        "gradient: ",
    ),
    "the sign of the baseline": (
        with_values(lambda i: -to_go(i) + values_of(i)),
        "rewards: ",
    ),
    "a mean over padding too": (from_returns(mean_over_padding), "ranks: |padding: "),
    "whitened on each rank alone": (from_returns(whitened_on_each_rank), "ranks: "),
    "all_reduce on some ranks alone": (
        from_returns(all_reduce_where_it_pays),
        "ranks: two ranks call all_reduce unequally often",
    ),
    "returns are lost at an environment's tokens": (with_values(cut_at_holes), "holes: "),
    "the tokens' places count": (
        from_returns(lambda i: per_response(i, i.segment_ids.argmax(1).double())),
        "holes: ",
    ),
    "groups of the whole batch": (
        from_returns(lambda i: to_go(i) - to_go(i)[:1]),
        "order: |ranks: ",
    ),
    "the discount of the next macro action": (OneStep("discount"), "gradient: .*discounted by 0.9"),
    "the macro action's own reward discounted": (OneStep("reward"), "gradient: .*discounted by"),
    "the bootstrapped value twice": (OneStep("bootstrap"), "gradient: .*cut after 2 tokens"),
    "advantages for the critic to learn": (OneStep("targets"), r"targets: .*tokens \[\] is"),
    "the bootstrapped value in the last column": (PlainGAE("last column"), "ranks: .*M is 5 and 3"),
    "the bootstrapped value not discounted": (
        PlainGAE("bootstrap not discounted"),
        "gradient: .*discounted by 0.9 per token, cut after 2 tokens",
    ),
    "lambda without the discount": (
        PlainGAE("lambda not discounted"),
        "gradient: .*discounted by 0.9 .*wrong values",
    ),
    "the lambda of the next macro action": (PlainGAE("next lambda"), "gradient: .*wrong values"),
    "the critic's lambda for the policy": (PlainGAE("lambdas swapped"), "gradient: .*wrong values"),
    "cut responses are left out": (
        from_returns(lambda i: (to_go(i) - group_mean(i)) * i.finished_B[:, None]),
        "gradient: ",
    ),
    "another number each time": (
        from_returns(lambda i: torch.rand_like(i.rewards_BM)),
        "repetition: ",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_caught(mistake: str) -> None:
    estimator, law = MISTAKES[mistake]
    with pytest.raises(AssertionError, match=law):
        check_estimator(estimator)


def test_the_right_ones_beside_the_mistakes_pass() -> None:
    check_estimator(with_values(lambda i: to_go(i) - values_of(i)))
    check_estimator(from_returns(lambda i: per_response(i, i.returns_B) - group_mean(i)))
    check_estimator(from_returns(to_go))


def without_last(inputs: CreditInputs) -> CreditInputs:
    is_last = inputs.mask_BM & ~torch.nn.functional.pad(inputs.mask_BM[:, 1:], (0, 1))
    return replace(inputs, rewards_BM=inputs.rewards_BM.masked_fill(is_last, 0.0))


BIASED_MISTAKES: dict[str, tuple[Any, str]] = {
    "whitened with padding counted": (from_returns(lambda i: whitened(i, "padding")), "ranks: "),
    "whitened with a sum for the mean": (from_returns(lambda i: whitened(i, "sum")), "copies: "),
    "the group's mean less the return": (
        from_returns(lambda i: group_mean(i) - per_response(i, i.returns_B)),
        "rewards: .*the largest change is -0.667",
    ),
    "no credit at all": (from_returns(lambda i: i.rewards_BM * 0), "rewards: "),
    "credit of the future alone": (
        from_returns(lambda i: to_go(i) - i.rewards_BM),
        "rewards: .*first",
    ),
    "the last reward is lost": (from_returns(lambda i: to_go(without_last(i))), "rewards: .*last"),
}


@pytest.mark.parametrize("mistake", BIASED_MISTAKES)
def test_mistakes_are_caught_where_no_bias_is_allowed_for(mistake: str) -> None:
    estimator, law = BIASED_MISTAKES[mistake]
    with pytest.raises(AssertionError, match=law):
        check_estimator(estimator, unbiased=False)


def test_whitened_in_float32_breaks_no_law() -> None:
    def single(inputs: CreditInputs) -> Tensor:
        return whitened(replace(inputs, rewards_BM=inputs.rewards_BM.float()), "")

    check_estimator(from_returns(single), unbiased=False)


def test_equal_returns_of_a_group_are_among_the_inputs() -> None:
    def undefined(inputs: CreditInputs) -> Tensor:
        centred = groups(inputs) - groups(inputs).mean(1, keepdim=True)
        return per_response(inputs, (centred / groups(inputs).std(1, keepdim=True)).reshape(-1))

    with pytest.raises(UserError, match="advantages_BM of response 0 is not finite"):
        check_estimator(from_returns(undefined), unbiased=False)


def test_a_temporal_difference_obeys_every_law() -> None:
    check_estimator(OneStep())
    check_estimator(PlainGAE())


def test_responses_without_eos_are_among_the_inputs() -> None:
    def undefined(inputs: CreditInputs) -> Tensor:
        return to_go(inputs) / inputs.finished_B[:, None].double()

    with pytest.raises(UserError, match="is not finite"):
        check_estimator(from_returns(undefined))


def test_an_estimator_that_needs_more_responses() -> None:
    """Less the others' mean, over their own deviation: unbiased, and undefined for two."""

    def scaled(inputs: CreditInputs) -> Tensor:
        count, returns = inputs.group_size, groups(inputs)
        others = (returns.sum(1, keepdim=True) - returns) / (count - 1)
        squares = ((returns**2).sum(1, keepdim=True) - returns**2) / (count - 2)
        spread = (squares - others**2 * (count - 1) / (count - 2)).clamp(min=0).sqrt()
        return per_response(inputs, ((returns - others) / (1 + spread)).reshape(-1))

    with pytest.raises(
        UserError, match=r"is not finite; input: responses \[2\] and \[2\] of a toy"
    ):
        check_estimator(from_returns(scaled))
    check_estimator(from_returns(scaled), group_size=3)
    check_estimator(from_returns(scaled), group_size=4)
    with pytest.raises(UserError, match="group_size: given 8, must be 2 to 7"):
        check_estimator(from_returns(scaled), group_size=8)


def test_a_function_of_one_process_may_leave_ranks_out() -> None:
    def in_one_process(inputs: CreditInputs) -> Tensor:
        return whitened(replace(inputs, all_reduce=lambda x: x), "")

    check_estimator(from_returns(in_one_process), unbiased=False, ranks=False)
    with pytest.raises(AssertionError, match=r"ranks: .*is a sum not all_reduced"):
        check_estimator(from_returns(in_one_process), unbiased=False)


def test_a_fault_on_one_rank_is_told_as_it_is() -> None:
    def four_columns(inputs: CreditInputs) -> Tensor:
        last = inputs.rewards_BM[:, 3:].select(1, 0)  # none where responses are short
        return to_go(inputs) + 0 * inputs.all_reduce(last.sum())

    with pytest.raises(UserError, match="IndexError"):
        check_estimator(from_returns(four_columns), unbiased=False, segment_length=1)


def test_continuations_are_asked_for_as_in_a_run() -> None:
    class Continued:
        requires = frozenset({"continuations"})
        continuations = None

        def __call__(self, inputs: CreditInputs) -> Credit:
            assert inputs.continuation_values_BM is not None
            return Credit(to_go(inputs) - inputs.continuation_values_BM)

    with pytest.raises(UserError, match="continuations is None, must be a whole number"):
        check_estimator(Continued())

    class FewPrefixes(Continued):
        continuations: Any = 4
        max_prefixes = 2

    with pytest.raises(UserError, match="is not finite"):
        check_estimator(FewPrefixes())
    check_estimator({"name": "monte_carlo", "max_prefixes": 2})


def test_the_contract_comes_first() -> None:
    with pytest.raises(UserError, match="advantages_BM has shape"):
        check_estimator(from_returns(lambda i: i.returns_B))


@pytest.mark.parametrize("mistake", ["", "reset", "value", "baseline"])
def test_an_advantage_function_of_another_framework(mistake: str) -> None:
    """Over tokens, with a mask that has holes, behind the adapter of the documentation."""

    def their_gae(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> Any:
        after, value_after = torch.zeros(2, len(rewards)).double()
        advantages = torch.zeros_like(rewards)
        for t in reversed(range(rewards.shape[1])):
            there = mask[:, t]
            delta = rewards[:, t] + value_after - (0 if mistake == "baseline" else values[:, t])
            after = torch.where(there, delta + lam * after, 0 if mistake == "reset" else after)
            kept = 0 * value_after if mistake == "value" else value_after
            value_after = torch.where(there, values[:, t], kept)
            advantages[:, t] = after
        return advantages, advantages + values

    block = documented_adapter()
    names: dict[str, Any] = {"__name__": __name__, "Credit": Credit, "their_gae": their_gae}
    names["check_estimator"] = check_estimator
    if not mistake:
        exec(block, names)
        return
    law = "gradient: " if mistake == "baseline" else "holes: "
    with pytest.raises(AssertionError, match=law):
        exec(block, names)


DOCS = Path(__file__).parents[2] / "docs"


def documented_adapter() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "testing.md").read_text(), re.S)
    (adapter,) = [block for block in blocks if "their_gae" in block]
    return adapter


def test_the_estimators_of_the_documentation_obey_the_laws() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "estimators.md").read_text(), re.S)
    names: dict[str, Any] = {"__name__": __name__}
    for block in blocks:
        exec(block, names)
    check_estimator(names["centred"])
    check_estimator(names["OneStep"](), unbiased=False)
    with pytest.raises(AssertionError, match="gradient: "):  # for its weights
        check_estimator(names["OneStep"]())


def test_subclasses_of_what_is_built_in_are_told_apart() -> None:
    class Weighted(RLOO):
        def __call__(self, inputs: CreditInputs) -> Credit:
            credit = super().__call__(inputs)
            return replace(credit, weights_BM=(credit.advantages_BM > 0) * 1.0)

    check_estimator(Weighted(), unbiased=False)
    with pytest.raises(AssertionError, match="gradient"):
        check_estimator(Weighted())
