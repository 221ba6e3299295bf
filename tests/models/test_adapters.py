"""Saved adapters: merged by `marlhf merge`, and a reward model's on the policy's own base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from support.runs import PROMPTS, tiny_config, tiny_trainer
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from marlhf import cli
from marlhf.common.errors import UserError
from marlhf.config import LoraSettings, ModelSettings
from marlhf.models import loading
from marlhf.models.adapters import add_adapter
from marlhf.models.policy import Critic, use_adapter
from marlhf.models.reward_classifier import build_classifier, save_classifier
from marlhf.rewards import RewardModel
from marlhf.rollout import batching
from marlhf.training.ppo import PPOTrainer

LORA = LoraSettings(r=4, extra={"init_lora_weights": False})  # adapters that do something
OFFSET = 0.75


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A causal LM with its tokenizer."""
    folder = tmp_path / "base"
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(folder)
    byte_tokenizer(add_bos=True).save_pretrained(folder)
    return folder


@pytest.fixture
def reward(base: Path, tmp_path: Path) -> Path:
    """A reward model that is an adapter of it: `adapter/reward` beside the merged model."""
    settings = ModelSettings(path=str(base), lora=LORA)
    tokenizer = byte_tokenizer(add_bos=True)
    model = build_classifier(settings, loading.load_model_config(settings), tokenizer)
    save_classifier(model, tokenizer, OFFSET, tmp_path / "reward")
    return tmp_path / "reward"


def trainer(base: Path, folder: Path, reward: Any, **sections: Any) -> PPOTrainer:
    """A run that loads its models."""
    sections["model"] = {"path": str(base), **sections.get("model", {})}
    return PPOTrainer(tiny_config(folder, **sections), reward=reward, train_dataset=PROMPTS)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40, 60)[None]).logits


def test_merge_writes_the_model_that_a_run_trained(base: Path, tmp_path: Path) -> None:
    run = trainer(
        base, tmp_path / "run", lambda prompts, completions: [1.0] * 8, model={"lora": LORA}
    )
    run.step(PROMPTS)
    run.save(tmp_path / "run" / "final")
    cli.main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    adapter = tmp_path / "run" / "final" / "adapter" / "policy"
    apart = AutoPeftModelForCausalLM.from_pretrained(adapter)
    torch.testing.assert_close(logits(merged), logits(final))
    # W x + B A x against (W + B A) x: float32 rounds them differently, by 1e-5 on some processors
    torch.testing.assert_close(logits(apart), logits(final), atol=1e-4, rtol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(logits(plain), logits(final), atol=1e-3)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_merge_writes_a_reward_model(reward: Path, tmp_path: Path) -> None:
    cli.main(["merge", str(reward / "adapter" / "reward"), str(tmp_path / "merged")])
    found, wanted = (
        AutoModelForSequenceClassification.from_pretrained(folder)
        for folder in (tmp_path / "merged", reward)
    )
    assert found.config.score_offset == OFFSET
    torch.testing.assert_close(logits(found), logits(wanted))


def test_merging_grows_a_base_as_the_adapter_did(base: Path, tmp_path: Path) -> None:
    """Its embeddings were resized, and trained, before it was saved: PEFT saves them all."""
    lm, ids = tiny_causal_lm("llama", BYTES_VOCAB), torch.tensor([[40, BYTES_VOCAB, 50]])
    lm.resize_token_embeddings(BYTES_VOCAB + 3)
    layers = ["q_proj"]
    config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(lm, config).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == BYTES_VOCAB + 3
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits)


def test_merging_refuses_tokens_that_peft_would_lose(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = tiny_causal_lm("llama", BYTES_VOCAB)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5])
    adapted = get_peft_model(lm, config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SystemExit) as end:
        cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    assert end.value.code == 2
    assert "has trainable_token_indices, which PEFT loses" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_merge_says_what_is_wrong(
    base: Path, reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "which is not a directory that exists": ["merge", "nowhere", "out"],
        "holds no adapter": ["merge", str(base), str(tmp_path / "out")],
        "exists already": ["merge", str(reward), str(base)],
        "base": ["merge", str(reward), str(tmp_path / "out"), "--base", str(tmp_path / "gone")],
    }
    for fault, words in cases.items():
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 2
        assert fault in capsys.readouterr().err


