"""The `reference` preset's formulas against numbers recorded from the paper's released code.

`data/reference_recorded.json` holds inputs and what the released functions returned for them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import oracles
from support.strategies import Ragged, differs, differs_scalar

from marlhf.algorithm import macro
from marlhf.algorithm.advantages import gae
from marlhf.algorithm.losses import policy_loss, value_loss
from marlhf.common.types import ResponseBatch
from marlhf.segmenters.ngram import NGram
from marlhf.segmenters.perplexity import Perplexity

RECORDED = json.loads(
    (Path(__file__).parents[1] / "recorded" / "reference_recorded.json").read_text()
)
CASES = {case["name"]: case for case in RECORDED["cases"]}
SCORE_CLIP, CLIP_RANGE = 2.5, 0.2


def recorded_starts(case: dict) -> tuple[bool, ...]:
    """The recorded boundaries; the last one is the start of the last token."""
    length = len(case["inputs"]["logprobs"])
    boundaries = case["outputs"]["boundaries"]
    assert boundaries[-1] == length - 1
    return tuple(t in boundaries for t in range(length))


def solve(
    cases: list[dict],
    dtype: torch.dtype = torch.float64,
    padding: int = 0,
    discount: str = "per_macro",
    reward: str = "mean",
    score_clip: float = SCORE_CLIP,
    last_token_alone: bool = True,
    ratio: str = "token",
    value: str | None = None,
) -> dict:
    """What the library makes of a batch of recorded responses (one gamma, one value function)."""
    inputs = [case["inputs"] for case in cases]
    starts = tuple(recorded_starts(case) for case in cases)
    batch = Ragged(starts, padding, 0, dtype)
    column = {
        name: batch.pad([row[name] for row in inputs])
        for name in ("logprobs", "ref_logprobs", "values", "new_logprobs", "new_values")
    }
    mask = batch.mask
    cut = batch.padded_starts
    if not last_token_alone:
        cut = cut & ~(mask & ~torch.roll(mask, -1, 1).index_fill(1, torch.tensor([-1]), False))
        cut[:, 0] = True
    ids = macro.segment_ids(cut, mask)
    kl_coef = batch.vector([row["kl_coef"] for row in inputs])[:, None]
    scores = batch.vector([row["score"] for row in inputs]).clamp(-score_clip, score_clip)
    kl_rewards = -kl_coef * (column["logprobs"] - column["ref_logprobs"])
    task_rewards = torch.zeros_like(kl_rewards)
    task_rewards[torch.arange(len(cases)), mask.sum(1) - 1] = scores

    gamma, lam = inputs[0]["gamma"], inputs[0]["lam"]
    how = value or inputs[0]["value_function"]
    macro_values = macro.reduce(column["values"], ids, how)
    macro_rewards = macro.reduce(kl_rewards, ids, how if reward == "mean" else "sum")
    macro_rewards = macro_rewards + macro.reduce(task_rewards, ids, "sum")
    advantages, returns = gae(
        macro_rewards,
        macro_values,
        macro.macro_mask(ids),
        macro.discounts(ids, gamma, discount),
        lam,
    )
    actor = column["new_logprobs"].clone().requires_grad_()
    critic = column["new_values"].clone().requires_grad_()
    actor_loss, _ = policy_loss(
        actor, column["logprobs"], macro.expand(advantages, ids), mask, CLIP_RANGE, ratio, ids
    )
    critic_loss, _ = value_loss(
        critic, column["values"], macro.expand(returns, ids), mask, CLIP_RANGE
    )
    (actor_loss + critic_loss).backward()
    return {
        "rewards": torch.where(mask, kl_rewards + task_rewards, 0.0),
        "macro_values": macro_values,
        "macro_rewards": macro_rewards,
        "advantages": advantages,
        "returns": returns,
        "actor_loss": actor_loss,
        "critic_loss": critic_loss,
        "actor_grad": actor.grad,
        "critic_grad": critic.grad,
    }


def disagreements(result: dict, cases: list[dict]) -> set[str]:
    """Names of the recorded outputs that a result for these cases does not reproduce."""
    tokens = [len(case["inputs"]["logprobs"]) for case in cases]
    found = set()
    for name, actual in result.items():
        recorded = [case["outputs"][name] for case in cases]
        if name.endswith("loss"):
            pairs = zip(recorded, tokens, strict=True)
            fault = differs_scalar(actual, sum(x * n for x, n in pairs) / sum(tokens))
        elif name.endswith("grad"):
            shares = [n / sum(tokens) for n in tokens]
            rows = [[g * s for g in row] for row, s in zip(recorded, shares, strict=True)]
            fault = differs(actual, rows)
        else:
            fault = differs(actual, recorded)
        if fault:
            found.add(name)
    return found


def groups() -> dict[str, list[dict]]:
    """Cases that can share a batch."""
    result: dict[str, list[dict]] = {}
    for case in CASES.values():
        key = f"{case['inputs']['value_function']}-gamma{case['inputs']['gamma']}"
        result.setdefault(key, []).append(case)
    return result


def test_recorded_cases_cover_what_they_should():
    inputs = [case["inputs"] for case in CASES.values()]
    assert {row["termination"] for row in inputs} == {"fixed", "ppl", "randomized"}
    assert {row["gamma"] for row in inputs} == {0.99, 1.0}
    assert {row["value_function"] for row in inputs} == {"equal", "position"}
    assert any(row["score"] > SCORE_CLIP for row in inputs)
    assert any(row["score"] < -SCORE_CLIP for row in inputs)
    for new, old in (("new_logprobs", "logprobs"), ("new_values", "values")):
        moves = [abs(x - y) for row in inputs for x, y in zip(row[new], row[old], strict=True)]
        assert sum(move > CLIP_RANGE for move in moves) > len(moves) // 4


@pytest.mark.parametrize("name", CASES)
def test_the_loops_reproduce_the_recording(name: str):
    case = CASES[name]
    result = oracles.reference(case["inputs"], recorded_starts(case))
    for key, value in result.items():
        recorded = case["outputs"][key]
        assert value == pytest.approx(recorded, rel=1e-8, abs=1e-9), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", CASES)
def test_one_response(name: str, padding: int, dtype: torch.dtype):
    assert not disagreements(solve([CASES[name]], dtype, padding), [CASES[name]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key", groups())
def test_responses_in_one_padded_batch(key: str, dtype: torch.dtype):
    cases = groups()[key]
    for order in (cases, cases[::-1]):
        assert not disagreements(solve(order, dtype, padding=2), order)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c["inputs"]["ngram"]])
def test_boundaries_of_fixed_ngrams(name: str):
    case = CASES[name]
    length = len(case["inputs"]["logprobs"])
    mask = torch.arange(length + 2)[None] < length
    batch = ResponseBatch(token_ids=torch.zeros_like(mask, dtype=torch.int64), response_mask=mask)
    starts = macro.isolate_last_token(NGram(case["inputs"]["ngram"])(batch), mask)
    assert starts[0].nonzero()[:, 0].tolist() == case["outputs"]["boundaries"]


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if c["inputs"]["termination"] == "ppl"]
)
def test_boundaries_of_perplexity(name: str):
    """One token before each rise of the reference's perplexity, and the first and last token."""
    case = CASES[name]
    logprobs = case["inputs"]["ref_logprobs"]
    rises = [t for t in range(len(logprobs) - 1) if logprobs[t + 1] < logprobs[t]]
    assert case["outputs"]["boundaries"] == sorted({0, *rises, len(logprobs) - 1})
    mask = torch.arange(len(logprobs) + 2)[None] < len(logprobs)
    padded = torch.tensor([[*logprobs, -9.0, 0.0]])
    batch = ResponseBatch(torch.zeros_like(mask, dtype=torch.int64), mask, ref_logprobs=padded)
    for shift, same in ((-1, True), (0, False)):
        starts = macro.isolate_last_token(Perplexity("ref", shift)(batch), mask)
        found = starts[0].nonzero()[:, 0].tolist()
        assert (found == case["outputs"]["boundaries"]) == same


VARIANTS = [
    ({"discount": "per_token"}, "position-gamma0.99", "advantages"),
    ({"reward": "sum"}, "equal-gamma0.99", "macro_rewards"),
    ({"score_clip": 1e9}, "equal-gamma0.99", "rewards"),
    ({"score_clip": 1e9}, "position-gamma0.99", "macro_rewards"),
    ({"last_token_alone": False}, "equal-gamma1.0", "macro_values"),
    ({"value": "first"}, "equal-gamma1.0", "macro_values"),
    ({"value": "equal"}, "position-gamma1.0", "macro_values"),
    ({"ratio": "macro_mean"}, "equal-gamma0.99", "actor_loss"),
    ({"ratio": "macro_product"}, "equal-gamma0.99", "actor_loss"),
]


@pytest.mark.parametrize(("changes", "key", "output"), VARIANTS)
def test_other_formulas_are_told_apart(changes: dict, key: str, output: str):
    cases = groups()[key]
    assert output in disagreements(solve(cases, **changes), cases)


def test_gamma_1_hides_the_kind_of_discount():
    cases = groups()["equal-gamma1.0"]
    assert not disagreements(solve(cases, discount="per_token"), cases)
