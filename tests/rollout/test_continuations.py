"""Continuations of prefixes, and credit from them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.runs import PROMPTS, tiny_config, tiny_trainer
from support.strategies import Ragged, differs, fast, ragged

from marlhf.algorithm.estimators import Credit, CreditInputs, continuation_plan
from marlhf.algorithm.experience import TokenData, macro_batch
from marlhf.algorithm.monte_carlo import MonteCarlo, spread_starts
from marlhf.common.errors import UserError
from marlhf.config import MacroSettings, PPOSettings
from marlhf.data.prompts import as_prompts
from marlhf.rollout.continuations import Prefix, continue_prefixes, sample_continuations
from marlhf.runs.metrics import Timer

MONTE_CARLO = {"name": "monte_carlo", "continuations": 2}

# --- the estimator


@fast
@given(
    ragged(),
    st.sampled_from([1, 2, 5, None]),
    st.integers(0, 4),
    st.sampled_from([1.0, 0.9]),
)
def test_advantages_are_the_loop(
    batch: Ragged, most: int | None, longer: int, gamma: float
) -> None:
    """Of each stretch between two valued prefixes: what it collects, and what it leads to."""
    rewards, values = batch.noise("rewards"), batch.noise("values")
    starts_BT = batch.pad([list(map(float, row)) for row in batch.starts]).bool()
    limit = starts_BT.shape[1] + longer
    places = spread_starts(starts_BT & batch.mask, most, limit)
    tokens = TokenData(
        response_mask=batch.mask,
        kl_rewards=torch.zeros_like(batch.pad(rewards)),
        task_rewards=batch.pad(rewards),
        values=None,
        last_values=None,
        finished=batch.mask.any(1),
        continuation_values=batch.pad(values).masked_fill(~places, torch.nan),
    )
    settings = PPOSettings(estimator="monte_carlo", gamma=gamma)
    found = macro_batch(starts_BT, tokens, MacroSettings(), settings)
    wanted = []
    for row, (of_row, value, starts) in enumerate(zip(rewards, values, batch.starts, strict=True)):
        valued = [t for t in range(len(of_row)) if places[row, t]]
        assert valued[:1] == ([0] if of_row else [])
        assert valued == first_of_parts([t for t, s in enumerate(starts) if s], most, limit)
        advantages: list[float] = []
        for t, end in itertools.pairwise([*valued, len(of_row)]):
            collected = math.fsum(gamma ** (i - t) * of_row[i] for i in range(t, end))
            after = gamma ** (end - t) * value[end] if end < len(of_row) else 0.0
            advantages += [collected + after - value[t]] * (end - t)
        wanted.append(advantages)
    assert not differs(found.advantages_BT, wanted)


def first_of_parts(starts: list[int], most: int | None, limit: int) -> list[int]:
    """The first start in each of `most` equal parts of `limit` tokens."""
    if most is None:
        return starts
    chosen: dict[int, int] = {}
    for t in starts:
        chosen.setdefault(math.floor(most * t / limit), t)
    return list(chosen.values())


def test_starts_are_spread_over_the_tokens_that_a_response_may_have() -> None:
    starts = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]]).bool()
    chosen = spread_starts(starts, 3, 9)  # parts 0-2, 3-5, 6-8
    assert chosen.int().tolist() == [[1, 0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0, 0]]


# --- sampling


def trained(folder: Path, **sections: Any) -> Any:
    return tiny_trainer(folder, ppo={"estimator": MONTE_CARLO}, **sections)


def rollout_of(trainer: Any) -> Any:
    prompts = as_prompts(PROMPTS)
    return prompts, trainer.worker(prompts, list(range(len(prompts))), 0, Timer())


def test_a_continuation_is_the_engines_own_of_the_longer_prompt(tmp_path: Path) -> None:
    """In company and in parts; and it ends where a whole response would."""
    trainer = trained(tmp_path)
    _, rollout = rollout_of(trainer)
    lengths = rollout.responses.lengths
    prefixes = [Prefix(b, t) for b in range(8) for t in range(0, lengths[b], 3)]
    found = continue_prefixes(trainer.worker, rollout.generation, prefixes, range(len(prefixes)))
    settings = trainer.config.rollout
    for i, (b, t) in enumerate(prefixes):
        begun = rollout.generation.responses[b][:t]
        inputs = [rollout.generation.prompts[b] + begun]
        alone = trainer.engine.generate(inputs, [i], settings)
        wanted = (begun + alone.responses[0])[: settings.max_new_tokens]
        assert found.responses[i] == wanted
        assert found.prompts[i] == rollout.generation.prompts[b]
        was_cut = t + len(alone.responses[0]) > settings.max_new_tokens
        assert bool(found.finished[i]) == (bool(alone.finished[0]) and not was_cut)


def test_eos_waits_for_min_new_tokens_of_the_whole_response(tmp_path: Path) -> None:
    trainer = trained(tmp_path, rollout={"min_new_tokens": 6, "max_new_tokens": 9})
    eos = trainer.policy.model.eos_ids[0]
    with torch.no_grad():  # it comes as soon as it may
        head = trainer.policy.model.model.lm_head
        head.weight[eos] *= 0
        head.weight[eos] += 100 * head.weight.mean(0)
    _, rollout = rollout_of(trainer)
    prefixes = [Prefix(b, t) for b in range(8) for t in (0, 2, 5)]
    found = continue_prefixes(trainer.worker, rollout.generation, prefixes, range(len(prefixes)))
    assert min(map(len, found.responses)) >= 6
    assert all(eos not in ids[:6] for ids in found.responses)


def test_a_stop_string_that_the_prefix_begins_is_seen(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    _, rollout = rollout_of(trainer)
    prefixes = [Prefix(0, 4)] * 20
    free = continue_prefixes(trainer.worker, rollout.generation, prefixes, range(20))
    stop = trainer.tokenizer.decode(free.responses[0][3:5])
    stopping = trained(tmp_path / "stopping", rollout={"stop_strings": [stop]})
    found = continue_prefixes(stopping.worker, rollout.generation, prefixes, range(20))
    assert found.responses[0] == free.responses[0][:5]
    assert bool(found.finished[0])


def test_returns_have_the_values_of_an_enumeration(tmp_path: Path) -> None:
    """Two tokens a response, of the two likeliest each: all that can follow can be listed."""
    trainer = trained(
        tmp_path, kl={"coef": 0.3}, rollout={"max_new_tokens": 2, "top_k": 2, "min_new_tokens": 2}
    )
    prompts, rollout = rollout_of(trainer)
    places = torch.ones(8, 2, dtype=torch.bool)
    count, coef = 300, trainer.kl.in_rewards_coef
    with torch.no_grad():  # so that the KL penalty is none of 0
        trainer.reference.model.lm_head.weight *= 1.5
    found = sample_continuations(
        trainer.worker, prompts, rollout, places, count, coef, 1.0, Timer()
    )
    errors = []
    for b in range(8):
        for t in (0, 1):
            begun = rollout.generation.responses[b][:t]
            value = value_of(trainer, rollout.generation.prompts[b], begun, coef)
            sampled = found.returns_BTK[b, t]
            errors.append(float((sampled.mean() - value) / (sampled.std() / count**0.5 + 1e-6)))
    assert max(map(abs, errors)) < 4
    assert sum(e**2 for e in errors) / len(errors) < 2.5  # of a chi-squared of 16
    assert found.tokens == 300 * (2 * found.prefixes - (found.prefixes - 8))


def test_without_a_penalty_in_the_rewards_no_model_scores(tmp_path: Path) -> None:
    trainer = trained(tmp_path, kl={"coef": 0.3, "where": "loss"})
    prompts, rollout = rollout_of(trainer)
    calls: Counter[str] = Counter()
    for name, model in ("policy", trainer.policy.model), ("reference", trainer.reference):
        model.register_forward_hook(lambda *_, name=name: calls.update([name]))
    places = torch.zeros_like(rollout.responses.response_mask)
    places[:, 0] = True
    arguments = trainer.worker, prompts, rollout, places, 2
    with_penalty = sample_continuations(*arguments, 0.3, 1.0, Timer())
    scoring = calls.copy()
    calls.clear()
    without = sample_continuations(*arguments, trainer.kl.in_rewards_coef, 1.0, Timer())
    assert scoring["reference"] > 0 == calls["reference"]
    assert calls["policy"] == scoring["policy"] - scoring["reference"]
    same = torch.isclose(with_penalty.returns_BTK, without.returns_BTK, equal_nan=True, atol=1e-5)
    assert same.all()  # policy and reference are the same


def value_of(trainer: Any, prompt: list[int], begun: list[int], coef: float) -> float:
    """Expected reward, less the KL penalty of the tokens to come, by listing them."""
    if len(begun) == 2:
        text = trainer.tokenizer.decode(begun)
        return sum(c in "aeiou" for c in text) - 0.01 * len(text)
    logits = []
    for policy in (trainer.policy.model, trainer.reference):
        found = policy.model(input_ids=torch.tensor([prompt + begun])).logits[0, -1].double()
        found[trainer.policy.model.eos_ids] = -torch.inf
        logits.append(found)
    of_policy, of_reference = (x.log_softmax(0) for x in logits)
    top = logits[0].topk(2)
    value = 0.0
    for p, token in zip(top.values.softmax(0).tolist(), top.indices.tolist(), strict=True):
        penalty = coef * float(of_policy[token] - of_reference[token])
        value += p * (value_of(trainer, prompt, [*begun, token], coef) - penalty)
    return value


# --- training


def test_a_run_reports_the_cost_and_does_not_change_with_its_parts(tmp_path: Path) -> None:
    row = trained(tmp_path / "whole").step(PROMPTS)
    assert row["value_loss"] is None
    assert 1 < row["continued_prefixes_mean"] <= row["macro_count_mean"]
    assert row["continuation_tokens_mean"] > 2 * row["continued_prefixes_mean"]
    parts = trained(
        tmp_path / "parts", rollout={"engine": {"name": "transformers", "batch_size": 3}}
    )
    again = parts.step(PROMPTS)
    times = ("_seconds", "_per_second", "_gb")
    for name, value in row.items():
        if not name.endswith(times):
            assert again[name] == (None if value is None else pytest.approx(value, rel=1e-4)), name


def test_responses_to_one_prompt_share_what_they_have_in_common(tmp_path: Path) -> None:
    trainer = trained(tmp_path, rollout={"responses_per_prompt": 4, "batch_size": 2})
    row = trainer.step(PROMPTS[:2])
    # the prompt itself is continued once for its four responses
    assert row["continued_prefixes_mean"] <= row["macro_count_mean"] - 3 / 4


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"reward": {"whiten": True}}, "reward.whiten=true: given with ppo.estimator=monte_carlo"),
        ({"macro": {"reward": "mean"}}, "macro.reward=mean: given with ppo.estimator=monte_carlo"),
        ({"critic": {"warmup_steps": 2}}, "critic.warmup_steps: given 2, but ppo.estimator=monte"),
        ({"ppo": {"lam": 0.5}}, "ppo.lam: given 0.5, but ppo.estimator=monte_carlo"),
        ({"ppo": {"estimator": {"name": "monte_carlo", "continuations": 0}}}, "continuations is 0"),
        (
            {"ppo": {"estimator": {"name": "monte_carlo", "max_prefixes": -1}}},
            "estimator MonteCarlo: max_prefixes is -1, must be a whole number of at least 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    settings = {"ppo": {"estimator": MONTE_CARLO}}
    merged = {k: settings.get(k, {}) | sections.get(k, {}) for k in {**settings, **sections}}
    with pytest.raises((UserError, ValueError), match=message):
        tiny_trainer(tmp_path, **merged)


def test_others_may_read_them(tmp_path: Path) -> None:
    class Mine:
        requires = frozenset({"continuations"})
        continuations = 3

        def __call__(self, inputs: CreditInputs) -> Credit:
            values = inputs.continuation_values_BM
            assert values is not None
            assert not bool(values[inputs.mask_BM].isnan().any())
            return Credit(inputs.rewards_BM)

    assert continuation_plan(Mine()) == (3, None)
    assert continuation_plan(MonteCarlo(5, 2)) == (5, 2)
    config = tiny_config(tmp_path, ppo={"estimator": "reinforce"})
    assert config.continuation_fault("mine") is None
