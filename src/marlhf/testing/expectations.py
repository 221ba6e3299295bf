"""Exact laws: every group of responses of a toy, weighted by its probability."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from marlhf.algorithm.estimators import ESTIMATORS, Credit, CreditInputs, validated
from marlhf.algorithm.macro import expand
from marlhf.algorithm.monte_carlo import spread_starts
from marlhf.common.errors import UserError
from marlhf.common.plugins import copied, plugin_call
from marlhf.testing.toy import Prefix, Toy
from marlhf.testing.toy_inputs import Subject, groups_of, toy_inputs

TOLERANCE = 1e-5  # an estimator may count in float32
MOST_GROUPS = 2500

Spoilt = Literal["advantages", "targets"]


@dataclass(frozen=True)
class Case:
    """What is listed.

    group_size   responses to a prompt
    n            tokens in a macro action
    spoilt       what must not depend on wrong values: those of every second macro action are, where
                 lambda is 1 for the macro action before. What does not count has a lambda that lets
                 them in, so that the two lambdas cannot be mistaken for one another. None: all
                 values are exact
    """

    toy: Toy
    group_size: int
    n: int
    spoilt: Spoilt | None = None

    @property
    def description(self) -> str:
        """The case in words, for messages."""
        which = "pairs" if self.group_size == 2 else f"groups of {self.group_size}"
        words = f"over all {which} of responses of {self.toy.description}, in segments of {self.n}"
        if self.spoilt is not None:
            words += (
                ", with wrong values at every second segment, where lambda of the one before is 1"
            )
        return words


def longest_for(group_size: int) -> int:
    """The longest toy, of up to 3 tokens, whose groups can be listed. Raises UserError."""
    for longest in (3, 2, 1):
        if len(Toy(longest).responses) ** group_size <= MOST_GROUPS:
            return longest
    most = int(math.log(MOST_GROUPS, len(Toy(1).responses)))
    raise UserError(
        f"group_size: given {group_size}, must be 2 to {most}, so that groups can be listed"
    )


def check_expectations(subject: Subject, case: Case, unbiased: bool) -> None:
    """The laws of gradient and targets. Raises AssertionError."""
    toy = case.toy
    chances = {r: float(toy.logprobs(r, toy.logits).sum().exp()) for r in toy.responses}
    groups = list(itertools.product(toy.responses, repeat=case.group_size))
    responses = [response for group in groups for response in group]
    inputs = toy_inputs(subject, toy, responses, case.group_size, case.n)
    if case.spoilt is not None:
        inputs = _spoilt(inputs, responses, case)
    expected = {r: torch.zeros(len(r), dtype=torch.float64) for r in toy.responses}
    targets: dict[Prefix, float] = {}
    for group, (credit, ids) in zip(groups, _credits(subject, inputs, groups, case), strict=True):
        chance = math.prod(chances[r] for r in group)
        advantages_BM = credit.advantages_BM
        if credit.weights_BM is not None:
            advantages_BM = advantages_BM * credit.weights_BM
        advantages_BT = expand(advantages_BM, ids)
        for row, response in enumerate(group):
            expected[response] += chance * advantages_BT[row, : len(response)]
            if credit.returns_BM is None:
                continue
            for k, target in enumerate(credit.returns_BM[row, : int(ids[row].max()) + 1].tolist()):
                prefix = response[: k * case.n]
                targets[prefix] = targets.get(prefix, 0.0) + chance * target
    if case.spoilt != "targets":
        _check_gradient(_gradient(toy, expected) / case.group_size, subject, case, unbiased)
    if case.spoilt == "advantages":
        return
    for prefix, total in targets.items():
        times = case.group_size * sum(p for r, p in chances.items() if r[: len(prefix)] == prefix)
        assert abs(total / times - toy.value(prefix)) < TOLERANCE, (
            f"targets: {case.description}, the mean of returns_BM after the tokens {list(prefix)} "
            f"is {total / times:.4g}, the value there is {toy.value(prefix):.4g}"
        )


def _credits(
    subject: Subject, inputs: CreditInputs, groups: Sequence[Sequence[Prefix]], case: Case
) -> list[tuple[Credit, Tensor]]:
    """Credit of each group, with its segment ids. Raises UserError, naming the input."""
    name = ESTIMATORS.label(subject.estimator)
    credits: list[tuple[Credit, Tensor]] = []
    try:
        with plugin_call(name):
            for part in groups_of(inputs):
                credit = validated(subject.estimator(copied(part)), part, name)
                credits.append((credit, part.segment_ids))
    except UserError as error:
        group = " and ".join(str(list(response)) for response in groups[len(credits)])
        raise UserError(f"{error}; input: responses {group} of {case.toy.description}") from error
    return credits


def _spoilt(inputs: CreditInputs, responses: Sequence[Prefix], case: Case) -> CreditInputs:
    """Values that are wrong before every second macro action, and lambdas that leave them out."""
    assert inputs.values_BM is not None
    places_M = torch.arange(inputs.mask_BM.shape[1])
    is_wrong_M = places_M % 2 == 1
    generator = torch.Generator().manual_seed(5)
    faults = {p: float(torch.randn((), generator=generator)) for p in case.toy.prefixes}
    faults_BM = torch.tensor(
        [[faults.get(r[: k * case.n], 0.0) for k in places_M.tolist()] for r in responses],
        dtype=torch.float64,
    )
    right_M = torch.where(is_wrong_M, 0.5, 1.0).double()  # of the macro action before a wrong value
    right_BM = right_M.expand_as(faults_BM) * inputs.mask_BM
    wrong_BM = torch.full_like(right_BM, 0.5) * inputs.mask_BM
    lambdas = (right_BM, wrong_BM) if case.spoilt == "advantages" else (wrong_BM, right_BM)
    return replace(
        inputs,
        values_BM=inputs.values_BM + faults_BM * is_wrong_M * inputs.mask_BM,
        lam_BM=lambdas[0],
        critic_lam_BM=lambdas[1],
    )


# --- the gradient


def _gradient(toy: Toy, advantages: dict[Prefix, Tensor]) -> Tensor:
    """Of the expected loss by the logits, [prefixes, 3]; `advantages` are weighted by chances."""
    logits = toy.logits.clone().requires_grad_()
    terms = [toy.logprobs(response, logits) @ x for response, x in advantages.items()]
    (gradient,) = torch.autograd.grad(torch.stack(terms).sum(), logits)
    return gradient


def _counted_from(subject: Subject, toy: Toy, n: int) -> list[list[int]]:
    """Where a token's advantage may count from, so many tokens into a response.

    The start of its macro action, the latest prefix that is continued, or the response's start.
    """
    starts = torch.arange(toy.longest) % n == 0
    allowed = [starts, torch.arange(toy.longest) == 0]
    if "continuations" in subject.requires:
        limit = toy.limit or toy.longest
        allowed.append(spread_starts(starts[None], subject.max_prefixes, limit)[0])
    return [places.nonzero()[:, 0].tolist() for places in allowed]


def _check_gradient(gradient: Tensor, subject: Subject, case: Case, unbiased: bool) -> None:
    """With the discounts that count from one of the starts that are allowed."""
    trues = [case.toy.gradient(places) for places in _counted_from(subject, case.toy, case.n)]
    factors = [float((gradient * true).sum() / (true * true).sum()) for true in trues]
    rests = [gradient - factor * true for factor, true in zip(factors, trues, strict=True)]
    errors = [float(rest.norm() / true.norm()) for rest, true in zip(rests, trues, strict=True)]
    best = errors.index(min(errors))
    error, factor, rest = errors[best], factors[best], rests[best]
    is_parallel = error < 10 * TOLERANCE * max(1.0, factor)
    if factor > 1e-6 and (is_parallel or not unbiased):
        return
    if factor <= 1e-6:
        wrong = "the policy learns the contrary of what is rewarded, or nothing"
    elif case.spoilt is not None:
        wrong = "a lambda of 1 lets the next value in, as if it were another's"
    else:
        wrong = "a baseline depends on the action, or rewards are lost"
    s, token = divmod(int(rest.abs().argmax()), rest.shape[1])
    wanted, actual = float(factor * trues[best][s, token]), float(gradient[s, token])
    raise AssertionError(
        f"gradient: {case.description}, the expected gradient is {factor:.3g} times the true one "
        f"plus {error:.3g} of its norm that points elsewhere, most of it for token {token} after "
        f"{list(case.toy.prefixes[s])}: {actual:.3g}, not {wanted:.3g}; {wrong}"
    )
