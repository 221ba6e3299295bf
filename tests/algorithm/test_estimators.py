"""Estimators as plug-ins: built-in ones against loops, lambda per macro action, refusals."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support.oracles import token_gae
from support.runs import PROMPTS, tiny_config
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm
from torch import Tensor

from marlhf import Credit, CreditInputs, PPOTrainer
from marlhf.algorithm.estimators import (
    GRPO,
    RLOO,
    build_estimator,
    estimator_requires,
)
from marlhf.algorithm.experience import TokenData, macro_batch
from marlhf.algorithm.lambdas import LengthAdaptive, PerToken, build_lambdas, macro_lambdas
from marlhf.algorithm.macro import segment_ids
from marlhf.common.errors import UserError
from marlhf.config import MacroSettings, PPOSettings

LENGTHS = [6, 3, 4, 5]
STARTS = torch.tensor(
    [[1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]]
)
NONE = MacroSettings(whiten="none")


def tokens(*, at_the_end: bool = False) -> TokenData:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    last = torch.arange(6) == torch.tensor(LENGTHS)[:, None] - 1
    rewards, values = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    task = torch.where(last if at_the_end else mask, rewards, 0.0)
    return TokenData(
        response_mask=mask,
        kl_rewards=torch.zeros_like(task),
        task_rewards=task,
        values=values,
        last_values=values[:, 0],
        finished=torch.ones(4, dtype=torch.bool),
        token_ids=torch.arange(24).reshape(4, 6),
    )


def advantages(data: TokenData, **ppo: Any) -> Tensor:
    return macro_batch(STARTS.bool(), data, NONE, PPOSettings(**ppo), group_size=2).advantages_BM


# return to go


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_with_rewards_at_the_end_return_to_go_is_the_return(name: str) -> None:
    data = tokens(at_the_end=True)
    to_go = advantages(data, estimator={"name": name, "return_to_go": True})
    torch.testing.assert_close(to_go, advantages(data, estimator=name))


def macro_rewards(data: TokenData, row: int) -> list[float]:
    """Sums over the macro actions of a response, by loops."""
    sums: list[float] = []
    for t in range(LENGTHS[row]):
        if STARTS[row, t]:
            sums.append(0.0)
        sums[-1] += float(data.task_rewards[row, t])
    return sums


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_return_to_go_is_the_loop(name: str) -> None:
    data = tokens()
    found = advantages(data, estimator={"name": name, "return_to_go": True})
    for row in range(4):
        other = row ^ 1
        mine, theirs = macro_rewards(data, row), macro_rewards(data, other)
        for k in range(len(mine)):
            to_go, others = sum(mine[k:]), sum(theirs[min(k, len(theirs) - 1) :])
            wanted = to_go - others
            if name == "grpo":
                std = abs(sum(mine) - sum(theirs)) / 2**0.5  # of two, unbiased
                wanted = (to_go - (to_go + others) / 2) / std
            assert float(found[row, k]) == pytest.approx(wanted, abs=1e-12)


# the prefix tree

TREE = torch.tensor(
    [
        [1, 2, 3, 4, 9],
        [1, 2, 5, 9, 0],
        [1, 7, 9, 0, 0],
        [1, 2, 3, 4, 9],
        [3, 3, 9, 0, 0],
        [3, 4, 5, 5, 5],
    ]
)
TREE_LENGTHS = [5, 4, 3, 5, 3, 5]


def tree(cut: str) -> tuple[TokenData, Tensor]:
    """Two groups of three responses, cut at every token, every second one, or nowhere."""
    mask = torch.arange(5) < torch.tensor(TREE_LENGTHS)[:, None]
    rewards = torch.zeros(6, 5, dtype=torch.float64)
    rewards[:, 0] = torch.tensor([1.0, 0.0, 4.0, 3.0, -1.0, 2.0])
    every = {"token": 1, "ngram": 2, "sequence": 9}[cut]
    starts = (torch.arange(5) % every == 0).expand(6, 5) & mask
    finished = torch.ones(6, dtype=torch.bool)
    return TokenData(mask, 0 * rewards, rewards, None, None, finished, TREE), starts


@pytest.mark.parametrize("cut", ["token", "ngram", "sequence"])
def test_the_prefix_tree_is_the_loop(cut: str) -> None:
    data, starts = tree(cut)
    settings = PPOSettings(estimator="prefix_tree")
    found = macro_batch(starts, data, NONE, settings, group_size=3).advantages_BM
    returns = data.task_rewards.sum(1).tolist()
    responses = [row[:n] for row, n in zip(TREE.tolist(), TREE_LENGTHS, strict=True)]

    def value(row: int, length: int) -> float:
        group = range(row // 3 * 3, row // 3 * 3 + 3)
        alike = [j for j in group if responses[j][:length] == responses[row][:length]]
        return sum(returns[j] for j in alike) / len(alike)

    for row, response in enumerate(responses):
        places = [t for t in range(len(response)) if starts[row, t]] + [len(response)]
        wanted = [value(row, b) - value(row, a) for a, b in pairwise(places)]
        assert found[row, : len(wanted)].tolist() == pytest.approx(wanted)
        total = value(row, len(response)) - value(row, 0)
        assert float(found[row].sum()) == pytest.approx(total)
    if cut == "token":
        assert float(found[0, 0]) == 0.0  # all of the group begin so
        assert found[2, 2:].tolist() == [0.0] * 3  # alone from its second token on


# lambda


def test_a_lambda_per_token_is_its_power_per_macro_action() -> None:
    """On n-grams of equal length a number and its n-th root per token are one."""
    data = replace(tokens(), response_mask=torch.ones(4, 6, dtype=torch.bool))
    starts = torch.tensor([[1, 0, 0, 1, 0, 0]] * 4).bool()

    def of(lam: Any) -> Tensor:
        return macro_batch(starts, data, NONE, PPOSettings(gamma=0.9, lam=lam)).advantages_BM

    torch.testing.assert_close(of({"name": "per_token", "lam": 0.8}), of(0.8**3))
    assert float((of({"name": "per_token", "lam": 0.8}) - of(0.8)).abs().max()) > 0.01


@pytest.mark.parametrize("lam", [PerToken(0.9), LengthAdaptive(0.7)])
def test_gae_takes_a_lambda_of_each_macro_action(lam: Any) -> None:
    data = tokens()
    batch = macro_batch(data.response_mask, data, NONE, PPOSettings(gamma=0.9, lam=0.5))
    ids = segment_ids(data.response_mask, data.response_mask)
    lam_BM = macro_lambdas(lam, ids, "ppo.lam")
    spec = {"name": "per_token", "lam": 0.9}
    if isinstance(lam, LengthAdaptive):
        spec = {"name": "length_adaptive", "alpha": 0.7}
    batch = macro_batch(data.response_mask, data, NONE, PPOSettings(gamma=0.9, lam=spec))
    assert data.values is not None
    for row, n in enumerate(LENGTHS):
        wanted = 0.9 if isinstance(lam, PerToken) else max(0.0, 1 - 1 / (0.7 * n))
        assert lam_BM[row, :n].tolist() == pytest.approx([wanted] * n)
        rewards, values = data.task_rewards[row, :n].tolist(), data.values[row, :n].tolist()
        truth = token_gae(rewards, values, 0.9, wanted, 0.0)
        assert batch.advantages_BM[row, :n].tolist() == pytest.approx(truth)


def test_the_critics_lambda_is_of_its_targets_alone() -> None:
    data = tokens()
    settings = PPOSettings(gamma=0.9, lam=0.5, critic_lam=1.0)
    both = macro_batch(STARTS.bool(), data, NONE, settings)
    plain = macro_batch(STARTS.bool(), data, NONE, PPOSettings(gamma=0.9, lam=0.5))
    monte_carlo = macro_batch(STARTS.bool(), data, NONE, PPOSettings(gamma=0.9, lam=1.0))
    torch.testing.assert_close(both.advantages_BM, plain.advantages_BM, rtol=0, atol=0)
    torch.testing.assert_close(both.returns_BM, monte_carlo.returns_BM, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("lam", "line"),
    [
        ({"name": "per_token", "lam": 2.0}, "lambda per_token: lam: given 2, must be in [0, 1]"),
        ({"name": "length_adaptive", "alpha": 0.0}, "alpha: given 0, must be above 0"),
        ("per_tokn", "no lambda is called 'per_tokn'; did you mean 'per_token'"),
        (lambda lengths: lengths * 2, "ppo.lam: gave a lambda outside [0, 1]"),
        (lambda lengths: 0.5, "ppo.lam: gave float, must be a tensor of shape (4, 3)"),
        (lambda lengths: 1 / 0, "ppo.lam: raised ZeroDivisionError"),
    ],
)
def test_what_is_no_lambda_is_one_line(lam: Any, line: str) -> None:
    with pytest.raises(UserError) as error:
        macro_lambdas(
            build_lambdas(lam), segment_ids(STARTS.bool(), tokens().response_mask), "ppo.lam"
        )
    assert line in str(error.value)


# an estimator of one's own


@dataclass(frozen=True)
class Halved:
    """Half of each macro action's own reward less its value; every other one does not count."""

    scale: float = 0.5
    requires: ClassVar[set[str]] = {"values"}

    def __call__(self, inputs: CreditInputs) -> Credit:
        assert inputs.values_BM is not None
        advantages = self.scale * (inputs.rewards_BM - inputs.values_BM)
        weights = (torch.arange(advantages.shape[1]) % 2 == 0).expand(advantages.shape)
        inputs.rewards_BM.zero_()  # a copy
        return Credit(advantages, inputs.rewards_BM + 1.0, weights.double())


