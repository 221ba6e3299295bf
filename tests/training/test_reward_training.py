"""`marlhf reward` against plain loops in float64, plain transformers, and itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launches import PROFILES, accelerate, first_error, run, sharding_everything
from support.tiny_models import (
    BYTES_VOCAB,
    CHATML,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_sequence_classifier,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from marlhf.algorithm.losses import pairwise_loss
from marlhf.common.errors import UserError
from marlhf.config import PPOConfig, RewardConfig, SFTConfig
from marlhf.config.loading import config_from_dict, config_to_dict
from marlhf.data.pairs import TokenizedPair, choose_pad_token, load_preferences
from marlhf.models.loading import load_model_config
from marlhf.models.reward_classifier import build_classifier
from marlhf.rewards import RewardModel
from marlhf.training import ppo, reward_model, sft

ROWS = [
    {
        "prompt": f"Say {'abcdefgh'[i % 8]}:",
        "chosen": " " + "yes " * (1 + i % 3),
        "rejected": " " + "no" * (1 + i % 4),
        "margin": i % 3,
    }
    for i in range(20)
]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with a model `lm` and pairs `data.jsonl`."""
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(tmp_path / "lm")
    byte_tokenizer(add_bos=True, chat_template=CHATML).save_pretrained(tmp_path / "lm")
    write(tmp_path / "data.jsonl", ROWS)
    return tmp_path


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def configured(world: Path, **changes: Any) -> RewardConfig:
    """Two steps of 8 pairs in micro-batches of 2; sections may be given in part."""
    values: dict[str, Any] = {
        "model": {"path": str(world / "lm")},
        "data": {"path": str(world / "data.jsonl"), "eval_rows": 4},
        "output_dir": str(world / "run"),
        "overwrite": True,
        "steps": 2,
        "batch_size": 8,
        "max_length": 64,
        "optimizer": {"learning_rate": 1e-2, "micro_batch_size": 2, "eps": 0.1},
        "log": {"progress": False, "tensorboard": False, "eval_every": 2},
        "checkpoint": {"every": 0},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return config_from_dict(RewardConfig, values)


def metrics(world: Path, run: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / run / "metrics.jsonl").read_text().splitlines()]


def report(world: Path) -> dict[str, Any]:
    return json.loads((world / "run" / reward_model.REPORT).read_text())


def trained(world: Path, run: str = "run") -> Any:
    return AutoModelForSequenceClassification.from_pretrained(world / run / "final").eval()


def pairs_of(config: RewardConfig, world: Path) -> Any:
    return load_preferences(config, AutoTokenizer.from_pretrained(world / "lm"))


def plain_loss(model: Any, pairs: list[TokenizedPair], centring: float) -> torch.Tensor:
    """Bradley-Terry from its definition, one unpadded text at a time, in float64."""

    def score(ids: list[int]) -> torch.Tensor:
        hidden = model.model(torch.tensor([ids])).last_hidden_state
        return (model.score.weight[0] * hidden[0, -1]).sum()

    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        good, bad = score(pair.chosen), score(pair.rejected)
        probability = 1 / (1 + (bad + pair.margin - good).exp())
        total = total - probability.log() + centring * (good + bad) ** 2
    return total / len(pairs)


def test_steps_are_those_of_a_plain_loop(world):
    """16 pairs, all in each step, so that their order does not matter."""
    settings = {"betas": [0.9, 0.95], "weight_decay": 0.01, "max_grad_norm": 0.5}
    config = configured(
        world,
        batch_size=16,
        centring=0.05,
        optimizer={**settings, "micro_batch_size": 4},
        data={"margin_column": "margin"},
    )
    reward_model.run(config)
    data = pairs_of(config, world)
    assert [pair.margin for pair in data.pairs] == [i % 3 for i in range(16)]

    torch.manual_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(world / "lm")
    model = build_classifier(config.model, load_model_config(config.model), tokenizer).double()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=0.1, weight_decay=0.01
    )
    for step in range(2):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 2)
        loss = plain_loss(model, data.pairs, 0.05)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        row = metrics(world)[step + 1]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["trained_pairs"] == 16
    found = trained(world).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name].double(), value, atol=1e-5, rtol=0, msg=name)
    with torch.no_grad():
        held_out = plain_loss(model, data.held_out, 0.05).item()
    assert metrics(world)[-1]["eval_loss"] == pytest.approx(held_out, rel=1e-4)


