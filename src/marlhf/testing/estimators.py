"""Laws of estimators.

An estimator of another framework is checked through a function that calls it on `CreditInputs`; one
over tokens with `segment_length=1`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from marlhf.algorithm.estimators import CreditInputs, Estimator, estimate_credit
from marlhf.common.registry import Spec
from marlhf.testing.expectations import TOLERANCE, Case, check_expectations, longest_for
from marlhf.testing.toy import Toy
from marlhf.testing.toy_inputs import LAM, OF_TOKENS, Subject, rows_of, sampled_inputs, with_changed


def check_estimator(
    estimator: Spec | Estimator,
    *,
    unbiased: bool = True,
    ranks: bool = True,
    segment_length: int | None = None,
    group_size: int | None = None,
) -> None:
    """Check the laws of an estimator. Raises AssertionError, naming law and input.

    contract     shapes, finite numbers, inputs unchanged: what `marlhf ppo` refuses by itself
    repetition   the same inputs give the same credit
    padding      neither more of it nor the token ids in it matter
    order        prompts in another order get the same credit
    copies       a batch with every prompt twice gives about the same credit: to a tenth of the
                 largest, for the sake of sample variances
    ranks        two ranks, with half of the prompts each, give what one gives
    holes        tokens of an environment within a response, which are no macro action's, change
                 nothing
    rewards      more reward for the first macro action, or the last, raises an advantage of the
                 response
    gradient     with exact values the expected policy gradient is the true one, up to a positive
                 factor, in a decision process that can be listed
    targets      with exact values the expected target of the critic is the value

    The last two are checked with discounts below 1, and on responses that are cut where their value
    is not 0, where the estimator reads `discounts_BM` or `bootstrap_B`; both together where it
    reads both. Some responses end without EOS in all of them. Where it reads lambda, the values of
    every second macro action are also wrong, with a lambda of 1 before them, which leaves them out.

    unbiased         whether the gradient is claimed to be the true one; else it must only have a
                     positive product with it. GRPO's division by each group's standard deviation
                     needs False
    ranks            whether that law is claimed; False for a function that sees the full batch in
                     one process
    segment_length   tokens in a macro action; None: 1 and 2
    group_size       responses to a prompt, for an estimator that requires groups; None: 2, 3
    """
    subject = Subject.of(estimator)
    estimator = subject.estimator
    for n in [1, 2] if segment_length is None else [segment_length]:
        batch = sampled_inputs(subject, n, 3 if group_size is None else group_size)
        _check_repetition(estimator, batch)
        _check_padding(estimator, batch)
        _check_order(estimator, batch)
        _check_copies(estimator, batch)
        if ranks:
            _check_ranks(estimator, batch)
        _check_holes(estimator, batch)
        _check_rewards(estimator, batch)
        for case in _cases(subject, batch, n, group_size, unbiased):
            check_expectations(subject, case, unbiased)


def _cases(
    subject: Subject, batch: CreditInputs, n: int, group_size: int | None, unbiased: bool
) -> list[Case]:
    """What is listed for an estimator: it depends on what it reads."""

    def reads(**tensors: Tensor) -> bool:
        return _reads(subject.estimator, replace(batch, **tensors), batch)

    sizes = [2, 3] if "groups" in subject.requires else [2]
    sizes = sizes if group_size is None else [group_size]
    discounted = [1.0, 0.9] if reads(discounts_BM=batch.discounts_BM * 0.9) else [1.0]
    limits = [None]
    if "values" in subject.requires and reads(bootstrap_B=torch.ones_like(batch.returns_B)):
        limits = [None, 2]
    cases = [
        Case(Toy(longest_for(size), gamma=gamma, limit=limit), size, n)
        for size in sizes
        for limit in limits
        for gamma in discounted
        if limit is None or limit < longest_for(size)
    ]
    if unbiased and "values" in subject.requires:
        toy = Toy(longest_for(sizes[0]), gamma=discounted[-1])
        lower = torch.where(batch.mask_BM, LAM / 2, 0.0).double()
        if reads(lam_BM=lower):
            cases.append(Case(toy, sizes[0], n, "advantages"))
        if reads(critic_lam_BM=lower):
            cases.append(Case(toy, sizes[0], n, "targets"))
    return cases


# --- laws


def _check_repetition(estimator: Estimator, inputs: CreditInputs) -> None:
    _same(estimator, inputs, inputs, lambda x: x, "repetition: the same inputs twice")


def _check_padding(estimator: Estimator, inputs: CreditInputs) -> None:
    def wider(name: str, x: Tensor) -> Tensor:
        fill = -1 if name == "segment_ids" else 0
        return torch.nn.functional.pad(x, (0, 3), value=fill) if name in OF_TOKENS else x

    description = "padding: three more tokens of padding"
    _same(estimator, inputs, with_changed(inputs, wider), lambda x: x, description)

    def other_tokens(name: str, x: Tensor) -> Tensor:
        return x.masked_fill(inputs.segment_ids < 0, 7) if name == "token_ids" else x

    description = "padding: token 7 wherever there is no macro action"
    _same(estimator, inputs, with_changed(inputs, other_tokens), lambda x: x, description)


def _check_order(estimator: Estimator, inputs: CreditInputs) -> None:
    prompts = torch.arange(len(inputs.mask_BM)).reshape(-1, inputs.group_size)
    rows = prompts[[1, 3, 0, 2]].reshape(-1)
    back = rows.argsort()
    shuffled = with_changed(inputs, lambda _, x: x[rows])
    _same(estimator, inputs, shuffled, lambda x: x[back], "order: the prompts in another order")


def _check_copies(estimator: Estimator, inputs: CreditInputs) -> None:
    B = len(inputs.mask_BM)
    twice = with_changed(inputs, lambda _, x: torch.cat([x, x]))
    description = "copies: every prompt twice (a sum where a mean belongs?)"
    _same(estimator, inputs, twice, lambda x: x[:B], description, tolerance=0.1)


def _check_ranks(estimator: Estimator, inputs: CreditInputs) -> None:
    half = len(inputs.mask_BM) // 2 // inputs.group_size * inputs.group_size
    halves = slice(half), slice(half, None)
    together = _Together()
    credits: list[Any] = [None, None]

    def work(rank: int) -> None:
        share = rows_of(inputs, halves[rank])
        try:
            share = replace(share, all_reduce=lambda x: together(rank, x))
            credits[rank] = estimate_credit(estimator, share)
        except BaseException as error:  # raised in the caller's thread
            credits[rank] = error
        finally:
            together.leave(rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    faults = [credit for credit in credits if isinstance(credit, BaseException)]
    for fault in faults:
        if not isinstance(fault.__cause__, _LeftAloneError):
            raise fault
    assert not faults, (
        "ranks: two ranks call all_reduce unequally often, and would wait for each other for ever"
    )
    alone = estimate_credit(estimator, inputs)
    law = (
        "ranks: half of the prompts on each of two ranks, where M is {} (is a sum not all_reduced, "
        "or the padding to M counted?)"
    )
    for name in ("advantages_BM", "returns_BM", "weights_BM"):
        for rows, credit in zip(halves, credits, strict=True):
            of_rank, of_all = getattr(credit, name), getattr(alone, name)
            if of_rank is not None and of_all is not None:
                of_all = of_all[rows, : of_rank.shape[1]]
                widths = f"{inputs.mask_BM.shape[1]} and {of_rank.shape[1]}"
                _compare(of_all, of_rank, f"{law.format(widths)}: {name}")


class _LeftAloneError(RuntimeError):
    """The other rank calls all_reduce less often."""


class _Together:
    """The sum over two threads, as `all_reduce` is over ranks."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._parts: list[list[Tensor]] = [[], []]
        self._has_left = [False, False]

    def __call__(self, rank: int, x: Tensor) -> Tensor:
        mine, others = self._parts[rank], self._parts[1 - rank]
        with self._changed:
            mine.append(x.clone())
            self._changed.notify_all()
            count = len(mine)
            self._changed.wait_for(lambda: len(others) >= count or self._has_left[1 - rank])
            if len(others) < count:
                raise _LeftAloneError
            return self._parts[0][count - 1] + self._parts[1][count - 1]

    def leave(self, rank: int) -> None:
        """Say that this rank will not call again."""
        with self._changed:
            self._has_left[rank] = True
            self._changed.notify_all()


