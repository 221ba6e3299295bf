"""GAE over macro actions, group-relative advantages and whitening, against loops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracles
from support.strategies import Ragged, Rows, differs, example, fast, ragged
from torch import Tensor

from marlhf.algorithm import macro
from marlhf.algorithm.advantages import gae

gammas = st.sampled_from([0.5, 0.9, 0.99, 1.0])
lams = st.sampled_from([0.0, 0.5, 0.95, 1.0])
values_how = st.sampled_from(["equal", "position", "last", "first"])
discount_how = st.sampled_from(["per_token", "per_macro"])


@dataclass(frozen=True)
class Problem:
    """A batch with rewards and values, and what is computed from them."""

    batch: Ragged
    gamma: float = 0.9
    lam: float = 0.8
    value: str = "equal"
    reward: str = "sum"
    discount: str = "per_token"
    truncated: bool = True

    @property
    def kl_rewards(self) -> Rows:
        return self.batch.noise("kl", 0.2)

    @property
    def task_rewards(self) -> Rows:
        """The score on the last token."""
        scores = self.batch.scalars("score")
        rows = zip(self.batch.lengths, scores, strict=True)
        return [[0.0] * (n - 1) + [score] if n else [] for n, score in rows]

    @property
    def values(self) -> Rows:
        return self.batch.noise("values")

    @property
    def last_values(self) -> list[float]:
        """V after the last token, 0 for the odd rows, which are finished."""
        last = self.batch.scalars("last")
        return [v if self.truncated and b % 2 == 0 else 0.0 for b, v in enumerate(last)]


def expected(p: Problem) -> tuple[Rows, Rows]:
    """Advantages and returns of macro actions, row by row."""
    advantages, returns = [], []
    rows = zip(p.batch.starts, p.kl_rewards, p.task_rewards, p.values, p.last_values, strict=True)
    for starts, kl, task, values, last in rows:
        kl_how = p.value if p.reward == "mean" else "sum"
        pairs = zip(
            oracles.reduce(kl, starts, kl_how, p.gamma),
            oracles.reduce(task, starts, "sum", p.gamma),
            strict=True,
        )
        a, g = oracles.gae(
            [x + y for x, y in pairs],
            oracles.reduce(values, starts, p.value),
            oracles.discounts(starts, p.gamma, p.discount),
            p.lam,
            last,
        )
        advantages.append(a)
        returns.append(g)
    return advantages, returns


def solve(p: Problem, **changes) -> tuple[Tensor, Tensor]:
    """The library's answer; `changes` replace an argument of `gae`."""
    batch, ids = p.batch, p.batch.ids
    kl = macro.reduce(
        batch.pad(p.kl_rewards), ids, p.value if p.reward == "mean" else "sum", p.gamma
    )
    task = macro.reduce(batch.pad(p.task_rewards), ids, "sum", p.gamma)
    arguments = {
        "rewards_BM": kl + task,
        "values_BM": macro.reduce(batch.pad(p.values), ids, p.value),
        "mask_BM": macro.macro_mask(ids),
        "discounts_BM": macro.discounts(ids, p.gamma, p.discount),
        "lam": p.lam,
        "bootstrap_B": batch.vector(p.last_values) if p.truncated else None,
    }
    return gae(**(arguments | changes))


@fast
@given(
    ragged(),
    gammas,
    lams,
    values_how,
    st.sampled_from(["sum", "mean"]),
    discount_how,
    st.booleans(),
)
def test_gae_is_the_loop(batch, gamma, lam, value, reward, discount, truncated):
    p = Problem(batch, gamma, lam, value, reward, discount, truncated)
    advantages, returns = solve(p)
    assert advantages.dtype == returns.dtype == batch.dtype
    assert not differs(advantages, expected(p)[0])
    assert not differs(returns, expected(p)[1])


@fast
@given(ragged(), gammas, lams)
def test_gae_ignores_what_lies_outside_the_mask(batch: Ragged, gamma: float, lam: float):
    mask = macro.macro_mask(batch.ids)
    rows = [
        [row[: sum(starts)] for row, starts in zip(batch.noise(name), batch.starts, strict=True)]
        for name in ("rewards", "values")
    ]
    discounts = [oracles.discounts(starts, gamma, "per_token") for starts in batch.starts]
    padded = [batch.pad_macro(r) for r in (*rows, discounts)]
    advantages, returns = gae(padded[0], padded[1], mask, padded[2], lam)
    solved = [
        oracles.gae(r, v, d, lam) if r else ([], [])
        for r, v, d in zip(*rows, discounts, strict=True)
    ]
    assert not differs(advantages, [a for a, _ in solved])
    assert not differs(returns, [g for _, g in solved])


