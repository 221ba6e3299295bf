"""The engine contract: weights after each update, any engine by name, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.evaluations import build_models, results_of
from support.runs import PROMPTS, tiny_config
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm
from torch import Tensor

from marlhf import PPOTrainer
from marlhf.common.errors import UserError
from marlhf.common.types import Generation
from marlhf.config import ImportanceSettings, LoraSettings, RolloutSettings
from marlhf.models.policy import Policy
from marlhf.rollout.engine import EngineContext, build_engine, start_engine
from marlhf.rollout.policy_weights import policy_weights
from marlhf.rollout.transformers_engine import generate

LORA = {"lora": LoraSettings(r=4)}
WEIGHTED = {"importance": ImportanceSettings()}
DORA = {"lora": LoraSettings(r=4, extra={"use_dora": True})}


@dataclass(frozen=True)
class Copying:
    """Samples from a copy of the model, which knows of updates by `update_weights` alone.

    updated   whether it takes them
    """

    updated: bool = True

    def __call__(self, context: EngineContext) -> CopyingEngine:
        return CopyingEngine(context, self.updated)


class CopyingEngine:
    def __init__(self, context: EngineContext, updated: bool) -> None:
        self.tokenizer, self.updated = context.tokenizer, updated
        policy = context.distributed.unwrap(context.policy)
        lm = copy.deepcopy(policy.model)
        lm = lm.unload() if hasattr(lm, "peft_config") else lm
        self.copy = Policy(lm, eos_ids=policy.eos_ids)
        self.calls: list[str] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: RolloutSettings
    ) -> Generation:
        self.calls.append("generate")
        return generate(self.copy, self.tokenizer, prompts, seeds, settings)

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.calls.append("update_weights")
        for name, weight in weights if self.updated else ():
            self.copy.model.get_parameter(name).copy_(weight)

    def sleep(self) -> None:
        self.calls.append("sleep")

    def close(self) -> None:
        self.calls.append("close")


def trained(folder: Path, family: str, engine: Any, **sections: Any) -> PPOTrainer:
    trainer = PPOTrainer(
        tiny_config(folder, steps=3, **sections),
        reward=lambda prompts, completions: [float(text.count("a")) for text in completions],
        engine=engine,
        train_dataset=PROMPTS,
        model=tiny_causal_lm(family, BYTES_VOCAB),
        tokenizer=byte_tokenizer(add_bos=True),
    )
    trainer.train()
    return trainer


def samples(trainer: PPOTrainer) -> str:
    return (trainer.run_dir.path / "samples.jsonl").read_text()


def test_an_engine_with_weights_of_its_own_samples_from_the_policy_of_now(tmp_path: Path) -> None:
    usual = trained(tmp_path / "usual", "llama", "transformers")
    copied = trained(tmp_path / "copied", "llama", Copying())
    stale = trained(tmp_path / "stale", "llama", Copying(updated=False))
    assert samples(copied) == samples(usual) != samples(stale)
    update = ["generate", "sleep", "update_weights"]
    assert copied.engine.calls == ["update_weights", *update, *update, *update, "close"]


@pytest.mark.parametrize("model", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_weights_for_an_engine_are_those_that_a_run_saves(
    family: str, model: dict[str, Any], tmp_path: Path
) -> None:
    trainer = trained(tmp_path / "run", family, "transformers", model=model)
    weights = {
        name: weight.clone()
        for name, weight in policy_weights(trainer.distributed.unwrap(trainer.policy.model))
    }
    saved = load_file(tmp_path / "run/final/model.safetensors")
    assert weights.keys() == saved.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, saved[name], rtol=0, atol=1e-7)


def test_adapters_that_are_no_low_rank_update_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.lora: model\.layers\.0.* not a plain low-rank"):
        trained(tmp_path / "run", "llama", Copying(), model=DORA)


def test_evaluate_samples_with_the_engine_of_its_configuration(tmp_path: Path) -> None:
    folder = build_models(tmp_path)
    usual = results_of(folder)
    path = f"{Copying.__module__}.Copying"
    named = results_of(folder, rollout={"engine": {"name": path}}, overwrite=True)
    assert named["policies"] == usual["policies"]


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("transformer", "engine: no engine is called 'transformer'; did you mean 'transformers'"),
        (
            {"name": "transformers", "n": 1},
            "engine transformers: given n; its parameters are batch_size",
        ),
        ({"name": "transformers", "batch_size": 0}, "batch_size: given 0, must be at least 1"),
        (3, "engine: given 3, must be a name, a mapping or a callable"),
        ("marlhf.rollout.engine.nothing", "has no 'nothing'"),
    ],
)
def test_what_is_no_engine_is_one_line(spec: Any, line: str) -> None:
    with pytest.raises(UserError) as error:
        build_engine(spec)
    assert line in str(error.value)


def test_an_engine_without_its_methods_is_refused_by_name() -> None:
    context: Any = None
    with pytest.raises(
        UserError, match=r"engine bool: gave False, which has no generate, update_w"
    ):
        start_engine(bool, context)


def test_weights_are_one_where_the_engine_samples_from_the_policy(tmp_path: Path) -> None:
    """Training is then what it is without them, and the same with the engine's log-probs as old."""
    plain = trained(tmp_path / "plain", "llama", "transformers")
    weighted = trained(tmp_path / "a", "llama", "transformers", rollout=WEIGHTED)
    engines = trained(tmp_path / "b", "llama", "transformers", rollout={"old_logprobs": "engine"})
    for trainer in (weighted, engines):
        assert responses(trainer) == responses(plain)
        assert max(row["engine_ratio_max"] for row in rows(trainer)) < 1 + 1e-4
    assert [row["loss_weight_mean"] for row in rows(weighted)] == pytest.approx([1.0] * 3)
    assert "loss_weight_mean" not in rows(engines)[0]