def test_the_pairwise_loss_and_its_gradient():
    chosen = torch.tensor([1.0, -2.0, 30.0, -40.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.5, 1.0, -30.0, 40.0], dtype=torch.float64, requires_grad=True)
    margin = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    loss = pairwise_loss(chosen, rejected, margin, 0.1, denominator=8.0)
    wanted = sum(
        math.log1p(math.exp(-abs(d))) + max(-d, 0) + 0.1 * (c + r) ** 2
        for c, r, d in (
            (c, r, c - r - m)
            for c, r, m in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True)
        )
    )
    assert loss.item() == pytest.approx(wanted / 8, rel=1e-12)
    torch.autograd.gradcheck(
        lambda c, r: pairwise_loss(c, r, margin, 0.1, 8.0), (chosen, rejected), atol=1e-4
    )
    swapped = pairwise_loss(rejected, chosen, margin, 0.1, 8.0)
    assert abs(swapped.item() - loss.item()) > 0.1


def test_scores_are_centred_and_plain_transformers_agrees(world):
    config = configured(world, steps=6)
    reward_model.run(config)
    model, offset = trained(world), report(world)["score_offset"]
    assert model.num_labels == 1
    assert model.config.score_offset == offset
    tokenizer = AutoTokenizer.from_pretrained(world / "run/final")
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    rows = ROWS[:16]
    prompts = [row["prompt"] for row in rows]
    ours = {
        size: RewardModel(str(world / "run/final"), batch_size=size)(
            prompts, [row["chosen"] for row in rows]
        )
        for size in (1, 5, 16)
    }
    assert sum(ours[5]) / 16 == pytest.approx(0, abs=1e-5)
    assert ours[1] == pytest.approx(ours[5], abs=1e-5)
    assert ours[16] == pytest.approx(ours[5], abs=1e-5)
    texts = [row["prompt"] + row["chosen"] for row in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        stock = model(**batch).logits[:, 0]
    assert (stock - offset).tolist() == pytest.approx(ours[5], abs=1e-5)


def test_it_learns_and_says_how_well(world):
    config = configured(
        world, steps=12, batch_size=16, optimizer={"micro_batch_size": 8, "eps": 1e-5}
    )
    reward_model.run(config)
    rows = metrics(world)
    assert [row["step"] for row in rows] == list(range(13))
    assert (rows[0]["train_pairs"], rows[0]["eval_pairs"]) == (16, 4)
    assert rows[12]["eval_accuracy"] == 1.0
    assert rows[12]["eval_loss"] < 0.2 < rows[0]["eval_loss"]
    told = report(world)
    assert (told["pairs"], told["accuracy"]) == (4, 1.0)
    data = pairs_of(config, world)
    model = trained(world).double()
    with torch.no_grad():
        difference = [
            (model(torch.tensor([p.chosen])).logits - model(torch.tensor([p.rejected])).logits)
            for p in data.held_out
        ]
    assert told["difference_mean"] == pytest.approx(float(sum(difference)) / 4, rel=1e-4)
    assert sum(row["pairs"] for row in told["reliability"]) == 4
    assert sum(told["histogram"]["chosen"]) == sum(told["histogram"]["rejected"]) == 4


@pytest.mark.parametrize(
    ("row", "keys", "text"),
    [
        ({"prompt": "a", "chosen": "b"}, {}, "<s>ab"),
        ({"prompt": "a", "chosen": "b"}, {"apply_chat_template": True}, None),
        ({"q": "a", "chosen": "b"}, {"prompt_template": "Q: {q}\n"}, "<s>Q: a\nb"),
        ({"chosen": "a: b"}, {"full_texts": True}, "<s>a: b"),
        ({"prompt": [{"role": "user", "content": "a"}], "chosen": "b"}, {}, None),
        (
            {
                "prompt": [{"role": "user", "content": "a"}],
                "chosen": [{"role": "assistant", "content": "b"}],
            },
            {},
            None,
        ),
        (
            {
                "chosen": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ]
            },
            {"full_texts": True},
            None,
        ),
    ],
)
def test_what_the_model_reads(world, row, keys, text):
    """None: the same conversation, however it is given."""
    row = {**row, "rejected": row["chosen"]}
    write(world / "data.jsonl", [row, row])
    data = pairs_of(configured(world, data={**keys, "eval_rows": 1}), world)
    tokenizer = byte_tokenizer()
    chat = "<s>user\na</s>\n<s>assistant\nb</s>\n"
    assert tokenizer.decode(data.pairs[0].chosen) == (text or chat)
    assert data.pairs[0].chosen == data.held_out[0].rejected == data.demonstrations[0]


