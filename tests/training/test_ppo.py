"""The trainer, on tiny random models: invariances, golden curve, every option, faults."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import PROMPTS, tiny_config, tiny_trainer, vowels
from support.tiny_models import (
    BYTES_VOCAB,
    FAMILIES,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_sequence_classifier,
)

from marlhf.common.errors import UserError
from marlhf.config import LoraSettings
from marlhf.distributed import Distributed
from marlhf.models import building, loading
from marlhf.rewards import RewardError
from marlhf.segmenters import NGram
from marlhf.training import ppo
from marlhf.training.ppo import PPOTrainer

GOLDEN = Path(__file__).parents[1] / "recorded" / "golden_ppo.json"
ONE_STEP: dict[str, Any] = {
    "ppo": {"epochs": 1, "minibatches": 1},
    "optimizer": {"micro_batch_size": 3},
}
TIMES = ("_seconds", "tokens_per_second", "peak_memory_gb")


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not k.endswith(TIMES)}


def weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    critic = trainer.critic.model if trainer.critic else torch.nn.Module()
    modules = torch.nn.ModuleDict({"policy": trainer.policy.model, "critic": critic})
    return {name: p.detach().clone() for name, p in modules.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ratio_is_one_at_the_first_minibatch(family: str, tmp_path: Path) -> None:
    row = tiny_trainer(tmp_path, family, **ONE_STEP).step(PROMPTS)
    assert row["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert row["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert row["clip_fraction"] == 0
    assert row["kl_mean"] == pytest.approx(0, abs=1e-4)


def test_later_minibatches_move_away_from_ratio_one(tmp_path: Path) -> None:
    row = tiny_trainer(tmp_path).step(PROMPTS)  # two epochs of two minibatches
    assert row["ratio_max"] > 1.01


def test_in_bf16_the_ratio_is_one_to_its_precision(tmp_path: Path) -> None:
    sections = {**ONE_STEP, "model": {"precision": "bf16"}}
    trainer = tiny_trainer(tmp_path, **sections)
    row = trainer.step(PROMPTS)
    assert row["ratio_max"] == pytest.approx(1, abs=2e-2)
    assert {p.dtype for p in trainer.policy.parameters} == {torch.float32}


@pytest.mark.parametrize("value_loss", ["token", "macro"])
@pytest.mark.parametrize("ratio", ["token", "macro_mean", "macro_product"])
def test_micro_batches_do_not_change_the_update(
    ratio: str, value_loss: str, tmp_path: Path
) -> None:
    def updated(size: int) -> dict[str, torch.Tensor]:
        trainer = tiny_trainer(
            tmp_path,
            macro={"ratio": ratio, "value_loss": value_loss},
            optimizer={"micro_batch_size": size, "eps": 1.0},  # Adam linear in the gradient
        )
        trainer.step(PROMPTS)
        return weights(trainer)

    whole = updated(8)
    for size in (1, 2, 3):
        for name, value in updated(size).items():
            torch.testing.assert_close(value, whole[name], atol=1e-6, rtol=0, msg=name)


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        tiny_trainer(tmp_path / folder).train()
    tiny_trainer(tmp_path / "c", seed=1).train()
    a, b, c = ([timeless(r) for r in rows(tmp_path / folder)] for folder in "abc")
    assert a == b
    assert a != c
    samples = [(tmp_path / folder / "samples.jsonl").read_text() for folder in "abc"]
    assert samples[0] == samples[1] != samples[2]


def test_golden_curve(tmp_path: Path) -> None:
    """Five updates as they were when last looked at; on purpose changed: MARLHF_GOLDEN=write."""
    import os

    tiny_trainer(tmp_path, steps=5, segmenter={"name": "random_ngram"}).train()
    found = [timeless(row) for row in rows(tmp_path)]
    if os.environ.get("MARLHF_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    wanted = json.loads(GOLDEN.read_text())
    assert [set(row) for row in found] == [set(row) for row in wanted]
    for row, golden in zip(found, wanted, strict=True):
        assert {k for k, v in row.items() if v is None} == {k for k in golden if golden[k] is None}
        known = [k for k, v in golden.items() if v is not None]
        wanted_values = {k: golden[k] for k in known}
        assert {k: row[k] for k in known} == pytest.approx(wanted_values, rel=1e-3, abs=1e-4)


def test_it_learns(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path,
        steps=30,
        rollout={"batch_size": 16},
        kl={"coef": 0.0},
        optimizer={"learning_rate": 5e-3, "micro_batch_size": 16},
    )
    trainer.train()
    scores = [row["score_mean"] for row in rows(tmp_path)]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 1.0


OPTIONS: list[dict[str, Any]] = [
    *({"macro": {"value": v}} for v in ("position", "last", "first")),
    {"macro": {"reward": "mean", "discount": "per_macro"}},
    *({"macro": {"whiten": w}} for w in ("macro", "token", "none")),
    {"macro": {"last_token_alone": True}},
    *({"ppo": {"estimator": e}, "rollout": {"responses_per_prompt": 2}} for e in ("rloo", "grpo")),
    {"ppo": {"estimator": "reinforce"}},
    {"ppo": {"bootstrap_truncated": True, "value_clip_range": None}},
    {"ppo": {"logprob_temperature": "one"}, "rollout": {"temperature": 0.7}},
    {"kl": {"where": "loss", "coef": 0.5}},
    {"kl": {"where": "reward", "coef": 0.5}},
    *({"optimizer": {"schedule": s, "warmup_steps": 1}} for s in ("linear", "cosine", "constant")),
    {"optimizer": {"max_grad_norm": None, "weight_decay": 0.1}},
    {"rollout": {"top_k": 5, "top_p": 0.9, "min_new_tokens": 3, "stop_strings": ["e"]}},
    {"reward": {"clip": 1.0, "whiten": True, "missing_eos_penalty": 0.5}},
    {"model": {"gradient_checkpointing": True}},
    {"critic": {"init": "policy"}},
    {"data": {"shuffle": False}},
    *({"segmenter": s} for s in ("token", "random_ngram", "perplexity", "sequence", "word")),
    {"segmenter": {"name": "perplexity", "logprobs": "policy", "shift": -1}},
]


# the defaults of these runs, and what is equal in exact arithmetic
SAME_BY_DESIGN: list[dict[str, Any]] = [
    {"macro": {"whiten": "macro"}},
    {"critic": {"init": "policy"}},
    {"model": {"gradient_checkpointing": True}},
]


@pytest.mark.parametrize("sections", OPTIONS, ids=lambda s: json.dumps(s)[:60])
def test_every_option_runs_and_matters(sections: dict[str, Any], tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path / "with", **sections)
    trainer.train()
    found = rows(tmp_path / "with")
    assert len(found) == 2
    for row in found:
        assert all(v is None or math.isfinite(v) for v in row.values())
    tiny_trainer(tmp_path / "without").train()
    if sections not in SAME_BY_DESIGN:
        assert [timeless(r) for r in found] != [timeless(r) for r in rows(tmp_path / "without")]


def test_critic_warm_up_leaves_the_policy_alone(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, critic={"warmup_steps": 1})
    before = weights(trainer)
    row = trainer.step(PROMPTS)
    assert row["policy_loss"] is row["ratio_max"] is None
    assert row["value_loss"] is not None
    between = weights(trainer)
    changed = {name.split(".")[0] for name in before if (before[name] != between[name]).any()}
    assert changed == {"critic"}
    trainer.step(PROMPTS)
    after = weights(trainer)
    assert any((after[n] != between[n]).any() for n in after if n.startswith("policy"))


def test_lora_trains_adapters_and_heads_alone(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, model={"lora": LoraSettings(r=4)})
    before = weights(trainer)
    first, second = trainer.step(PROMPTS), trainer.step(PROMPTS)
    changed = {name for name, value in weights(trainer).items() if (value != before[name]).any()}
    assert changed
    assert all("lora_" in name or name.startswith("critic.head") for name in changed)
    assert any(".policy." in name for name in changed)
    assert any(".critic." in name for name in changed)
    assert first["kl_mean"] == pytest.approx(0, abs=1e-4)
    assert abs(second["kl_mean"]) > 1e-3
    trainer.save(tmp_path / "final")
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 6, 7, 8]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    policy: Any = trainer.policy.model
    policy.model.set_adapter("policy")
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, policy.model(ids).logits, atol=1e-4, rtol=0)


def test_the_critic_can_start_as_the_reward_model(tmp_path: Path) -> None:
    classifier = tiny_sequence_classifier("llama", BYTES_VOCAB, seed=3)
    classifier.config.score_offset = 0.5
    classifier.save_pretrained(tmp_path / "reward")
    byte_tokenizer().save_pretrained(tmp_path / "reward")
    trainer = tiny_trainer(tmp_path / "run", score=str(tmp_path / "reward"))
    assert trainer.critic is not None
    torch.testing.assert_close(trainer.critic.model.head.weight, classifier.score.weight)
    assert trainer.critic.model.offset == 0.5
    row = trainer.step(PROMPTS)
    assert math.isfinite(row["explained_variance"])


def test_a_critic_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny_sequence_classifier("llama", 100).save_pretrained(tmp_path / "critic")
    with pytest.raises(UserError, match=r"vocabulary of 100 tokens, the policy 260"):
        tiny_trainer(tmp_path / "run", critic={"path": str(tmp_path / "critic")})


def test_a_run_directory_holds_what_it_should(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, log={"tensorboard": True, "eval_every": 1})
    trainer.eval_prompts = list(trainer.stream.prompts[:3])
    trainer.train()
    written = rows(tmp_path)
    assert [row["step"] for row in written] == [0, 1, 2]
    wanted = """step score_mean score_std kl_mean objective_mean entropy policy_loss value_loss
        clip_fraction ratio_max explained_variance response_length_mean eos_fraction
        macro_length_mean macro_count_mean learning_rate grad_norm_policy grad_norm_value
        step_seconds generate_seconds score_seconds segment_seconds train_seconds
        tokens_per_second peak_memory_gb eval_score_mean eval_kl_mean""".split()
    assert set(wanted) <= set(written[1])
    samples = rows(tmp_path, "samples.jsonl")
    assert {(s["step"], s["held_out"]) for s in samples} == {
        (0, True), (1, True), (1, False), (2, True), (2, False)
    }  # fmt: skip
    for sample in samples:
        assert "".join(sample["macro_actions"]) == sample["response"]
        assert len(sample["macro_actions"]) == len(sample["macro_lengths"])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    AutoTokenizer.from_pretrained(tmp_path / "final")
    assert list((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "config.yaml").is_file()


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    tiny_trainer(tmp_path).train()
    with pytest.raises(UserError, match="already holds a run"):
        tiny_trainer(tmp_path, overwrite=False)
    assert len(rows(tmp_path)) == 2


def test_held_out_prompts_are_sampled_with_the_same_noise_every_time(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.eval_prompts = list(trainer.stream.prompts)
    first = trainer.evaluate()
    assert trainer.evaluate() == first
    trainer.step(PROMPTS)
    assert trainer.evaluate() != first


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (lambda n: [1.0] * (n - 1) + [float("nan")], "row 7"),
        (lambda n: [1.0] * (n + 1), "9 entries for 8 rows"),
        (lambda n: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["nan", "rows", "raises"],
)
def test_a_failing_reward_stops_the_run_and_loses_nothing(
    result: Any, fault: str, tmp_path: Path
) -> None:
    calls = 0

    def reward(prompts: list[str], completions: list[str]) -> Any:
        nonlocal calls
        calls += 1
        return vowels(prompts, completions) if calls == 1 else result(len(completions))

    with pytest.raises(RewardError, match=fault):
        tiny_trainer(tmp_path, score=reward).train()
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_rewards_inside_a_response_land_on_their_tokens(tmp_path: Path) -> None:
    def dense(prompts: list[str], completions: list[str]) -> list[Any]:
        return [[(1, 2.0), (len(c), 1.0)] if c else None for c in completions]

    trainer = tiny_trainer(tmp_path, score=dense)
    from marlhf.runs.metrics import Timer

    prompts = trainer.stream.prompts[:4]
    rollout = trainer.worker(prompts, range(4), 0, Timer())
    for row, text in enumerate(rollout.responses.texts):
        rewards = rollout.task_rewards[row]
        assert float(rewards.sum()) == (3.0 if text else 0.0)
        first = next(i for i, (a, b) in enumerate(rollout.responses.offsets[row]) if a == 0 < b)
        assert float(rewards[: first + 4].sum()) >= 2.0


def test_a_faulty_segmenter_is_named(tmp_path: Path) -> None:
    def mine(batch: Any) -> torch.Tensor:
        return torch.zeros_like(batch.response_mask)

    trainer = tiny_trainer(tmp_path)
    trainer.segmenter = mine
    with pytest.raises(UserError, match="segmenter mine: the first response token of row 0"):
        trainer.step(PROMPTS)


@pytest.mark.parametrize("name", ["entropy", "score_mean", "ratio_max", "grad_norm_policy"])
def test_a_segmenters_metric_must_not_be_called_as_another(name: str, tmp_path: Path) -> None:
    class Mine(NGram):
        def metrics(self) -> dict[str, float]:
            return {name: 1.0}

    trainer = tiny_trainer(tmp_path)
    trainer.segmenter = Mine(2)
    with pytest.raises(UserError, match=f"segmenter: its metric '{name}' has the name of another"):
        trainer.step(PROMPTS)


def test_what_is_no_configuration_or_no_model_is_refused(tmp_path: Path) -> None:
    wrong: Any = "run.yaml"
    with pytest.raises(UserError, match=r"config: given a str.* load_config\(PPOConfig"):
        PPOTrainer(wrong)
    with pytest.raises(UserError, match=r"model: given 'tiny'.*config\.model\.path"):
        tiny_trainer(tmp_path, lm="tiny")


def test_a_finished_model_object_needs_no_path(tmp_path: Path) -> None:
    row = tiny_trainer(tmp_path, lm=tiny_causal_lm("gpt2", BYTES_VOCAB, seed=4)).step(PROMPTS)
    assert row["step"] == 1


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("linear", [0, 0.5, 1, 0.5]), ("cosine", [0, 0.5, 1, 0.5]), ("constant", [0, 0.5, 1, 1])],
)
def test_every_schedule_warms_up(schedule: str, factors: list[float], tmp_path: Path) -> None:
    settings = {"schedule": schedule, "warmup_steps": 2, "learning_rate": 1e-3}
    trainer = tiny_trainer(tmp_path, steps=4, optimizer=settings)
    rates = [trainer.step(PROMPTS)["learning_rate"] for _ in factors]
    assert rates == pytest.approx([1e-3 * factor for factor in factors])


def test_a_generation_config_that_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    lm = tiny_causal_lm("llama", BYTES_VOCAB)
    lm.generation_config.temperature = 0.9  # without do_sample
    with pytest.raises(UserError, match=r"model: its generation_config: .*temperature"):
        tiny_trainer(tmp_path, lm=lm)


def test_models_given_as_objects_are_trained_as_loaded_ones_are(tmp_path: Path) -> None:
    dropout: dict[str, Any] = {"resid_pdrop": 0.3, "attn_pdrop": 0.3, "embd_pdrop": 0.3}
    lm = tiny_causal_lm("gpt2", BYTES_VOCAB, **dropout).to(torch.bfloat16)
    trainer = tiny_trainer(tmp_path, lm=lm, **ONE_STEP)
    assert {p.dtype for p in trainer.policy.parameters} == {torch.float32}
    assert trainer.step(PROMPTS)["ratio_max"] == pytest.approx(1, abs=1e-4)
    critic = tiny_sequence_classifier("llama", 64)
    with pytest.raises(UserError, match=r"critic: .* vocabulary of 64 tokens, the policy 260"):
        building.build_models(trainer.config, trainer.tokenizer, None, lm, critic)
    adapted = loading.add_adapter(tiny_causal_lm("llama", BYTES_VOCAB), LoraSettings(), "mine")
    with pytest.raises(UserError, match="model: given a PEFT model"):
        building.build_models(trainer.config, trainer.tokenizer, None, adapted)


def test_gradient_checkpointing_is_for_the_critic_too(tmp_path: Path) -> None:
    critic = tiny_sequence_classifier("llama", BYTES_VOCAB)
    config = tiny_trainer(tmp_path, model={"gradient_checkpointing": True}).config
    lm = tiny_causal_lm("llama", BYTES_VOCAB)
    policy, value_model, _ = building.build_models(config, byte_tokenizer(), None, lm, critic)
    for model in (policy, value_model):
        assert model is not None
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_the_last_token_can_be_a_macro_action_of_its_own(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, macro={"last_token_alone": True}, log={"eval_every": 1})
    trainer.eval_prompts = list(trainer.stream.prompts[:2])
    trainer.train()
    samples = rows(tmp_path, "samples.jsonl")
    assert {s["held_out"] for s in samples} == {True, False}
    for sample in samples:
        *before, last = sample["macro_lengths"]
        assert last == 1
        assert before == [min(3, sum(before) - i) for i in range(0, sum(before), 3)]


def test_a_batch_that_cannot_be_cut_into_minibatches_is_refused_early(tmp_path: Path) -> None:
    rollout = {"batch_size": 3, "responses_per_prompt": 2}
    with pytest.raises(ValueError, match=r"ppo\.minibatches: given 2, must divide"):
        tiny_config(tmp_path, rollout=rollout)


def test_a_batch_that_ranks_cannot_share_is_refused_before_a_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneOfThree(Distributed):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.ranks = 3

        @property
        def world_size(self) -> int:
            return vars(self).get("ranks", 1)

        def gather_objects(self, items: list[Any]) -> list[Any]:
            return items * self.world_size

    monkeypatch.setattr(ppo, "Distributed", OneOfThree)
    monkeypatch.setattr(building, "build_models", None)
    fault = r"rollout\.batch_size: given 8 prompts, must be a multiple of 6 \(3 ranks x"
    with pytest.raises(UserError, match=fault):
        tiny_trainer(tmp_path)
