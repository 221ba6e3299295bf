"""What the library computes, written again as plain loops over one response at a time.

Nothing here imports the library or torch. A response is a list of floats, one a token; `starts`
is a list of bool, one a token; there is no padding. Sums are written out from their definitions
(a discounted sum, not a recursion, where the library has the recursion).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Floats = Sequence[float]
Bools = Sequence[bool]


# Macro actions


def segments(starts: Bools) -> list[range]:
    """The token positions of each macro action."""
    begins = [t for t, start in enumerate(starts) if start]
    return [range(a, b) for a, b in pairwise([*begins, len(starts)])]


def segment_ids(starts: Bools) -> list[int]:
    ids = []
    for k, segment in enumerate(segments(starts)):
        ids += [k for _ in segment]
    return ids


def reduce(x: Floats, starts: Bools, how: str, discount: float = 1.0) -> list[float]:
    result = []
    for segment in segments(starts):
        part = [x[t] for t in segment]
        if how == "equal":
            number = math.fsum(part) / len(part)
        elif how == "position":
            weights = [1 / (i + 1) for i in range(len(part))]
            number = math.fsum(w * p for w, p in zip(weights, part, strict=True))
            number /= math.fsum(weights)
        elif how == "last":
            number = part[-1]
        elif how == "first":
            number = part[0]
        elif how == "sum":
            number = math.fsum(discount**i * p for i, p in enumerate(part))
        else:
            raise AssertionError(how)
        result.append(number)
    return result


def expand(x: Floats, starts: Bools) -> list[float]:
    return [x[k] for k in segment_ids(starts)]


def discounts(starts: Bools, gamma: float, how: str) -> list[float]:
    return [gamma ** len(s) if how == "per_token" else gamma for s in segments(starts)]


# Advantages


def gae(
    rewards: Floats, values: Floats, discounts: Floats, lam: float, last_value: float = 0.0
) -> tuple[list[float], list[float]]:
    """A_k = sum over j >= k of (product over k <= i < j of disc_i lam) delta_j."""
    following = [*values, last_value][1:]
    deltas = [
        r + d * v_next - v
        for r, d, v_next, v in zip(rewards, discounts, following, values, strict=True)
    ]
    advantages = []
    for k in range(len(deltas)):
        terms = [
            math.prod(d * lam for d in discounts[k:j]) * deltas[j] for j in range(k, len(deltas))
        ]
        advantages.append(math.fsum(terms))
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def token_gae(
    rewards: Floats, values: Floats, gamma: float, lam: float, last_value: float = 0.0
) -> list[float]:
    """Token-level GAE as the mixture of n-step advantages: (1 - lam) sum lam^(n-1) A^(n)."""
    length = len(rewards)
    extended = [*values, last_value]
    advantages = []
    for t in range(length):
        horizon = length - t

        def n_step(n: int, t: int = t) -> float:
            collected = math.fsum(gamma**i * rewards[t + i] for i in range(n))
            return collected + gamma**n * extended[t + n] - values[t]

        mixture = [(1 - lam) * lam ** (n - 1) * n_step(n) for n in range(1, horizon)]
        advantages.append(math.fsum(mixture) + lam ** (horizon - 1) * n_step(horizon))
    return advantages


def rloo(group: Floats) -> list[float]:
    return [
        x - math.fsum(y for j, y in enumerate(group) if j != i) / (len(group) - 1)
        for i, x in enumerate(group)
    ]


def grpo(group: Floats) -> list[float]:
    if len(set(group)) == 1:
        return [0.0 for _ in group]
    mean = math.fsum(group) / len(group)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in group) / (len(group) - 1))
    return [(x - mean) / std for x in group]


def reinforce(batch: Floats) -> list[float]:
    mean = math.fsum(batch) / len(batch)
    return [x - mean for x in batch]


def whiten(rows: list[list[float]], weights: list[list[float]]) -> list[list[float]]:
    """Each entry repeated as often as its weight says, then mean 0 and variance 1."""
    pairs = [
        (x, w)
        for row, row_w in zip(rows, weights, strict=True)
        for x, w in zip(row, row_w, strict=True)
    ]
    total = math.fsum(w for _, w in pairs)
    mean = math.fsum(w * x for x, w in pairs) / total
    variance = math.fsum(w * (x - mean) ** 2 for x, w in pairs) / total
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


# Losses: sums, not yet divided by anything


def clipped(ratio: float, advantage: float, clip_range: float) -> float:
    """The loss of one action, by cases: where its gain beyond the clip range is not paid."""
    if advantage >= 0:
        return -advantage * min(ratio, 1 + clip_range)
    return -advantage * max(ratio, 1 - clip_range)


def ratios(new: Floats, old: Floats, starts: Bools, ratio: str) -> list[float]:
    """One number a token (`token`, `macro_mean`) or a macro action (`macro_product`)."""
    each = [math.exp(a) / math.exp(b) for a, b in zip(new, old, strict=True)]
    if ratio == "token":
        return each
    products = [math.prod(each[t] for t in segment) for segment in segments(starts)]
    if ratio == "macro_product":
        return products
    means = [p ** (1 / len(s)) for p, s in zip(products, segments(starts), strict=True)]
    return expand(means, starts)


def policy_loss_sum(
    new: Floats, old: Floats, advantages: Floats, starts: Bools, clip_range: float, ratio: str
) -> float:
    """`advantages`: one a token, the same within a macro action."""
    if ratio == "macro_product":
        advantages = reduce(advantages, starts, "first")
    pairs = zip(ratios(new, old, starts, ratio), advantages, strict=True)
    return math.fsum(clipped(r, a, clip_range) for r, a in pairs)


def value_loss_sum(
    values: Floats, old_values: Floats, returns: Floats, clip_range: float | None
) -> float:
    total = 0.0
    for value, old, target in zip(values, old_values, returns, strict=True):
        loss = 0.5 * (value - target) ** 2
        if clip_range is not None:
            near = min(max(value, old - clip_range), old + clip_range)
            loss = max(loss, 0.5 * (near - target) ** 2)
        total += loss
    return total


def k1(p: float, q: float) -> float:
    """Of a sample with probability p under its own distribution and q under the other."""
    return math.log(p / q)


def k3(p: float, q: float) -> float:
    return q / p - 1 - math.log(q / p)


# Whole algorithms


def token_ppo(
    logprobs: list[list[float]],
    old_logprobs: list[list[float]],
    rewards: list[list[float]],
    values: list[list[float]],
    old_values: list[list[float]],
    last_values: Floats,
    *,
    gamma: float,
    lam: float,
    clip_range: float,
    value_clip_range: float,
) -> dict:
    """Token-level PPO with no notion of a macro action: losses and their gradients."""
    advantages = [
        token_gae(r, v, gamma, lam, last)
        for r, v, last in zip(rewards, old_values, last_values, strict=True)
    ]
    white = whiten(advantages, [[1.0] * len(row) for row in advantages])
    tokens = sum(len(row) for row in rewards)
    policy = value = 0.0
    policy_grad, value_grad = [], []
    for b in range(len(rewards)):
        policy_row, value_row = [], []
        for t in range(len(rewards[b])):
            ratio = math.exp(logprobs[b][t] - old_logprobs[b][t])
            a = white[b][t]
            policy += clipped(ratio, a, clip_range) / tokens
            held = (a > 0 and ratio > 1 + clip_range) or (a < 0 and ratio < 1 - clip_range)
            policy_row.append(0.0 if held else -a * ratio / tokens)

            target = advantages[b][t] + old_values[b][t]
            v, old = values[b][t], old_values[b][t]
            near = min(max(v, old - value_clip_range), old + value_clip_range)
            value += 0.5 * max((v - target) ** 2, (near - target) ** 2) / tokens
            held = (near - target) ** 2 > (v - target) ** 2
            value_row.append(0.0 if held else (v - target) / tokens)
        policy_grad.append(policy_row)
        value_grad.append(value_row)
    return {
        "advantages": advantages,
        "policy_loss": policy,
        "value_loss": value,
        "policy_grad": policy_grad,
        "value_grad": value_grad,
    }


def reference(case: dict, starts: Bools) -> dict:
    """The paper's released formulas for one response; `starts` isolates its last token."""
    clip, gamma, how = 0.2, case["gamma"], case["value_function"]
    score = min(max(case["score"], -2.5), 2.5)
    pairs = zip(case["logprobs"], case["ref_logprobs"], strict=True)
    rewards = [-case["kl_coef"] * (a - b) for a, b in pairs]
    rewards[-1] += score
    macro_values = reduce(case["values"], starts, how)
    macro_rewards = reduce(rewards, starts, how)
    advantages, returns = gae(
        macro_rewards, macro_values, [gamma for _ in macro_values], case["lam"]
    )
    token_advantages, token_returns = expand(advantages, starts), expand(returns, starts)
    tokens = len(rewards)
    actor = policy_loss_sum(
        case["new_logprobs"], case["logprobs"], token_advantages, starts, clip, "token"
    )
    critic = value_loss_sum(case["new_values"], case["values"], token_returns, clip)
    return {
        "rewards": rewards,
        "macro_values": macro_values,
        "macro_rewards": macro_rewards,
        "advantages": advantages,
        "returns": returns,
        "actor_loss": actor / tokens,
        "critic_loss": critic / tokens,
    }