def test_demonstrations_of_another_column_or_file(world):
    rows = [{**row, "human": " human"} for row in ROWS]
    write(world / "data.jsonl", rows)
    write(world / "human.jsonl", [{"prompt": "Q:", "summary": " sum"}] * 3)
    column = configured(world, data={"demonstrations_column": "human"})
    texts = [byte_tokenizer().decode(ids) for ids in pairs_of(column, world).demonstrations]
    assert texts[:2] == ["<s>Say a: human", "<s>Say b: human"]
    path = {"demonstrations_path": str(world / "human.jsonl"), "demonstrations_column": "summary"}
    config = configured(world, data=path)
    reward_model.run(config)
    scores = RewardModel(str(world / "run/final"))(["Q:"], [" sum"])
    assert scores == pytest.approx([0.0], abs=1e-5)
    assert metrics(world)[0]["demonstrations"] == 3


def test_too_long_texts_lose_their_start(world):
    config = configured(world, max_length=10)
    data = pairs_of(config, world)
    assert all(len(pair) <= 10 for pair in data.pairs)
    assert byte_tokenizer().decode(data.pairs[0].chosen) == "<s>y a: yes "
    reward_model.run(config)
    assert metrics(world)[0]["truncated_fraction"] > 0.5


@pytest.mark.parametrize(
    ("pad", "vocabulary", "used", "wanted"),
    [
        ("<pad>", 260, {5}, ("<pad>", 2)),
        ("<pad>", 260, {2}, ("<|reward_pad|>", 259)),  # an embedding to spare
        (None, 259, {5}, ("<pad>", 2)),  # a special token that no text has
        ("</s>", 259, {5}, ("<pad>", 2)),
        ("</s>", 259, {2}, ("<|reward_pad|>", 259)),  # the model has to grow
    ],
)
def test_the_pad_token_is_never_the_end_of_a_text(pad, vocabulary, used, wanted):
    tokenizer = byte_tokenizer(pad=pad)
    choose_pad_token(tokenizer, vocabulary, used)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == wanted


def test_a_model_that_grows_for_its_pad_token(world):
    tiny_causal_lm("llama", BYTES_VOCAB - 1).save_pretrained(world / "lm")
    tokenizer = byte_tokenizer(pad="</s>")
    tokenizer.save_pretrained(world / "lm")
    write(world / "data.jsonl", [{**row, "chosen": row["chosen"] + "<pad>"} for row in ROWS])
    reward_model.run(configured(world))
    model = trained(world)
    assert model.config.vocab_size == BYTES_VOCAB == len(tokenizer) + 1
    assert model.config.pad_token_id == BYTES_VOCAB - 1


def test_a_reward_model_can_be_trained_further(world):
    start = tiny_sequence_classifier("llama", BYTES_VOCAB, seed=3)
    start.save_pretrained(world / "lm")
    reward_model.run(configured(world, optimizer={"learning_rate": 0.0}))
    torch.testing.assert_close(trained(world).score.weight, start.score.weight)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3"])
