"""Laws of estimators.

An estimator of another framework is checked through a function that calls it on `CreditInputs`; one
over tokens with `segment_length=1`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from marlhf.algorithm.estimators import (
    CreditInputs,
    Estimator,
    build_estimator,
    estimate_credit,
    estimator_requires,
)
from marlhf.algorithm.macro import discounts, expand, macro_mask, reduce, segment_ids
from marlhf.common.registry import Spec
from marlhf.testing.toy import Prefix, Toy


def check_estimator(
    estimator: Spec | Estimator, *, unbiased: bool = True, segment_length: int | None = None
) -> None:
    """Check the laws of an estimator. Raises AssertionError, naming law and input.

    contract     shapes, finite numbers, inputs unchanged: what `marlhf ppo` refuses by itself
    repetition   the same inputs give the same credit
    padding      neither more of it nor what it holds matters
    order        prompts in another order get the same credit
    ranks        two ranks, with half of the prompts each, give what one gives
    holes        tokens of an environment within a response, which are no macro action's, change
                 nothing
    gradient     with exact values the expected policy gradient is the true one, up to a positive
                 factor, in a decision process that can be listed; skipped unless `unbiased`

    unbiased         whether the last law is claimed; GRPO's division by each group's standard
                     deviation breaks it
    segment_length   tokens in a macro action; None: 1 and 2
    """
    estimator = build_estimator(estimator)
    lengths = [1, 2] if segment_length is None else [segment_length]
    for n in lengths:
        batch = _sampled(estimator, n)
        _check_repetition(estimator, batch)
        _check_padding(estimator, batch)
        _check_order(estimator, batch)
        _check_ranks(estimator, batch)
        _check_holes(estimator, batch)
        if unbiased:
            _check_gradient(estimator, n)


# --- inputs


@dataclass(frozen=True)
class _Responses:
    """Responses to prompts of one toy, `group_size` in a row to each.

    n   tokens in a macro action
    """

    toy: Toy
    responses: Sequence[Prefix]
    group_size: int
    n: int

    @property
    def mask(self) -> Tensor:
        lengths = torch.tensor([len(r) for r in self.responses])
        return torch.arange(int(lengths.max())) < lengths[:, None]

    def inputs(self, requires: frozenset[str]) -> CreditInputs:
        """What an estimator gets, with exact values where it requires any."""
        mask = self.mask
        starts = (torch.arange(mask.shape[1]) % self.n == 0).expand_as(mask) & mask
        ids = segment_ids(starts, mask)
        mask_BM = macro_mask(ids)
        rewards_BT = _padded([self.toy.rewards(r) for r in self.responses])
        values_BM = reduce(
            _padded([[self.toy.value(r[:t]) for t in range(len(r))] for r in self.responses]),
            ids,
            "first",
        )
        discounts_BM = discounts(ids, 1.0)
        lam_BM = torch.full_like(discounts_BM, 0.9)
        reads_values = "values" in requires
        zeros_B = torch.zeros(len(self.responses), dtype=torch.float64)
        return CreditInputs(
            segment_ids=ids,
            mask_BM=mask_BM,
            rewards_BM=reduce(rewards_BT, ids, "sum"),
            discounts_BM=discounts_BM,
            lam_BM=lam_BM,
            critic_lam_BM=lam_BM,
            returns_B=rewards_BT.sum(1),
            values_BM=values_BM if reads_values else None,
            bootstrap_B=zeros_B if reads_values else None,
            finished_B=torch.ones(len(self.responses), dtype=torch.bool),
            group_size=self.group_size,
            token_ids=_padded(self.responses).long(),
            continuation_values_BM=values_BM if "continuations" in requires else None,
        )


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor(
        [[*map(float, row), *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64
    )


def _sampled(estimator: Estimator, n: int) -> CreditInputs:
    """Two responses each to six prompts, of all lengths."""
    toy = Toy(longest=5, seed=3)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(toy.responses), generator=generator)[:12].tolist()
    shortest = min(toy.responses, key=len)
    responses = [toy.responses[i] for i in chosen[:-1]] + [shortest]
    return _Responses(toy, responses, 2, n).inputs(estimator_requires(estimator))


_OF_TOKENS = ("segment_ids", "token_ids")


def _with(inputs: CreditInputs, change: Callable[[str, Tensor], Tensor]) -> CreditInputs:
    """The inputs with every tensor changed."""
    tensors = {k: v for k, v in vars(inputs).items() if isinstance(v, Tensor)}
    return replace(inputs, **{name: change(name, x) for name, x in tensors.items()})


def _narrow(inputs: CreditInputs) -> CreditInputs:
    """Without columns that are padding for all."""
    M, T = int(inputs.mask_BM.sum(1).max()), int((inputs.segment_ids >= 0).sum(1).max())

    def cut(name: str, x: Tensor) -> Tensor:
        return x if x.dim() == 1 else x[:, : T if name in _OF_TOKENS else M]

    return _with(inputs, cut)


# --- laws


def _check_repetition(estimator: Estimator, inputs: CreditInputs) -> None:
    _same(estimator, inputs, inputs, lambda x: x, "repetition: the same inputs twice")


def _check_padding(estimator: Estimator, inputs: CreditInputs) -> None:
    def wider(name: str, x: Tensor) -> Tensor:
        fill = -1 if name == "segment_ids" else 0
        return torch.nn.functional.pad(x, (0, 3), value=fill) if name in _OF_TOKENS else x

    description = "padding: three more tokens of padding"
    _same(estimator, inputs, _with(inputs, wider), lambda x: x, description)

    def spoilt(name: str, x: Tensor) -> Tensor:
        if x.dim() == 1 or name in ("segment_ids", "mask_BM"):
            return x
        padding = ~inputs.mask_BM if x.shape == inputs.mask_BM.shape else inputs.segment_ids < 0
        return x.masked_fill(padding, 7)

    description = "padding: the number 7 wherever there is no macro action"
    _same(estimator, inputs, _with(inputs, spoilt), lambda x: x, description)


def _check_order(estimator: Estimator, inputs: CreditInputs) -> None:
    groups = torch.arange(len(inputs.mask_BM)).reshape(-1, inputs.group_size).flip(0).reshape(-1)
    back = groups.argsort()
    changed = _with(inputs, lambda _, x: x[groups])
    _same(estimator, inputs, changed, lambda x: x[back], "order: the prompts from last to first")


def _check_ranks(estimator: Estimator, inputs: CreditInputs) -> None:
    half = len(inputs.mask_BM) // 2 // inputs.group_size * inputs.group_size
    halves = slice(half), slice(half, None)
    together = _Together()
    credits: list[Any] = [None, None]

    def work(rank: int) -> None:
        share = _narrow(_with(inputs, lambda _, x: x[halves[rank]]))
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
    assert not together.unequal, (
        "ranks: two ranks call all_reduce unequally often, and would wait for each other for ever"
    )
    for credit in credits:
        if isinstance(credit, BaseException):
            raise credit
    alone = estimate_credit(estimator, inputs)
    for name in ("advantages_BM", "returns_BM", "weights_BM"):
        for rows, credit in zip(halves, credits, strict=True):
            of_rank, of_all = getattr(credit, name), getattr(alone, name)
            if of_rank is not None and of_all is not None:
                of_all = of_all[rows, : of_rank.shape[1]]
            _compare(of_all, of_rank, f"ranks: half of the prompts on each of two ranks: {name}")


class _Together:
    """The sum over two threads, as `all_reduce` is over ranks."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._parts: list[list[Tensor]] = [[], []]
        self._has_left = [False, False]
        self.unequal = False

    def __call__(self, rank: int, x: Tensor) -> Tensor:
        mine, others = self._parts[rank], self._parts[1 - rank]
        with self._changed:
            mine.append(x.clone())
            self._changed.notify_all()
            count = len(mine)
            self._changed.wait_for(lambda: len(others) >= count or self._has_left[1 - rank])
            if len(others) < count:
                self.unequal = True
                raise RuntimeError("the other rank calls all_reduce less often")
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
        if name not in _OF_TOKENS:
            return x
        fill = -1 if name == "segment_ids" else 9
        hole = x.new_full((2,), fill)
        return torch.stack([torch.cat([r[:n], hole, r[n:]]) for r, n in zip(x, first, strict=True)])

    description = (
        "holes: two tokens that are no macro action's after the first one of each response"
    )
    _same(estimator, inputs, _with(inputs, with_hole), lambda x: x, description)