def test_an_adapter_scores_as_the_merged_model_does(
    base: Path, reward: Path, tmp_path: Path
) -> None:
    completions = ["some words", "x", "", "others, which are longer", "a", "b", "c", "d"]
    wanted = RewardModel(str(reward))(PROMPTS, completions)
    alone = RewardModel(str(reward / "adapter" / "reward"))
    assert alone(PROMPTS, completions) == pytest.approx(wanted, abs=1e-5)
    run = trainer(
        base,
        tmp_path / "run",
        str(reward / "adapter" / "reward"),
        model={"lora": LoraSettings(r=2)},
    )
    (shared,) = run.reward.rewards
    found = shared.function(PROMPTS, completions)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert max(found) - min(found) > 0.1


def test_one_base_holds_policy_critic_and_reward_model(
    base: Path, reward: Path, tmp_path: Path
) -> None:
    adapter = str(reward / "adapter" / "reward")
    run = trainer(base, tmp_path / "run", adapter, model={"lora": LoraSettings(r=2)})
    policy, critic = run.policy.model, run.critic.model  # type: ignore[union-attr]
    scorer = run.reward.rewards[0].function.model
    assert isinstance(scorer, Critic)
    assert critic.backbone is scorer.backbone is policy.model.get_base_model().model
    # the critic starts from the reward model: the value of a whole response is its score
    ids = torch.randint(3, 250, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(
            critic(ids, mask, mask[:, 4:])[1], scorer(ids, mask, mask[:, 4:])[1]
        )
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    kept = run.reward.rewards[0].function(PROMPTS, PROMPTS)
    run.step(PROMPTS)
    changed = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert {part for n in changed for part in ("policy", "critic") if f".{part}." in n} == {
        "policy",
        "critic",
    }
    assert all(".policy." in name or ".critic." in name for name in changed)
    assert run.reward.rewards[0].function(PROMPTS, PROMPTS) == kept


def test_an_adapter_of_another_base_keeps_a_base_of_its_own(
    base: Path, reward: Path, tmp_path: Path
) -> None:
    tiny_causal_lm("llama", BYTES_VOCAB, seed=5).save_pretrained(tmp_path / "other")
    byte_tokenizer(add_bos=True).save_pretrained(tmp_path / "other")
    adapter = str(reward / "adapter" / "reward")
    run = trainer(tmp_path / "other", tmp_path / "run", adapter, model={"lora": LoraSettings(r=2)})
    wanted = RewardModel(str(reward))(PROMPTS, PROMPTS)
    assert run.reward.rewards[0].function(PROMPTS, PROMPTS) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        ({"bias": "all"}, "must stay none"),
        ({"init_lora_weights": "pissa"}, "others change the base"),
        ({"inference_mode": True}, "is chosen by the library"),
        ({"lora_bias": True}, "q_proj has no bias"),
        ({"trainable_token_indices": [3]}, "PEFT loses it"),
    ],
)
def test_settings_that_would_change_the_reference_are_refused(
    extra: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        add_adapter(tiny_causal_lm("llama"), LoraSettings(extra=extra), "policy")


@pytest.mark.parametrize(
    ("modules", "extra"),
    [(["lm_head"], {}), (["embed_tokens"], {}), ([], {"modules_to_save": ["lm_head"]})],
)
def test_one_weight_for_embeddings_and_head_takes_no_adapter(
    modules: list[str], extra: dict[str, Any]
) -> None:
    lora = LoraSettings(target_modules=["q_proj", *modules], extra=extra)
    with pytest.raises(ValueError, match="one weight in this model"):
        add_adapter(tiny_causal_lm("llama", tie_word_embeddings=True), lora, "policy")


@pytest.mark.parametrize(
    ("modules", "extra"),
    [
        ([], {"use_rslora": True}),
        ([], {"use_dora": True}),
        ([], {"modules_to_save": ["lm_head"]}),
        ([], {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ([], {"layers_to_transform": [1]}),
        ([], {"target_parameters": ["mlp.up_proj.weight"]}),
        (["lm_head"], {}),
        (["embed_tokens"], {}),
    ],
    ids=json.dumps,
)
def test_settings_of_peft_are_passed_through(
    modules: list[str], extra: dict[str, Any], tmp_path: Path
) -> None:
    """All of the adapter is trained, and `final/` is the policy that was trained."""
    lora = LoraSettings(r=2, extra=extra, target_modules=["q_proj", "v_proj", *modules])
    lm = tiny_causal_lm("llama", BYTES_VOCAB, tie_word_embeddings=False)
    run = tiny_trainer(tmp_path, model={"lora": lora}, lm=lm, optimizer={"learning_rate": 3e-2})
    model = run.policy.model.model
    config = model.peft_config["policy"]
    assert {name: getattr(config, name) for name in extra} == extra
    own = {n: p.detach().clone() for n, p in model.named_parameters() if "policy" in n.split(".")}
    row = run.step(PROMPTS)
    assert row["ratio_max"] > 1
    assert [n for n, p in model.named_parameters() if n in own and torch.equal(p, own[n])] == []
    run.save(tmp_path / "saved")
    with use_adapter(model, "policy"):
        trained = logits(model)
    with use_adapter(model, None):
        assert (logits(model) - trained).abs().max() > 0.01
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.allclose(logits(saved), trained, atol=1e-4)


def test_gradient_checkpointing_runs_every_layer_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passes(checkpointing: bool) -> int:
        run = tiny_trainer(
            tmp_path,
            model={"gradient_checkpointing": checkpointing},
            ppo={"epochs": 1, "minibatches": 1},
            optimizer={"micro_batch_size": 8},
        )
        monkeypatch.setattr(batching, "CPU_PASS_COST", 1000)
        count = [0]
        for layer in run.policy.model.model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
        real = run.policy.accumulate
        run.policy.accumulate = lambda *terms: (count.__setitem__(0, 0), real(*terms))[1]  # type: ignore[method-assign]
        run.step(PROMPTS)
        return count[0]

    assert passes(False) == 2  # layers of the model, one micro-batch
    assert passes(True) == 4


def test_adapters_are_written_the_same_in_every_process(tmp_path):
    """Sets have another order in each; PEFT writes them as they come."""
    program = (
        "import sys; from support.tiny_models import *; "
        "from marlhf.models import loading, reward_classifier, saving; "
        "from marlhf.config import LoraSettings, ModelSettings; "
        "from pathlib import Path; import torch; torch.manual_seed(0); t = byte_tokenizer(); "
        "lm = tiny_causal_lm('llama', BYTES_VOCAB); out = Path(sys.argv[1]); "
        "extra = {'exclude_modules': ['lm_head', 'embed_tokens', 'norm', 'rotary_emb']}; "
        "s = ModelSettings(path='x', lora=LoraSettings(extra=extra)); "
        "p = loading.build_policy(s, t, lm.config, lm); "
        "saving.save_policy(p, t, out / 'policy'); "
        "m = reward_classifier.add_adapter("
        "tiny_sequence_classifier('llama', BYTES_VOCAB), s.lora, 'reward', 'SEQ_CLS'); "
        "reward_classifier.save_classifier(m, t, 0.5, out / 'reward')"
    )
    for seed in "123":
        paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        here = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        words = [sys.executable, "-c", program, str(tmp_path / seed)]
        subprocess.run(words, env=here, check=True, capture_output=True)
    first, *others = (
        {f.relative_to(tmp_path / seed): f.read_bytes() for f in (tmp_path / seed).rglob("*.*")}
        for seed in "123"
    )
    for kind in ("policy", "reward"):
        assert Path(kind, "adapter", kind, "adapter_config.json") in first
    for other in others:
        assert {k for k in first | other if first.get(k) != other.get(k)} == set()


NO_MODULE = [
    (["q_proj", "v_poj"], {}, r"target_modules: given 'v_poj', .* it has .*, q_proj, up_proj, v"),
    ("q_proj", {}, r"target_modules: given 'q_proj', .* so give a list, \[q_proj\]"),
    (r".*\.h\.\d", {}, "target_modules: given"),
    (
        "all-linear",
        {"rank_pattern": {"q_proj": 2, "1.c_fc": 4}},
        "extra.rank_pattern: given '1.c_fc'",
    ),
    ("all-linear", {"exclude_modules": ["lm_haed"]}, "extra.exclude_modules: given 'lm_haed'"),
]


@pytest.mark.parametrize(("targets", "extra", "line"), NO_MODULE)
def test_names_that_match_no_module_are_refused(targets: Any, extra: Any, line: str) -> None:
    lora = LoraSettings(target_modules=targets, extra=extra)
    with pytest.raises(UserError, match=line):
        add_adapter(tiny_causal_lm("llama"), lora, "policy")


def test_names_and_patterns_as_peft_reads_them() -> None:
    ranks = {r"^model.*\.0\..*q_proj": 2, "1.self_attn.q_proj": 3, "v_proj": 5}
    lora = LoraSettings(
        target_modules=r"model\..*\.(q|v)_proj",
        extra={"rank_pattern": ranks, "exclude_modules": r".*1\.self_attn\.v_proj"},
    )
    model = add_adapter(tiny_causal_lm("llama"), lora, "policy")
    weights = {n: p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}
    assert sorted(weights.values()) == [2, 3, 5]
