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
    continuation_plan,
    estimate_credit,
    estimator_requires,
)
from marlhf.algorithm.macro import discounts, expand, macro_mask, reduce, segment_ids
from marlhf.algorithm.monte_carlo import spread_starts
from marlhf.common.registry import Spec
from marlhf.testing.toy import Prefix, Toy

_TOLERANCE = 1e-5  # an estimator may count in float32


def check_estimator(
    estimator: Spec | Estimator,
    *,
    unbiased: bool = True,
    ranks: bool = True,
    segment_length: int | None = None,
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
    gradient     with exact values the expected policy gradient is the true one, up to a positive
                 factor, in a decision process that can be listed
    targets      with exact values the expected target of the critic is the value

    The last two are checked with discounts below 1, and on responses cut at a limit, where the
    estimator reads `discounts_BM` or `bootstrap_B`.

    unbiased         whether the gradient is claimed to be the true one; else it must only have a
                     positive product with it. GRPO's division by each group's standard deviation
                     needs False
    ranks            whether that law is claimed; False for a function that sees the full batch in
                     one process
    segment_length   tokens in a macro action; None: 1 and 2
    """
    estimator = build_estimator(estimator)
    requires = estimator_requires(estimator)
    lengths = [1, 2] if segment_length is None else [segment_length]
    for n in lengths:
        batch = _sampled(estimator, n)
        _check_repetition(estimator, batch)
        _check_padding(estimator, batch)
        _check_order(estimator, batch)
        _check_copies(estimator, batch)
        if ranks:
            _check_ranks(estimator, batch)
        _check_holes(estimator, batch)
        _check_expectations(estimator, Toy(), n, unbiased)
        if _reads(estimator, replace(batch, discounts_BM=batch.discounts_BM * 0.9), batch):
            _check_expectations(estimator, Toy(gamma=0.9), n, unbiased)
        if "values" in requires and _reads(
            estimator, replace(batch, bootstrap_B=torch.ones_like(batch.returns_B)), batch
        ):
            _check_expectations(estimator, Toy(limit=2), n, unbiased)


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

    def inputs(self, estimator: Estimator) -> CreditInputs:
        """What an estimator gets, with exact values where it requires any."""
        requires = estimator_requires(estimator)
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
        ends = [self.toy.value(r) for r in self.responses]  # 0 where complete
        discounts_BM = discounts(ids, self.toy.gamma)
        lam_BM = torch.full_like(discounts_BM, 0.9)
        reads_values = "values" in requires
        continuation_values_BM = None
        if "continuations" in requires:
            _, most = continuation_plan(estimator)
            places = spread_starts(starts, most, self.toy.limit or self.toy.longest)
            sampled = reduce(places.double(), ids, "first") > 0
            continuation_values_BM = values_BM.masked_fill(mask_BM & ~sampled, torch.nan)
        return CreditInputs(
            segment_ids=ids,
            mask_BM=mask_BM,
            rewards_BM=reduce(rewards_BT, ids, "sum", self.toy.gamma),
            discounts_BM=discounts_BM,
            lam_BM=lam_BM,
            critic_lam_BM=lam_BM,
            returns_B=rewards_BT.sum(1),
            values_BM=values_BM if reads_values else None,
            bootstrap_B=torch.tensor(ends, dtype=torch.float64) if reads_values else None,
            finished_B=torch.tensor([self.toy.is_complete(r) for r in self.responses]),
            group_size=self.group_size,
            token_ids=_padded(self.responses).long(),
            continuation_values_BM=continuation_values_BM,
        )


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor(
        [[*map(float, row), *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64
    )


def _sampled(estimator: Estimator, n: int) -> CreditInputs:
    """Three responses to each of four prompts.

    Those to the last two are shorter, so that the second rank has fewer macro actions.
    """
    toy = Toy(longest=5, seed=3)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(toy.responses), generator=generator).tolist()
    shuffled = [toy.responses[i] for i in order]
    long = [r for r in shuffled if len(r) > 3]
    short = [r for r in shuffled if len(r) <= 3]
    responses = [*long[:4], *short[:2], *short[1:]]
    return _Responses(toy, responses, 3, n).inputs(estimator)


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

    def other_tokens(name: str, x: Tensor) -> Tensor:
        return x.masked_fill(inputs.segment_ids < 0, 7) if name == "token_ids" else x

    description = "padding: token 7 wherever there is no macro action"
    _same(estimator, inputs, _with(inputs, other_tokens), lambda x: x, description)


def _check_order(estimator: Estimator, inputs: CreditInputs) -> None:
    prompts = torch.arange(len(inputs.mask_BM)).reshape(-1, inputs.group_size)
    rows = prompts[[1, 3, 0, 2]].reshape(-1)
    back = rows.argsort()
    changed = _with(inputs, lambda _, x: x[rows])
    _same(estimator, inputs, changed, lambda x: x[back], "order: the prompts in another order")


def _check_copies(estimator: Estimator, inputs: CreditInputs) -> None:
    B = len(inputs.mask_BM)
    twice = _with(inputs, lambda _, x: torch.cat([x, x]))
    description = "copies: every prompt twice (a sum where a mean belongs?)"
    _same(estimator, inputs, twice, lambda x: x[:B], description, tolerance=0.1)


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
    faults = [credit for credit in credits if isinstance(credit, BaseException)]
    for fault in faults:
        if not isinstance(fault.__cause__, _LeftAloneError):
            raise fault
    assert not faults, (
        "ranks: two ranks call all_reduce unequally often, and would wait for each other for ever"
    )
    alone = estimate_credit(estimator, inputs)
    for name in ("advantages_BM", "returns_BM", "weights_BM"):
        for rows, credit in zip(halves, credits, strict=True):
            of_rank, of_all = getattr(credit, name), getattr(alone, name)
            if of_rank is not None and of_all is not None:
                of_all = of_all[rows, : of_rank.shape[1]]
            law = "ranks: half of the prompts on each of two ranks (is a sum not all_reduced?)"
            _compare(of_all, of_rank, f"{law}: {name}")


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
        if name not in _OF_TOKENS:
            return x
        fill = -1 if name == "segment_ids" else 9
        hole = x.new_full((2,), fill)
        return torch.stack([torch.cat([r[:n], hole, r[n:]]) for r, n in zip(x, first, strict=True)])

    description = (
        "holes: two tokens that are no macro action's after the first one of each response"
    )
    _same(estimator, inputs, _with(inputs, with_hole), lambda x: x, description)


def _reads(estimator: Estimator, changed: CreditInputs, inputs: CreditInputs) -> bool:
    """Whether credit depends on what was changed."""
    before, after = estimate_credit(estimator, inputs), estimate_credit(estimator, changed)
    return not all(
        torch.equal(x, y)
        for x, y in zip(vars(before).values(), vars(after).values(), strict=True)
        if x is not None and y is not None
    )


def _check_expectations(estimator: Estimator, toy: Toy, n: int, unbiased: bool) -> None:
    """Every pair of responses to a prompt, weighted by its probability."""
    logits = toy.logits.clone().requires_grad_()
    logprobs = {r: toy.logprobs(r, logits) for r in toy.responses}
    chances = {r: float(x.detach().sum().exp()) for r, x in logprobs.items()}
    objective = torch.zeros((), dtype=torch.float64)
    targets: dict[Prefix, float] = {}
    for one in toy.responses:
        for other in toy.responses:
            chance = chances[one] * chances[other]
            inputs = _Responses(toy, [one, other], 2, n).inputs(estimator)
            credit = estimate_credit(estimator, inputs)
            advantages = credit.advantages_BM.detach()
            if credit.weights_BM is not None:
                advantages = advantages * credit.weights_BM
            advantages_BT = expand(advantages, inputs.segment_ids)
            for row, response in enumerate((one, other)):
                terms = logprobs[response] * advantages_BT[row, : len(response)]
                objective = objective + chance * terms.sum()
                if credit.returns_BM is not None and inputs.values_BM is not None:
                    for k in range(int(inputs.mask_BM[row].sum())):
                        target = chance * float(credit.returns_BM[row, k])
                        prefix = response[: k * n]
                        targets[prefix] = targets.get(prefix, 0.0) + target
    (gradient,) = torch.autograd.grad(objective, logits)
    description = f"over all pairs of responses of {toy.description}, in segments of {n},"
    _check_gradient(gradient, toy, _counted_from(estimator, toy, n), unbiased, description)
    for prefix, total in targets.items():
        times = 2 * sum(p for r, p in chances.items() if r[: len(prefix)] == prefix)
        assert abs(total / times - toy.value(prefix)) < _TOLERANCE, (
            f"targets: {description} the mean of returns_BM after the tokens {list(prefix)} is "
            f"{total / times:.4g}, the value there is {toy.value(prefix):.4g}"
        )


def _counted_from(estimator: Estimator, toy: Toy, n: int) -> list[list[int]]:
    """Where a token's advantage may count from, so many tokens into a response.

    The start of its macro action, the latest prefix that is continued, or the response's start.
    """
    starts = torch.arange(toy.longest) % n == 0
    allowed = [starts, torch.arange(toy.longest) == 0]
    if "continuations" in estimator_requires(estimator):
        _, most = continuation_plan(estimator)
        allowed.append(spread_starts(starts[None], most, toy.limit or toy.longest)[0])
    return [places.nonzero()[:, 0].tolist() for places in allowed]


def _check_gradient(
    gradient: Tensor, toy: Toy, starts: Sequence[list[int]], unbiased: bool, description: str
) -> None:
    """With the discounts that count from one of `starts`."""
    results: list[tuple[float, float]] = []
    for counted_from in starts:
        true = toy.gradient(counted_from)
        factor = float((gradient * true).sum() / (true * true).sum())
        results.append((float((gradient - factor * true).norm() / true.norm()), factor))
    error, factor = min(results)
    is_parallel = error < 10 * _TOLERANCE * max(1.0, factor)
    obeys = factor > 1e-6 and (is_parallel or not unbiased)
    wrong = (
        "a baseline depends on the action, or rewards are lost"
        if unbiased
        else "the policy learns the contrary of what is rewarded, or nothing"
    )
    assert obeys, (
        f"gradient: {description} the expected gradient is {factor:.3g} times the true one plus "
        f"{error:.3g} of its norm that points elsewhere: {wrong}"
    )


# --- comparison


def _same(
    estimator: Estimator,
    inputs: CreditInputs,
    changed: CreditInputs,
    back: Callable[[Tensor], Tensor],
    law: str,
    tolerance: float = _TOLERANCE,
) -> None:
    before, after = estimate_credit(estimator, inputs), estimate_credit(estimator, changed)
    for name in vars(before):
        x = getattr(after, name)
        _compare(getattr(before, name), None if x is None else back(x), f"{law}: {name}", tolerance)


def _compare(
    wanted: Tensor | None, actual: Tensor | None, law: str, tolerance: float = _TOLERANCE
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