def test_sampling_in_parts_changes_no_response(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"rollout": WEIGHTED | {"stop_strings": ["e"]}}
    at_once = trained(tmp_path / "a", "llama", "transformers", **sections)
    in_parts = {"name": "transformers", "batch_size": 3}
    parts = trained(tmp_path / "b", "llama", in_parts, **sections)
    assert responses(parts) == responses(at_once)
    for row, like in zip(rows(parts), rows(at_once), strict=True):
        assert row["loss_weight_mean"] == pytest.approx(like["loss_weight_mean"])
        assert row["policy_loss"] == pytest.approx(like["policy_loss"], abs=1e-6)


def test_weights_under_top_p_are_what_it_leaves_of_the_probability(tmp_path: Path) -> None:
    trainer = trained(
        tmp_path / "run",
        "llama",
        "transformers",
        rollout=WEIGHTED | {"top_p": 0.5},
    )
    for row in rows(trainer):
        assert 0.4 < row["loss_weight_mean"] < 0.9
        assert row["engine_ratio_max"] < 1  # the engine's probabilities are all larger


def test_an_engine_that_does_not_tell_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout.engine: CopyingEngine does not tell the log-pro"):
        trained(tmp_path / "run", "llama", Mute(), rollout=WEIGHTED)


@dataclass(frozen=True)
class Mute(Copying):
    """Does not tell what it sampled with."""

    def __call__(self, context: EngineContext) -> CopyingEngine:
        engine = CopyingEngine(context, self.updated)
        sample = engine.generate
        engine.generate = lambda *arguments: replace(sample(*arguments), logprobs=None)
        return engine


def responses(trainer: PPOTrainer) -> list[str]:
    return [json.loads(line)["response"] for line in samples(trainer).splitlines()]


def rows(trainer: PPOTrainer) -> list[dict[str, Any]]:
    lines = (trainer.run_dir.path / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["step"]]


def test_stale_weights_show_in_the_gap(tmp_path: Path) -> None:
    """In what the alarm watches, of an engine that takes no updates and of one that does."""
    sections = {
        "rollout": {"importance": ImportanceSettings()},
        "optimizer": {"learning_rate": 0.02},
    }
    stale = rows(trained(tmp_path / "stale", "llama", Copying(updated=False), **sections))
    fresh = rows(trained(tmp_path / "fresh", "llama", Copying(), **sections))
    assert max(row["engine_kl"] for row in fresh) < 1e-6
    assert stale[0]["engine_kl"] < 1e-6  # before the first update
    assert stale[-1]["engine_kl"] > 1e-3


class Faulty(CopyingEngine):
    """Fails in one of its methods, or spoils what it generates."""

    def __init__(self, context: EngineContext, method: str, change: Any) -> None:
        super().__init__(context, updated=True)
        self.method, self.change = method, change

    def _fail(self, method: str) -> None:
        if self.method == method and self.change is None:
            raise KeyError("no such server")

    def generate(self, prompts: Any, seeds: Any, settings: Any) -> Any:
        self._fail("generate")
        generation = super().generate(prompts, seeds, settings)
        return self.change(generation) if self.method == "generate" else generation

    def update_weights(self, weights: Any) -> None:
        self._fail("update_weights")
        super().update_weights(weights)

    def sleep(self) -> None:
        self._fail("sleep")

    def close(self) -> None:
        self._fail("close")


def faulty(method: str, change: Any = None) -> Any:
    def remote(context: EngineContext) -> Faulty:
        return Faulty(context, method, change)

    return remote


@pytest.mark.parametrize("method", ["generate", "update_weights", "sleep"])
def test_an_engine_that_fails_is_named(method: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"engine remote: raised KeyError: 'no such server' \(test_"
    ):
        trained(tmp_path / "run", "llama", faulty(method))


def test_an_engine_that_fails_at_the_end_does_not_spoil_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "run", "llama", faulty("close"))
    assert "marlhf: engine remote: raised KeyError" in capsys.readouterr().err
    assert (tmp_path / "run/final").is_dir()


def changed(**fields: Any) -> Any:
    """A change of a Generation: new values of its fields, by the old ones."""
    return lambda g: replace(g, **{name: new(getattr(g, name)) for name, new in fields.items()})


def first_false(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[3, 0] = False
    return mask


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda g: None, "generate returned None, must be a Generation"),
        (lambda g: g.response_ids.tolist(), "must be a Generation"),
        (changed(response_ids=lambda x: x.tolist()), "response_ids is .* must be a dense tensor"),
        (changed(response_ids=lambda x: x.float()), "response_ids is torch.float32, must be"),
        (changed(response_ids=lambda x: x + 300), "response_ids: .* must be 0 to 259"),
        (
            changed(response_ids=lambda x: x[1:]),
            r"response_ids has the shape \[7, 11\], must",
        ),
        (changed(response_mask=lambda x: x.long()), "response_mask is torch.int64, must be"),
        (changed(response_mask=first_false), "response_mask must be True up to each"),
        (changed(prompt_ids=lambda x: x.flip(0)), "prompt_ids: row 0 is not the prompt"),
        (changed(finished=lambda x: x[:, None]), r"finished has the shape \[8, 1\], must be \[8\]"),
        (changed(logprobs=lambda x: torch.full((8, 11), torch.nan)), "logprobs must be finite"),
    ],
)
def test_responses_of_a_wrong_form_are_refused(change: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"engine remote: .*{line}"):
        trained(tmp_path / "run", "llama", faulty("generate", change))