def centred(inputs: CreditInputs) -> Credit:
    """Reads rewards alone."""
    return Credit((inputs.returns_B - inputs.returns_B.mean())[:, None] + 0 * inputs.rewards_BM)


def test_an_own_estimator_sees_macro_actions_and_gives_advantages_and_weights() -> None:
    data = tokens()
    batch = macro_batch(STARTS.bool(), data, NONE, PPOSettings(), estimator=Halved(2.0))
    assert batch.values_BM is not None
    first = macro_rewards(data, 0)
    wanted = [2.0 * (r - float(v)) for r, v in zip(first, batch.values_BM[0], strict=True)]
    assert batch.advantages_BM[0].tolist() == pytest.approx(wanted)
    assert batch.returns_BM is not None
    assert batch.returns_BM[0].tolist() == [1.0] * 3
    assert batch.weights_BT is not None
    assert batch.weights_BT[0].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def trained(folder: Path, estimator: Any = None, **sections: Any) -> PPOTrainer:
    trainer = PPOTrainer(
        tiny_config(folder, steps=1, **sections),
        reward=lambda prompts, completions: [float(len(text)) for text in completions],
        estimator=estimator,
        train_dataset=PROMPTS,
        model=tiny_causal_lm("llama", BYTES_VOCAB),
        tokenizer=byte_tokenizer(add_bos=True),
    )
    trainer.train()
    return trainer


