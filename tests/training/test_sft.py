"""`marlhf sft` against plain loops in float64, and against itself: packing, ranks, seeds."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launches import PROFILES, accelerate, first_error, run, sharding_everything
from support.tiny_models import BYTES_VOCAB, CHATML, byte_tokenizer, tiny_causal_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from marlhf.algorithm.losses import sft_loss
from marlhf.common.errors import ReportedError, UserError
from marlhf.config import SFTConfig
from marlhf.config.loading import config_from_dict, config_to_dict
from marlhf.data.demonstrations import SFTExample, SFTExamples, load_examples
from marlhf.data.packing import pack
from marlhf.distributed import Distributed
from marlhf.models.gate import check_packing
from marlhf.models.policy import Policy
from marlhf.training import sft
from marlhf.training.supervised import check_batch_size, shares

ROWS = [
    {"prompt": "say " + letter * (1 + i % 5), "completion": " " + letter * (1 + 2 * i % 7)}
    for i, letter in enumerate("abcdefghijklmnop")
]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with a model `lm` and rows `data.jsonl`."""
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(tmp_path / "lm")
    tokenizer = byte_tokenizer(add_bos=True, chat_template=CHATML)
    tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def configured(world: Path, **changes: Any) -> SFTConfig:
    """Two steps of 8 rows in micro-batches of 2; sections may be given in part. Adam's epsilon is
    large, so that rounding in a gradient near 0 is not blown up to a whole step."""
    values: dict[str, Any] = {
        "model": {"path": str(world / "lm")},
        "data": {"path": str(world / "data.jsonl"), "eval_rows": 0},
        "output_dir": str(world / "run"),
        "overwrite": True,
        "steps": 2,
        "batch_size": 8,
        "max_length": 40,
        "optimizer": {"learning_rate": 1e-2, "micro_batch_size": 2, "eps": 0.1},
        "log": {"progress": False, "tensorboard": False, "eval_every": 0},
        "checkpoint": {"every": 0},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return config_from_dict(SFTConfig, values)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def metrics(world: Path, run: str = "run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / run / "metrics.jsonl").read_text().splitlines()]


def plain_loss(model: Any, examples: list[SFTExample]) -> torch.Tensor:
    """Mean over all trained tokens of -log p, one example and one token at a time, in float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        logits = model(torch.tensor([example.ids])).logits[0]
        for i in range(1, len(example)):
            if example.trained[i]:
                row = logits[i - 1]
                total = total - row[example.ids[i]] + (row - row.max()).exp().sum().log()
                total = total + row.max()
                count += 1
    return total / count


def test_two_steps_are_those_of_a_plain_loop(world):
    """Order of rows left out: 16 rows, all in the one step of each of two passes."""
    settings = {"betas": [0.9, 0.95], "weight_decay": 0.01, "max_grad_norm": 0.5}
    settings |= {"warmup_steps": 0, "micro_batch_size": 4}
    config = configured(world, batch_size=16, steps=2, optimizer=settings)
    sft.run(config)

    examples, _ = load_examples(config, AutoTokenizer.from_pretrained(world / "lm"))
    model = AutoModelForCausalLM.from_pretrained(world / "lm").double()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=0.1, weight_decay=0.01
    )
    for step in range(2):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 2)
        loss = plain_loss(model, examples.rows)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        row = metrics(world)[step + 1]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["learning_rate"] == pytest.approx(1e-2 * (1 - step / 2))
        assert row["trained_tokens"] == sum(sum(e.trained) for e in examples.rows)
        assert row["epoch"] == step + 1
    trained = weights(world / "run/final")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name].double(), value, atol=1e-5, rtol=0, msg=name)
    start = weights(world / "lm")
    assert max((trained[n] - start[n]).abs().max() for n in start) > 1e-3


def batch_gradients(
    model: Any, rows: list[sft.PackedRow], count: float
) -> tuple[float, dict[str, torch.Tensor]]:
    batch = sft.collate(rows)
    labels = batch.pop("labels")
    model.zero_grad()
    loss = sft.loss(Policy(model)(**batch), labels, torch.tensor(count))
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


def example(ids: list[int], prompt: int) -> SFTExample:
    return SFTExample(ids, [i >= prompt for i in range(len(ids))], prompt)


EXAMPLES = [
    example([0, 5, 9, 30, 7, 8], 3),
    example([0, 12, 60, 1], 2),
    example([0, *range(20, 37)], 9),
    example([0, 44], 1),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "gemma2", "qwen2", "qwen3"])
def test_packed_examples_have_the_loss_and_gradient_of_separate_ones(family):
    """gemma2's window of 4 tokens also has to stay inside an example; gpt2 has no more positions
    than the longest example, and padding after a shorter one must not ask for more."""
    changes = {"gemma2": {"sliding_window": 4}, "gpt2": {"n_positions": 18}}.get(family, {})
    model = tiny_causal_lm(family, **changes)
    count = float(sum(sum(e.trained) for e in EXAMPLES))
    sizes = torch.tensor([len(e) for e in EXAMPLES]).numpy()
    first, second = sft.PackedRows(SFTExamples(EXAMPLES, sizes, 0, 0), pack(sizes, 24))
    packed, packed_gradients = batch_gradients(model, [first, second], count)
    apart, gradients = batch_gradients(model, [sft.PackedRow([e]) for e in EXAMPLES], count)
    oracle = tiny_causal_lm(family, **changes).double()
    wanted = plain_loss(oracle, EXAMPLES)
    wanted.backward()
    assert packed == pytest.approx(apart, abs=1e-5)
    assert packed == pytest.approx(wanted.item(), abs=1e-5)
    for name, parameter in oracle.named_parameters():
        for found in (packed_gradients[name], gradients[name]):
            torch.testing.assert_close(found.double(), parameter.grad, atol=1e-5, rtol=1e-4)
    check_packing(Policy(model))


def test_contamination_would_be_noticed():
    """The same rows with positions that run on, or from the wrong place, have another loss."""
    model = tiny_causal_lm("llama")
    batch = sft.collate([sft.PackedRow(EXAMPLES[:2])])
    labels = batch.pop("labels")
    right = sft.loss(Policy(model)(**batch), labels, torch.tensor(1.0))
    batch["position_ids"] = torch.arange(10)[None]
    assert abs(sft.loss(Policy(model)(**batch), labels, torch.tensor(1.0)) - right) > 1e-2


def test_a_family_that_mixes_examples_cannot_pack(monkeypatch):
    model = tiny_causal_lm("llama")
    forward = model.model.forward

    def without_positions(position_ids, **arguments):
        return forward(**arguments)

    monkeypatch.setattr(model.model, "forward", without_positions)
    with pytest.raises(UserError, match="packing: given true, but LlamaForCausalLM"):
        check_packing(Policy(model))


def test_the_loss_is_that_of_transformers_labels():
    model = tiny_causal_lm("qwen2")
    rows = [sft.PackedRow([e]) for e in EXAMPLES]
    batch = sft.collate(rows)
    labels = torch.nn.functional.pad(batch["labels"], (1, 0), value=-100)
    mask = torch.tensor([[i < len(row) for i in range(18)] for row in rows])
    wanted = model(batch["input_ids"], attention_mask=mask.long(), labels=labels).loss
    count = batch["response_mask"].sum()
    del batch["labels"]
    found = sft.loss(Policy(model)(**batch), labels[:, 1:], count)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-5)
    # of one row after another, the mean of means is another number
    means = [batch_gradients(model, [row], float(sum(row.examples[0].trained)))[0] for row in rows]
    assert abs(sum(means) / 4 - found.item()) > 1e-3


def test_sft_loss_ignores_what_is_masked():
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-4.0, math.inf, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss = sft_loss(logprobs, mask)
    loss.backward()
    assert loss.item() == pytest.approx(7 / 3)
    assert sft_loss(logprobs, mask, 14.0).item() == 0.5
    torch.testing.assert_close(logprobs.grad, -mask.float() / 3)


def test_held_out_loss_is_the_mean_over_tokens(world):
    config = configured(world, data={"eval_rows": 5}, steps=5, log={"eval_every": 2}, packing=True)
    sft.run(config)
    _, held_out = load_examples(config, AutoTokenizer.from_pretrained(world / "lm"))
    model = AutoModelForCausalLM.from_pretrained(world / "lm").double()
    rows = metrics(world)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert ["eval_loss" in row for row in rows] == [True, False, True, False, True, True]
    with torch.no_grad():
        before = plain_loss(model, held_out.rows).item()
        final = AutoModelForCausalLM.from_pretrained(world / "run/final").double()
        after = plain_loss(final, held_out.rows).item()
    assert rows[0]["eval_loss"] == pytest.approx(before, rel=1e-5)
    assert rows[5]["eval_loss"] == pytest.approx(after, rel=1e-5)
    assert rows[5]["eval_perplexity"] == pytest.approx(math.exp(after), rel=1e-5)
    assert after < before
    assert (rows[0]["train_examples"], rows[0]["eval_examples"]) == (11, 5)
    assert (world / "run/config.yaml").is_file()


def test_early_stopping_brings_back_the_best_model(world):
    """The rate is such that training diverges; the best model is an early one."""
    config = configured(
        world,
        data={"eval_rows": 4},
        steps=40,
        early_stopping=2,
        log={"eval_every": 1},
        optimizer={"learning_rate": 0.3, "eps": 1e-8},
    )
    sft.run(config)
    losses = [row["eval_loss"] for row in metrics(world)]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 41
    _, held_out = load_examples(config, AutoTokenizer.from_pretrained(world / "lm"))
    final = AutoModelForCausalLM.from_pretrained(world / "run/final").double()
    with torch.no_grad():
        assert plain_loss(final, held_out.rows).item() == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("key", ["eval_every", "eval_rows"])
def test_early_stopping_needs_evaluations(world, key):
    section = {"eval_every": "log", "eval_rows": "data"}[key]
    other = {"log": {"eval_every": 1}, "data": {"eval_rows": 3}, section: {key: 0}}
    with pytest.raises(UserError, match=rf"{section}\.{key}: given 0.*early_stopping=2"):
        configured(world, early_stopping=2, **other)


def test_lora_leaves_a_plain_model_and_the_adapter(world):
    from peft import PeftModel

    sft.run(configured(world, model={"lora": {"r": 2}, "gradient_checkpointing": True}))
    merged = AutoModelForCausalLM.from_pretrained(world / "run/final")
    base = AutoModelForCausalLM.from_pretrained(world / "lm")
    ids = torch.tensor([EXAMPLES[0].ids])
    with torch.no_grad():
        before, after = base(ids).logits, merged(ids).logits
        adapter = world / "run/final/adapter/policy"
        adapted = PeftModel.from_pretrained(base, adapter)(ids).logits
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(adapted, after, atol=1e-5, rtol=0)


def test_the_same_seed_gives_the_same_weights(world):
    found = []
    for seed, precision in ((0, "fp32"), (0, "fp32"), (1, "fp32"), (0, "bf16")):
        sft.run(configured(world, seed=seed, model={"precision": precision}))
        found.append(weights(world / "run/final"))
    first, again, other, rounded = found
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.allclose(first[name], other[name], atol=1e-4)
    assert rounded[name].dtype == torch.float32
    assert not torch.equal(first[name], rounded[name])
    torch.testing.assert_close(first[name], rounded[name], atol=3e-3, rtol=0)


def test_gradient_checkpointing_changes_nothing(world):
    found = []
    for checkpointing in (False, True):
        sft.run(configured(world, model={"gradient_checkpointing": checkpointing}))
        found.append(weights(world / "run/final"))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=0, msg=name)


def test_epochs_and_the_order_of_rows(world):
    sft.run(configured(world, steps=None, epochs=1.5, batch_size=4, data={"shuffle": False}))
    rows = metrics(world)
    assert [row["step"] for row in rows] == list(range(7))
    lengths = [1 + 2 * i % 7 + 2 for i in range(16)]  # space, letters, EOS
    wanted = [sum(lengths[i % 16] for i in range(4 * s, 4 * s + 4)) for s in range(6)]
    assert [row["trained_tokens"] for row in rows[1:]] == wanted


def test_a_run_that_diverges_says_so(world):
    optimizer = {"learning_rate": 1e30, "eps": 1e-8, "max_skipped_steps": 3}
    with pytest.raises(ReportedError, match=r"training has diverged.*in 3 optimiser steps"):
        sft.run(configured(world, optimizer=optimizer, steps=9))
    skipped = [(row["skipped_steps"], row["grad_norm"]) for row in metrics(world)[1:]]
    assert [count for count, _ in skipped] == [0, 1, 1]
    assert [norm is None for _, norm in skipped] == [False, True, True]
    (batch,) = torch.load(world / "run/diverged-step-4-rank-0.pt", weights_only=True)
    assert batch["input_ids"].shape == batch["position_ids"].shape


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"max_length": 4096, "data": {"path": "long.jsonl"}, "batch_size": 1},
            r"max_length: .* 256 positions",
        ),
        ({"model": {"path": "nowhere/x/y"}}, r"model\.path: given 'nowhere/x/y'"),
        ({"data": {"path": "nowhere.jsonl"}}, r"data\.path: .*does not exist"),
        ({"data": {"eval_rows": 16}}, r"data\.eval_rows: given 16, must be less than the 16"),
    ],
)
def test_what_cannot_work_is_refused(world, changes, fault, monkeypatch):
    monkeypatch.chdir(world)
    (world / "long.jsonl").write_text(json.dumps({"prompt": "a" * 300, "completion": "b"}) + "\n")
    with pytest.raises(UserError, match=fault):
        sft.run(configured(world, **changes))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"data": {"text_column": "text", "prompt_template": "{a}"}},
            r"data\.prompt_template: given '\{a\}' with data\.text_column",
        ),
        (
            {"data": {"completion_template": "{a}", "completion_column": "b"}},
            r"data\.completion_column: given 'b' with data\.completion_template",
        ),
        ({"optimizer": {"critic_learning_rate": 1e-5}}, "unknown key"),
        ({"log": {"samples": 3}}, "unknown key"),
    ],
)
def test_keys_without_effect_are_refused(world, changes, fault):
    with pytest.raises(UserError, match=fault):
        configured(world, **changes)


SPREAD: dict[str, dict[str, Any]] = {
    "zero1": {"packing": True, "batch_size": 2, "model": {"gradient_checkpointing": True}},
    "zero3": {"model": {"lora": {"r": 2}}},
}


@pytest.mark.parametrize("profile", SPREAD)
def test_two_ranks_stopped_and_resumed_do_what_one_does(world, profile):
    """With an uneven number of held-out rows; the best model comes back at the end."""
    changes = {
        "data": {"eval_rows": 3},
        "steps": 4,
        "log": {"eval_every": 1},
        "early_stopping": 9,
        "optimizer": {"schedule": "constant", "learning_rate": 0.1},
        "checkpoint": {"every": 1},
        "overwrite": False,
        **SPREAD[profile],
    }
    config = configured(world, **changes)
    sft.run(config)
    (world / "config.yaml").write_text(json.dumps(config_to_dict(config)))
    path = sharding_everything(world) if profile == "zero3" else PROFILES / f"{profile}.yaml"
    command = [*accelerate(path), "-m", "marlhf", "sft", "config.yaml", "output_dir=two"]
    for steps in (2, 4):
        done = run([*command, f"steps={steps}", "resume=auto"], folder=world)
        assert done.returncode == 0, first_error(done)
    assert "resuming from two/checkpoints/step-2 " in done.stderr
    layout = json.loads((world / "two/checkpoints/step-4/model/learner.json").read_text())["layout"]
    assert layout == ("fragments" if profile == "zero1" else "replicated")  # adapters are
    one, two = metrics(world), metrics(world, "two")
    assert len(one) == 5
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for name in {"loss", "grad_norm", "trained_tokens", "eval_loss"} & mine.keys():
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5), name
    for name, value in weights(world / "run/final").items():
        other = weights(world / "two/final")[name]
        torch.testing.assert_close(other, value, atol=1e-5, rtol=0, msg=name)


RESUMES: dict[str, dict[str, Any]] = {
    "full": {},
    "adam, clipped": {"optimizer": {"eps": 1e-8, "max_grad_norm": 0.5, "schedule": "cosine"}},
    "lora, packed": {"model": {"lora": {"r": 2}}, "packing": True, "batch_size": 2},
    "early stopping": {"early_stopping": 9, "optimizer": {"learning_rate": 0.1, "eps": 1e-8}},
}


@pytest.mark.parametrize("case", RESUMES)
@pytest.mark.parametrize("how", ["killed", "sigterm"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(world, case, how, monkeypatch):
    """Killed in step 6 it goes on from the checkpoint of step 4; a signal writes one of step 5."""
    changes = {
        "data": {"eval_rows": 3},
        "log": {"eval_every": 3},
        "checkpoint": {"every": 2},
        "steps": 7,
        "overwrite": False,
        "output_dir": str(world / "straight"),
        **RESUMES[case],
    }
    sft.run(configured(world, **changes))
    changes["output_dir"] = str(world / "run")
    calls, loss = 0, sft.loss

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        micro_batches = 1 if "packing" in changes else 4
        if how == "killed" and calls > 5 * micro_batches:
            raise MemoryError
        if how == "sigterm" and calls == 5 * micro_batches:
            signal.raise_signal(signal.SIGTERM)
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "loss", interrupted)
        with pytest.raises(MemoryError if how == "killed" else SystemExit):
            sft.run(configured(world, **changes))
    last = {"killed": "step-4", "sigterm": "step-5"}[how]
    assert (world / "run/checkpoints" / last / "manifest.json").is_file()
    assert not (world / "run/final").exists()
    sft.run(configured(world, **changes, resume="auto"))

    times = ("_seconds", "_per_second", "peak_memory_gb")
    straight, run = (
        [{k: v for k, v in row.items() if not k.endswith(times)} for row in metrics(world, name)]
        for name in ("straight", "run")
    )
    assert run == straight
    for name, value in weights(world / "straight/final").items():
        assert torch.equal(weights(world / "run/final")[name], value), name
    assert [p.name for p in sorted((world / "run/checkpoints").iterdir())][-1] == "step-7"


def test_a_resume_with_another_configuration_is_refused(world):
    changes = {"checkpoint": {"every": 1}, "overwrite": False}
    sft.run(configured(world, **changes))
    with pytest.raises(UserError, match=r"already holds a run.*resume=auto"):
        sft.run(configured(world, **changes))
    with pytest.raises(UserError, match=r"resume: the configuration differs.* in max_length"):
        sft.run(configured(world, **changes, resume="auto", max_length=41))
    with pytest.raises(UserError, match="steps: given 1, but the checkpoint"):
        sft.run(configured(world, **changes, resume="auto", steps=1))
    sft.run(configured(world, **changes, resume="auto", steps=3))
    assert [row["step"] for row in metrics(world)] == [0, 1, 2, 3]


class Rank(Distributed):
    """One of two."""

    def __init__(self, number: int) -> None:
        self.number = number

    rank = property(lambda self: self.number)
    world_size = 2


def test_the_ranks_share_a_batch_evenly(world):
    check_batch_size(configured(world, batch_size=6), Rank(0))
    with pytest.raises(UserError, match="batch_size: given 7, must be a multiple of the 2 ranks"):
        check_batch_size(configured(world, batch_size=7), Rank(0))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9])
def test_every_rank_gets_as_many_passes_and_every_row_counts_once(rows):
    given = ["x" * (i + 1) for i in range(rows)]
    parts = [list(shares(given, 2, Rank(rank))) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1])
    counted = [row for part in parts for _, some, count in part for row in some[:count]]
    assert sorted(counted) == sorted(given)
    assert all(some for part in parts for _, some, _ in part)
