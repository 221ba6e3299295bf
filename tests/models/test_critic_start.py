"""What the critic starts from, and reward models whose adapters would need more tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import PROMPTS, tiny_config
from support.tiny_models import (
    BYTES_VOCAB,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_sequence_classifier,
)
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from marlhf import cli
from marlhf.common.errors import UserError
from marlhf.config import LoraSettings, RewardConfig
from marlhf.config.loading import config_from_dict
from marlhf.rewards import RewardModel
from marlhf.training import reward_model
from marlhf.training.ppo import PPOTrainer

FULL = BYTES_VOCAB - 1  # every embedding has a token


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lm`, a model without a spare token, and `adapted` and `whole`, reward models trained on it
    with and without LoRA."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = byte_tokenizer(pad=None)
    tokenizer.pad_token = "</s>"
    tiny_causal_lm("gpt2", FULL).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    # every special token stands in a text, so that none can be the pad token
    rows = [{"prompt": f"say {i}", "chosen": " yes<pad><s>", "rejected": " no"} for i in range(6)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, lora in (("adapted", {"r": 4}), ("whole", None)):
        values = {
            "model": {"path": str(folder / "lm"), "lora": lora},
            "data": {"path": str(folder / "pairs.jsonl"), "eval_rows": 2},
            "output_dir": str(folder / name),
            "batch_size": 4,
            "steps": 2,
            "optimizer": {"learning_rate": 0.01},
            "log": {"progress": False, "tensorboard": False},
            "checkpoint": {"every": 0},
        }
        reward_model.run(config_from_dict(RewardConfig, values))
    return folder


def trainer(world: Path, folder: Path, reward: Any, **sections: Any) -> PPOTrainer:
    sections["model"] = {"path": str(world / "lm"), **sections.get("model", {})}
    return PPOTrainer(tiny_config(folder / "run", **sections), reward=reward, train_dataset=PROMPTS)


def line(run: PPOTrainer) -> str:
    (found,) = [note for note in run.notes if note.startswith("critic.init: auto: ")]
    return found.removeprefix("critic.init: auto: the critic starts from the ")


TEXTS = ["yes", "no no", "x<pad>", "something longer", "", "</s>", "a", "b"]


def test_an_adapter_of_a_model_without_a_spare_token_is_a_reward_model(
    world: Path, tmp_path: Path
) -> None:
    final, adapter = world / "adapted" / "final", world / "adapted" / "final/adapter/reward"
    wanted = RewardModel(str(final))(PROMPTS, TEXTS)
    assert max(wanted) - min(wanted) > 0.05
    cli.main(["merge", str(world / "adapted"), str(tmp_path / "merged")])
    for path in (adapter, tmp_path / "merged"):
        assert RewardModel(str(path))(PROMPTS, TEXTS) == pytest.approx(wanted, abs=1e-5)
    # stock transformers, in one padded batch
    for path in (final, tmp_path / "merged", world / "whole" / "final"):
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        whole = [p + c for p, c in zip(PROMPTS, TEXTS, strict=True)]
        batch = tokenizer(whole, padding=True, return_tensors="pt")
        with torch.no_grad():
            scores = model(**batch).logits[:, 0] - model.config.score_offset
        ours = RewardModel(str(path))(PROMPTS, TEXTS)
        assert scores.tolist() == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("name", ["adapted/final", "adapted/final/adapter/reward", "whole/final"])
def test_the_critic_starts_from_a_reward_model_that_grew(
    name: str, lora: Any, world: Path, tmp_path: Path
) -> None:
    settings = None if lora is None else LoraSettings(**lora)
    run = trainer(world, tmp_path, str(world / name), model={"lora": settings})
    if lora is not None and "adapter" not in name:
        assert "policy, as the reward model" in line(run)
        assert "is no adapter of the policy's base" in line(run)
        return
    assert line(run) == f"reward model {str(world / name)!r}"
    assert run.critic is not None
    texts = ["say yes!", "no never", "a longer"]
    ids = torch.tensor(run.tokenizer(texts)["input_ids"])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        values = run.critic.model(ids, mask, mask[:, 4:])[1]
    model = RewardModel(str(world / name))
    ours = [model([""], [text])[0] for text in texts]
    assert values.tolist() == pytest.approx(ours, abs=1e-4)


def classifier(folder: Path, family: str = "gpt2", tokenizer: Any = None, **changes: Any) -> str:
    tiny_sequence_classifier(family, FULL, **changes).save_pretrained(folder)
    (tokenizer or byte_tokenizer(pad=None)).save_pretrained(folder)
    return str(folder)


def shuffled() -> Any:
    """As many tokens as the other tokenizer, two of which have each other's numbers."""
    text = byte_tokenizer(pad=None).backend_tokenizer.to_str()
    description = json.loads(text)
    vocab = description["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    made = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"family": "bert"},
            "is a BertForSequenceClassification, which has no linear `score` head",
        ),
        ({"tokenizer": shuffled}, "has other tokens than the policy: "),
        ({"n_positions": 20}, "has 20 positions, fewer than the 27"),
    ],
)
def test_a_reward_model_that_is_no_critic_leaves_the_policy_to_start_from(
    changes: dict[str, Any], why: str, world: Path, tmp_path: Path
) -> None:
    changes = {k: v() if callable(v) else v for k, v in changes.items()}
    path = classifier(tmp_path / "rm", **changes)
    run = trainer(world, tmp_path, path)
    assert line(run).startswith(f"policy, as the reward model {path!r} {why}")
    assert run.critic is not None
    assert not run.critic.model.head.weight.any()
    with pytest.raises(UserError) as fault:
        trainer(world, tmp_path, path, critic={"init": "reward"})
    assert why in str(fault.value)
    assert "critic.init=policy" in str(fault.value)
    assert "critic.path" not in str(fault.value)