def _check_holes(estimator: Estimator, inputs: CreditInputs) -> None:
    """Two tokens of an environment after the first macro action of each response."""
    first = (inputs.segment_ids == 0).sum(1)

    def with_hole(name: str, x: Tensor) -> Tensor:
        if name not in OF_TOKENS:
            return x
        fill = -1 if name == "segment_ids" else 9
        hole = x.new_full((2,), fill)
        return torch.stack([torch.cat([r[:n], hole, r[n:]]) for r, n in zip(x, first, strict=True)])

    description = (
        "holes: two tokens that are no macro action's after the first one of each response"
    )
    _same(estimator, inputs, with_changed(inputs, with_hole), lambda x: x, description)


def _check_rewards(estimator: Estimator, inputs: CreditInputs) -> None:
    """One response after the other gets more."""
    counts_B = inputs.mask_BM.sum(1)
    before_BM = estimate_credit(estimator, inputs).advantages_BM
    for name, places_B in (("first", counts_B * 0), ("last", counts_B - 1)):
        largest = -torch.inf
        for row in (counts_B > 1).nonzero()[:, 0].tolist():
            more_BM, more_B = inputs.rewards_BM.clone(), inputs.returns_B.clone()
            more_BM[row, places_B[row]] += 1
            more_B[row] += 1
            more = replace(inputs, rewards_BM=more_BM, returns_B=more_B)
            change_BM = estimate_credit(estimator, more).advantages_BM - before_BM
            largest = max(largest, float(change_BM[row][inputs.mask_BM[row]].max()))
        assert largest > TOLERANCE, (
            f"rewards: 1 more for the {name} macro action of a response raises none of its "
            f"advantages, in any of the responses; the largest change is {largest:.3g}"
        )


