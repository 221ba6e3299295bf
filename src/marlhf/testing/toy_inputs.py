"""What an estimator gets, from responses of a toy whose values are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marlhf.algorithm.estimators import (
    CreditInputs,
    Estimator,
    build_estimator,
    continuation_plan,
    estimator_requires,
)
from marlhf.algorithm.macro import discounts, macro_mask, reduce, segment_ids
from marlhf.algorithm.monte_carlo import spread_starts
from marlhf.common.registry import Spec
from marlhf.testing.toy import EOS, Prefix, Toy

OF_TOKENS = ("segment_ids", "token_ids")
LAM = 0.9


@dataclass(frozen=True)
class Subject:
    """An estimator under test, and what it asks for.

    max_prefixes   of a response that are continued at most, see `continuation_plan`
    """

    estimator: Estimator
    requires: frozenset[str]
    max_prefixes: int | None

    @staticmethod
    def of(spec: Spec | Estimator) -> Subject:
        """Build the estimator. Raises UserError."""
        estimator = build_estimator(spec)
        requires = estimator_requires(estimator)
        plan = continuation_plan(estimator) if "continuations" in requires else (0, None)
        return Subject(estimator, requires, plan[1])


def toy_inputs(
    subject: Subject, toy: Toy, responses: Sequence[Prefix], group_size: int, n: int
) -> CreditInputs:
    """Inputs with exact values, in macro actions of `n` tokens.

    responses   `group_size` in a row to each prompt; one that is cut is continued by bootstrap_B
    """
    lengths = torch.tensor([len(response) for response in responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    starts = (torch.arange(mask.shape[1]) % n == 0).expand_as(mask) & mask
    ids = segment_ids(starts, mask)
    mask_BM = macro_mask(ids)
    rewards_BT = _padded([toy.rewards(r) for r in responses])
    values_BM = reduce(
        _padded([[toy.value(r[:t]) for t in range(len(r))] for r in responses]), ids, "first"
    )
    lam_BM = torch.full(mask_BM.shape, LAM, dtype=torch.float64)
    reads_values = "values" in subject.requires
    continuation_values_BM = None
    if "continuations" in subject.requires:
        places = spread_starts(starts, subject.max_prefixes, toy.limit or toy.longest)
        sampled = reduce(places.double(), ids, "first") > 0
        continuation_values_BM = values_BM.masked_fill(mask_BM & ~sampled, torch.nan)
    ends = torch.tensor([toy.value(r) for r in responses], dtype=torch.float64)  # 0 if complete
    return CreditInputs(
        segment_ids=ids,
        mask_BM=mask_BM,
        rewards_BM=reduce(rewards_BT, ids, "sum", toy.gamma),
        discounts_BM=discounts(ids, toy.gamma),
        lam_BM=lam_BM,
        critic_lam_BM=lam_BM,
        returns_B=rewards_BT.sum(1),
        values_BM=values_BM if reads_values else None,
        bootstrap_B=ends if reads_values else None,
        finished_B=torch.tensor([r[-1] == EOS for r in responses]),
        group_size=group_size,
        token_ids=_padded(responses).long(),
        continuation_values_BM=continuation_values_BM,
    )


def sampled_inputs(subject: Subject, n: int, group_size: int) -> CreditInputs:
    """Responses to four prompts.

    The first are the longest, so that M differs over ranks. The last one is cut where its value is
    not 0, and has fewer tokens than others.
    """
    toy = Toy(longest=5, seed=3)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(toy.responses), generator=generator).tolist()
    shuffled = [toy.responses[i] for i in order]
    long = [r for r in shuffled if len(r) > 3]
    short = [r for r in shuffled if len(r) <= 3] * group_size
    many = group_size + 1
    responses = [*long[:many], *short[: 4 * group_size - many - 1], long[many][:3]]
    return toy_inputs(subject, toy, responses, group_size, n)


def with_changed(inputs: CreditInputs, change: Callable[[str, Tensor], Tensor]) -> CreditInputs:
    """The inputs with every tensor changed, by its name."""
    tensors = {k: v for k, v in vars(inputs).items() if isinstance(v, Tensor)}
    return replace(inputs, **{name: change(name, x) for name, x in tensors.items()})


def rows_of(inputs: CreditInputs, rows: slice) -> CreditInputs:
    """Some of the responses, without columns that are padding for all of them."""
    M = int(inputs.mask_BM[rows].sum(1).max())
    T = int((inputs.segment_ids[rows] >= 0).sum(1).max())

    def cut(name: str, x: Tensor) -> Tensor:
        return x[rows] if x.dim() == 1 else x[rows, : T if name in OF_TOKENS else M]

    return with_changed(inputs, cut)


def groups_of(inputs: CreditInputs) -> Iterator[CreditInputs]:
    """The responses to each prompt alone."""
    for first in range(0, len(inputs.mask_BM), inputs.group_size):
        yield rows_of(inputs, slice(first, first + inputs.group_size))


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    width = max(map(len, rows))
    padded = [[*map(float, row), *[0.0] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.float64)