@fast
@given(ragged(), gammas, lams, values_how, discount_how)
def test_one_token_a_macro_action_is_token_level_gae(batch, gamma, lam, value, discount):
    tokens = Ragged(
        tuple((True,) * n for n in batch.lengths), batch.padding, batch.seed, batch.dtype
    )
    p = Problem(tokens, gamma, lam, value, "mean", discount)
    rows = zip(p.kl_rewards, p.task_rewards, p.values, p.last_values, strict=True)
    plain = [
        oracles.token_gae([a + b for a, b in zip(kl, task, strict=True)], v, gamma, lam, last)
        for kl, task, v, last in rows
    ]
    assert not differs(macro.expand(solve(p)[0], tokens.ids), plain)


@fast
@given(ragged(), gammas, lams, values_how)
def test_one_macro_action_is_return_minus_value(batch, gamma, lam, value):
    whole = Ragged(
        tuple((True, *[False] * (n - 1)) if n else () for n in batch.lengths),
        batch.padding,
        batch.seed,
        batch.dtype,
    )
    p = Problem(whole, gamma, lam, value, truncated=False)
    bandit = []
    for kl, task, values in zip(p.kl_rewards, p.task_rewards, p.values, strict=True):
        collected = math.fsum(
            gamma**t * (a + b) for t, (a, b) in enumerate(zip(kl, task, strict=True))
        )
        starts = [t == 0 for t in range(len(kl))]
        bandit.append([collected - v for v in oracles.reduce(values, starts, value)])
    assert not differs(solve(p)[0], bandit)


@fast
@given(ragged(), st.sampled_from([0.5, 0.9, 0.99]), st.booleans())
def test_lam_1_macro_advantages_are_token_advantages_at_macro_starts(batch, gamma, truncated):
    p = Problem(batch, gamma, 1.0, value="first", truncated=truncated)
    at_starts = []
    rows = zip(batch.starts, p.kl_rewards, p.task_rewards, p.values, p.last_values, strict=True)
    for starts, kl, task, values, last in rows:
        rewards = [a + b for a, b in zip(kl, task, strict=True)]
        tokens = oracles.token_gae(rewards, values, gamma, 1.0, last)
        at_starts.append([a for a, start in zip(tokens, starts, strict=True) if start])
    assert not differs(solve(p)[0], at_starts)


@fast
@given(ragged(), gammas, lams, st.integers(1, 4), st.randoms(use_true_random=False))
def test_padding_and_batch_order_do_not_matter(batch, gamma, lam, extra, shuffle):
    p = Problem(batch, gamma, lam)
    order = list(range(len(batch.starts)))
    shuffle.shuffle(order)
    moved = Ragged(
        tuple(batch.starts[b] for b in order), batch.padding + extra, batch.seed, batch.dtype
    )
    result = solve(p)[0][order]
    ids = moved.ids
    both = [
        [a + b for a, b in zip(*r, strict=True)]
        for r in zip(p.kl_rewards, p.task_rewards, strict=True)
    ]
    again, _ = gae(
        macro.reduce(moved.pad([both[b] for b in order]), ids, "sum", gamma),
        macro.reduce(moved.pad([p.values[b] for b in order]), ids, "equal"),
        macro.macro_mask(ids),
        macro.discounts(ids, gamma),
        lam,
        moved.vector([p.last_values[b] for b in order]),
    )
    assert torch.allclose(result, again, rtol=0, atol=1e-6)


# Wrong implementations: the comparison of `test_gae_is_the_loop` must fail for each.


def off_by_one_discount(p: Problem):
    lengths = macro.macro_lengths(p.batch.ids)
    return solve(p, discounts_BM=p.gamma ** (lengths - 1).double())


def next_length_discount(p: Problem):
    """gamma to the length of the next macro action."""
    return solve(p, discounts_BM=macro.discounts(p.batch.ids, p.gamma).roll(-1, 1))


def macro_discount(p: Problem):
    other = "per_macro" if p.discount == "per_token" else "per_token"
    return solve(p, discounts_BM=macro.discounts(p.batch.ids, p.gamma, other))


def no_discount(p: Problem):
    return solve(p, discounts_BM=macro.macro_mask(p.batch.ids).double())


def no_bootstrap(p: Problem):
    return solve(p, bootstrap_B=None)


def bootstrap_finished_rows(p: Problem):
    return solve(p, bootstrap_B=p.batch.vector(p.batch.scalars("last")))


def bootstrap_in_last_column(p: Problem):
    """Added behind the padded width instead of behind each row's last macro action."""
    mask = macro.macro_mask(p.batch.ids)
    full = p.batch.vector(p.last_values) * mask[:, -1]
    return solve(p, bootstrap_B=full)