def test_other_families(world, family):
    tiny_causal_lm(family, BYTES_VOCAB).save_pretrained(world / "lm")
    reward_model.run(configured(world, model={"gradient_checkpointing": True}))
    scores = RewardModel(str(world / "run/final"))(["Say a:"] * 2, [" yes ", " no"])
    assert all(math.isfinite(score) for score in scores)


def test_lora_leaves_a_plain_model_and_the_adapter(world):
    from peft import PeftModel

    reward_model.run(configured(world, model={"lora": {"r": 2}, "precision": "bf16"}))
    merged, base = trained(world), tiny_sequence_classifier("llama", BYTES_VOCAB)
    base.model.load_state_dict(tiny_causal_lm("llama", BYTES_VOCAB).model.state_dict())
    base.config.pad_token_id = merged.config.pad_token_id
    adapted = PeftModel.from_pretrained(base, world / "run/final/adapter/reward")
    ids = torch.tensor([[0, 9, 8, 7]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-5, rtol=0)
    start = tiny_causal_lm("llama", BYTES_VOCAB).model.state_dict()
    moved = [n for n, w in merged.model.state_dict().items() if not torch.equal(w, start[n])]
    assert any("q_proj" in name for name in moved)
    assert not any("embed" in name or "norm" in name for name in moved)


def test_early_stopping(world):
    config = configured(
        world,
        steps=30,
        early_stopping=1,
        log={"eval_every": 1},
        optimizer={"learning_rate": 0.5, "eps": 1e-8},
    )
    reward_model.run(config)
    losses = [row["eval_loss"] for row in metrics(world)]
    assert len(losses) == losses.index(min(losses)) + 2 < 31
    model = trained(world).double()
    with torch.no_grad():
        found = plain_loss(model, pairs_of(config, world).held_out, 0.0).item()
    assert found == pytest.approx(min(losses), rel=1e-4)


def test_a_resumed_run_is_the_run_that_was_never_stopped(world, monkeypatch):
    changes = {"steps": 5, "checkpoint": {"every": 2}, "early_stopping": 9, "overwrite": False}
    reward_model.run(configured(world, **changes, output_dir=str(world / "straight")))
    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "pairwise_loss", fails_after(4 * 4 + 3, pairwise_loss))
        with pytest.raises(MemoryError):
            reward_model.run(configured(world, **changes))
    reward_model.run(configured(world, **changes, resume="auto"))
    assert [row.get("loss") for row in metrics(world)] == [
        row.get("loss") for row in metrics(world, "straight")
    ]
    straight = trained(world, "straight")
    assert trained(world).config.score_offset == straight.config.score_offset
    for name, value in straight.state_dict().items():
        assert torch.equal(trained(world).state_dict()[name], value), name