def test_a_run_takes_it_by_import_path_or_as_an_object(tmp_path: Path) -> None:
    path = f"{Halved.__module__}.Halved"
    named = trained(tmp_path / "a", ppo={"estimator": {"name": path, "scale": 2.0}})
    given = trained(tmp_path / "b", Halved(2.0))
    assert named.critic is not None
    a, b = (
        [json.loads(line)["macro_advantages"] for line in (t.run_dir.path / "samples.jsonl").open()]
        for t in (named, given)
    )
    for row, like in zip(a, b, strict=True):
        assert row == pytest.approx(like, abs=1e-5)
    assert named.estimator == given.estimator == Halved(2.0)


def test_one_that_reads_no_values_loads_no_critic(tmp_path: Path) -> None:
    assert trained(tmp_path / "run", centred).critic is None
    with pytest.raises(UserError, match=r"critic.warmup_steps: given 1, but ppo.estimator=centred"):
        trained(tmp_path / "other", centred, critic={"warmup_steps": 1})


def test_one_that_compares_responses_wants_several(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"responses_per_prompt: given 1, must be at least 2 for"):
        trained(tmp_path / "run", RLOO())


@dataclass(frozen=True)
class Returning:
    value: Any
    requires: Any = frozenset()

    def __call__(self, inputs: CreditInputs) -> Any:
        return self.value(inputs) if callable(self.value) else self.value