def bootstrap_undiscounted(p: Problem):
    mask = macro.macro_mask(p.batch.ids)
    last = (
        macro.discounts(p.batch.ids, p.gamma)
        .masked_fill(~mask, 1)
        .gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0))
    )
    return solve(p, bootstrap_B=p.batch.vector(p.last_values) / last[:, 0])


def values_of_next_token(p: Problem):
    shifted = p.batch.pad(p.values).nan_to_num().roll(-1, 1)
    return solve(p, values_BM=macro.reduce(shifted, p.batch.ids, p.value))


def values_of_previous_token(p: Problem):
    shifted = p.batch.pad(p.values).nan_to_num().roll(1, 1)
    return solve(p, values_BM=macro.reduce(shifted, p.batch.ids, p.value))


def rewards_from(p: Problem, kl: Tensor, task: Tensor):
    ids = p.batch.ids
    kl = macro.reduce(kl, ids, p.value if p.reward == "mean" else "sum", p.gamma)
    return solve(p, rewards_BM=kl + macro.reduce(task, ids, "sum", p.gamma))


def score_on_padding(p: Problem):
    """One token behind the last one, where the mask drops it."""
    task = p.batch.pad(p.task_rewards).nan_to_num().roll(1, 1)
    return rewards_from(p, p.batch.pad(p.kl_rewards), task)


def score_on_every_token(p: Problem):
    scores = p.batch.vector(p.batch.scalars("score"))[:, None]
    return rewards_from(p, p.batch.pad(p.kl_rewards), scores * p.batch.mask)


def undiscounted_rewards(p: Problem):
    both = p.batch.pad(p.kl_rewards) + p.batch.pad(p.task_rewards)
    return solve(p, rewards_BM=macro.reduce(both, p.batch.ids, "sum"))


def diluted_score(p: Problem):
    """The score averaged over its macro action along with the KL rewards."""
    both = p.batch.pad(p.kl_rewards) + p.batch.pad(p.task_rewards)
    return solve(p, rewards_BM=macro.reduce(both, p.batch.ids, "equal"))


def lam_per_token(p: Problem):
    """lambda^w between macro actions of w tokens: written out, since `gae` takes one lambda."""
    rows = [[], []]
    for b, starts in enumerate(p.batch.starts):
        values = oracles.reduce(p.values[b], starts, p.value)
        both = [x + y for x, y in zip(p.kl_rewards[b], p.task_rewards[b], strict=True)]
        rewards = oracles.reduce(both, starts, "sum", p.gamma)
        widths = [len(s) for s in oracles.segments(starts)]
        following = [*values, p.last_values[b]][1:]
        advantage, advantages = 0.0, []
        for r, w, v_next, v in reversed(list(zip(rewards, widths, following, values, strict=True))):
            disc = p.gamma**w
            advantage = r + disc * v_next - v + disc * p.lam**w * advantage
            advantages.insert(0, advantage)
        rows[0].append(advantages)
        rows[1].append([a + v for a, v in zip(advantages, values, strict=True)])
    return tuple(p.batch.pad_macro(r, fill=0.0) for r in rows)


def lam_forgotten(p: Problem):
    return solve(p, lam=1.0)


WRONG_GAE = {
    Problem(example()): [
        off_by_one_discount,
        next_length_discount,
        macro_discount,
        no_discount,
        no_bootstrap,
        bootstrap_finished_rows,
        bootstrap_in_last_column,
        bootstrap_undiscounted,
        values_of_next_token,
        values_of_previous_token,
        score_on_padding,
        score_on_every_token,
        undiscounted_rewards,
        lam_per_token,
        lam_forgotten,
    ],
    Problem(example(), reward="mean", discount="per_macro"): [
        macro_discount,
        diluted_score,
        score_on_padding,
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("problem", "wrong"), [(p, w) for p, ws in WRONG_GAE.items() for w in ws])
def test_wrong_advantages_are_told_apart(problem: Problem, wrong, dtype: torch.dtype):
    p = Problem(example(dtype), reward=problem.reward, discount=problem.discount)
    truth = expected(p)
    assert not any(differs(x, rows) for x, rows in zip(solve(p), truth, strict=True))
    advantages = wrong(p)[0]
    assert advantages.isfinite().all()
    assert differs(advantages, truth[0])


def test_lam_1_identity_fails_for_discounts_per_macro_action():
    """It would hold for gamma 1, which is why the identity is tested below 1."""
    at_starts = expected(Problem(example(), 0.9, 1.0, value="first"))[0]
    assert differs(
        solve(Problem(example(), 0.9, 1.0, value="first", discount="per_macro"))[0], at_starts
    )
    undiscounted = Problem(example(), 1.0, 1.0, value="first", discount="per_macro")
    at_starts = expected(Problem(example(), 1.0, 1.0, value="first"))[0]
    assert not differs(solve(undiscounted)[0], at_starts)