def _reads(estimator: Estimator, changed: CreditInputs, inputs: CreditInputs) -> bool:
    """Whether credit depends on what was changed."""
    before, after = estimate_credit(estimator, inputs), estimate_credit(estimator, changed)
    return not all(
        torch.equal(x, y)
        for x, y in zip(vars(before).values(), vars(after).values(), strict=True)
        if x is not None and y is not None
    )


# --- comparison


def _same(
    estimator: Estimator,
    inputs: CreditInputs,
    changed: CreditInputs,
    back: Callable[[Tensor], Tensor],
    law: str,
    tolerance: float = TOLERANCE,
) -> None:
    before, after = estimate_credit(estimator, inputs), estimate_credit(estimator, changed)
    for name in vars(before):
        x = getattr(after, name)
        _compare(getattr(before, name), None if x is None else back(x), f"{law}: {name}", tolerance)


def _compare(
    wanted: Tensor | None, actual: Tensor | None, law: str, tolerance: float = TOLERANCE
) -> None:
    """Equal up to `tolerance` of the largest number."""
    if wanted is None or actual is None:
        assert wanted is actual, f"{law} is once None and once a tensor"
        return
    if float((actual - wanted).abs().max()) > tolerance * max(1e-3, float(wanted.abs().max())):
        row = int((actual - wanted).abs().amax(1).argmax())
        raise AssertionError(
            f"{law} of response {row} becomes {_short(actual[row])}, was {_short(wanted[row])}"
        )


def _short(x: Tensor) -> str:
    return str([round(v, 4) for v in x.tolist()])