@pytest.mark.parametrize(
    ("estimator", "line"),
    [
        (Returning(3), "estimator Returning: returned int, must be a marlhf.Credit"),
        (Returning(Credit(torch.zeros(2, 2))), "advantages_BM has shape (2, 2), must be (4, 3)"),
        (Returning(lambda i: Credit(i.rewards_BM / 0)), "advantages_BM of response 0 is not finit"),
        (
            Returning(lambda i: Credit(i.rewards_BM, weights_BM=-i.mask_BM.double())),
            "weights_BM holds -1, must be at least 0",
        ),
        (Returning(lambda i: Credit(i.rewards_BM), {"values"}), "gave no returns_BM for the crit"),
        (Returning(0, {"value"}), "requires value; possible: continuations, groups, values"),
        (Returning(lambda i: 1 / 0), "estimator Returning: raised ZeroDivisionError"),
    ],
)
def test_faults_are_one_line_with_its_name(estimator: Any, line: str) -> None:
    with pytest.raises(UserError) as error:
        macro_batch(STARTS.bool(), tokens(), NONE, PPOSettings(), 2, estimator=estimator)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_outside_the_mask_does_not_matter() -> None:
    def spoilt(inputs: CreditInputs) -> Credit:
        return Credit(inputs.rewards_BM.masked_fill(~inputs.mask_BM, torch.nan))

    batch = macro_batch(STARTS.bool(), tokens(), NONE, PPOSettings(), 2, estimator=spoilt)
    assert bool((batch.advantages_BM[~batch.mask_BM] == 0).all())


def test_what_an_estimator_gets_is_zero_where_there_is_no_macro_action() -> None:
    seen: list[CreditInputs] = []

    class Keeps:
        requires = frozenset({"values"})

        def __call__(self, inputs: CreditInputs) -> Credit:
            seen.append(inputs)
            return Credit(inputs.rewards_BM, inputs.rewards_BM)

    data, padding = tokens(), ~tokens().response_mask
    names = ("kl_rewards", "task_rewards", "values")
    data = replace(data, **{name: getattr(data, name).masked_fill(padding, 7) for name in names})
    data = replace(data, continuation_values=data.values)
    macro_batch(STARTS.bool(), data, NONE, PPOSettings(), estimator=Keeps())
    (inputs,) = seen
    outside = ~inputs.mask_BM
    assert bool(outside.any())
    for name, x in vars(inputs).items():
        if name.endswith("_BM"):
            assert bool((x[outside] == 0).all()), name


def test_built_in_names() -> None:
    assert build_estimator({"name": "grpo", "return_to_go": True}) == GRPO(return_to_go=True)
    assert estimator_requires(build_estimator("gae")) == {"values"}
    assert estimator_requires(centred) == frozenset()


@pytest.mark.parametrize("key", ["lam", "critic_lam"])
def test_an_unknown_lambda_is_refused_before_anything_is_sampled(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no lambda is called 'per_tokn'"):
        PPOTrainer(tiny_config(tmp_path, ppo={key: "per_tokn"}), reward="length")


def test_the_example_and_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    runpy.run_path(str(root / "examples" / "custom_estimator.py"), run_name="__main__")
    assert "MedianBaseline  [-0.1, 0.0, 0.1, 4.9]" in capsys.readouterr().out
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "estimators.md").read_text(), re.S)
    names: dict[str, Any] = {"__name__": __name__}
    for block in blocks:
        exec(block, names)
    data = tokens()
    batch = macro_batch(STARTS.bool(), data, NONE, PPOSettings(), 2, estimator=names["centred"])
    returns = data.task_rewards.where(data.response_mask, 0.0).sum(1)
    torch.testing.assert_close(batch.advantages_BM[:, 0], returns - returns.mean())
    one_step = names["OneStep"](0.2)
    batch = macro_batch(STARTS.bool(), data, NONE, PPOSettings(), 2, estimator=one_step)
    assert batch.values_BM is not None
    wanted = macro_rewards(data, 0)[0] + float(batch.values_BM[0, 1] - batch.values_BM[0, 0])
    assert float(batch.advantages_BM[0, 0]) == pytest.approx(wanted)