def fails_after(calls: int, function: Any) -> Any:
    left = iter(range(calls))

    def limited(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise MemoryError
        return function(*arguments)

    return limited


@pytest.mark.parametrize("profile", ["ddp", "zero3"])
def test_two_ranks_do_what_one_does(world, profile):
    """With ragged last passes."""
    changes = {"early_stopping": 9, "checkpoint": {"every": 3}, "log": {"eval_every": 1}}
    changes = changes if profile == "zero3" else {"model": {"lora": {"r": 2}}}
    config = configured(world, data={"eval_rows": 3}, steps=3, batch_size=10, **changes)
    reward_model.run(config)
    (world / "config.yaml").write_text(json.dumps(config_to_dict(config)))
    path = sharding_everything(world) if profile == "zero3" else PROFILES / f"{profile}.yaml"
    command = [*accelerate(path), "-m", "marlhf", "reward", "config.yaml", "output_dir=two"]
    done = run(command, folder=world)
    assert done.returncode == 0, first_error(done)
    if profile == "zero3":
        learner = (world / "two/checkpoints/step-3/model/learner.json").read_text()
        assert '"layout": "fragments", "ranks": 2' in learner
    for mine, theirs in zip(metrics(world), metrics(world, "two"), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"step_seconds", "pairs_per_second", "peak_memory_gb"}:
            assert theirs[name] == pytest.approx(mine[name], rel=1e-4, abs=1e-6), name
    other = trained(world, "two").state_dict()
    for name, value in trained(world).state_dict().items():
        torch.testing.assert_close(other[name], value, atol=1e-5, rtol=0, msg=name)
    offset = trained(world, "two").config.score_offset
    assert offset == pytest.approx(trained(world).config.score_offset, abs=1e-5)


def test_from_sft_over_a_reward_model_to_ppo(world):
    """The three commands of the pipeline, each on what the one before wrote."""
    demonstrations = {"completion_column": "chosen", "path": str(world / "data.jsonl")}
    log = {"progress": False, "tensorboard": False, "eval_every": 0}
    common = {"overwrite": True, "steps": 1, "log": log}
    values = {
        **common,
        "model": {"path": str(world / "lm")},
        "data": {**demonstrations, "eval_rows": 0},
        "output_dir": str(world / "sft"),
        "batch_size": 8,
    }
    sft.run(config_from_dict(SFTConfig, values))
    reward_model.run(
        configured(world, model={"path": str(world / "sft/final")}, output_dir=str(world / "run"))
    )
    rewards = {"models": str(world / "run/final")}
    values = {
        **common,
        "model": {"path": str(world / "sft/final")},
        "data": {"path": str(world / "data.jsonl"), "eval_rows": 0},
        "reward": rewards,
        "rollout": {"batch_size": 4, "max_new_tokens": 6},
        "output_dir": str(world / "ppo"),
    }
    trainer = ppo.PPOTrainer(config_from_dict(PPOConfig, values))
    critic = trainer.distributed.unwrap(trainer.critic.model)
    model = trained(world)
    assert critic.offset == pytest.approx(model.config.score_offset)
    torch.testing.assert_close(critic.head.weight, model.score.weight)
    trainer.train()
    assert (world / "ppo/final/model.safetensors").is_file()
    assert metrics(world, "ppo")[-1]["score_mean"] is not None


@pytest.mark.parametrize(
    ("rows", "changes", "fault"),
    [
        ([{"prompt": "a", "chosen": "b"}], {}, r"data\.rejected_column: no column is called"),
        ([{"prompt": "a", "chosen": "b", "rejected": " "}], {}, "row 0: the column 'rejected' is"),
        ([{"prompt": "a", "chosen": 1, "rejected": "b"}], {}, "row 0: the column 'chosen' is int"),
        ([{"chosen": "a", "rejected": "b"}], {}, r"data\.prompt_column: no column is called"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c", "m": -1}],
            {"data": {"margin_column": "m"}},
            "row 0: the margin is -1, must be a number of at least 0",
        ),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            {"data": {"margin_column": "m"}},
            r"data\.margin_column: .* no column 'm'",
        ),
        (
            [{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}],
            {},
            "row 0: the last message must be the assistant's",
        ),
        (
            [{"chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}],
            {"data": {"full_texts": True}},
            "no turn before the assistant's",
        ),
        (
            [{"prompt": "a" * 300, "chosen": "b", "rejected": "c"}],
            {"max_length": 500},
            r"max_length: .* the model has 256 positions",
        ),
        (
            ROWS,
            {"data": {"demonstrations_path": "nowhere.jsonl"}},
            r"data\.demonstrations_path: .* does not exist",
        ),
    ],
)
def test_what_cannot_work_is_refused(world, rows, changes, fault):
    write(world / "data.jsonl", rows * 2)
    changes = {**changes, "data": {"eval_rows": 1, **changes.get("data", {})}}
    with pytest.raises(UserError, match=fault):
        reward_model.run(configured(world, **changes))


def test_without_a_chat_template_none_can_be_applied(world):
    (world / "lm" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"model\.chat_template: must be given"):
        reward_model.run(configured(world, data={"apply_chat_template": True}))


def test_full_texts_have_no_prompts(world):
    with pytest.raises(UserError, match=r"data\.prompt_template: given .* data\.full_texts"):
        configured(world, data={"full_texts": True, "prompt_template": "{a}"})