def _check_gradient(estimator: Estimator, n: int) -> None:
    """Every pair of responses to a prompt, weighted by its probability."""
    toy = Toy()
    requires = estimator_requires(estimator)
    logits = toy.logits.clone().requires_grad_()
    logprobs = {r: toy.logprobs(r, logits) for r in toy.responses}
    chances = {r: float(x.detach().sum().exp()) for r, x in logprobs.items()}
    objective = torch.zeros((), dtype=torch.float64)
    for one in toy.responses:
        for other in toy.responses:
            inputs = _Responses(toy, [one, other], 2, n).inputs(requires)
            credit = estimate_credit(estimator, inputs)
            advantages = credit.advantages_BM.detach()
            if credit.weights_BM is not None:
                advantages = advantages * credit.weights_BM
            advantages_BT = expand(advantages, inputs.segment_ids)
            for row, response in enumerate((one, other)):
                terms = logprobs[response] * advantages_BT[row, : len(response)]
                objective = objective + chances[one] * chances[other] * terms.sum()
    (gradient,) = torch.autograd.grad(objective, logits)
    true = toy.true_gradient
    factor = float((gradient * true).sum() / (true * true).sum())
    error = float((gradient - factor * true).norm() / true.norm())
    is_true = factor > 1e-6 and error < 1e-6 * max(1.0, factor)
    assert is_true, (
        f"gradient: over all pairs of responses of a toy with exact values, in segments of {n}, "
        f"the expected gradient is {factor:.3g} times the true one plus {error:.3g} of its norm "
        "that points elsewhere: a baseline depends on the action, or rewards are lost"
    )


# --- comparison


def _same(
    estimator: Estimator,
    inputs: CreditInputs,
    changed: CreditInputs,
    back: Callable[[Tensor], Tensor],
    law: str,
) -> None:
    before, after = estimate_credit(estimator, inputs), estimate_credit(estimator, changed)
    for name in vars(before):
        x = getattr(after, name)
        _compare(getattr(before, name), None if x is None else back(x), f"{law}: {name}")


def _compare(wanted: Tensor | None, actual: Tensor | None, law: str) -> None:
    if wanted is None or actual is None:
        assert wanted is actual, f"{law} is once None and once a tensor"
        return
    if not torch.allclose(actual, wanted, atol=1e-9, rtol=1e-9):
        row = int((actual - wanted).abs().amax(1).argmax())
        raise AssertionError(
            f"{law} of response {row} becomes {_short(actual[row])}, was {_short(wanted[row])}"
        )


def _short(x: Tensor) -> str:
    return str([round(v, 4) for v in x.tolist()])
