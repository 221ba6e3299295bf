"""Texts mixed into the policy's steps: which, how they are cut, and what they do."""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import PROMPTS, tiny_trainer
from support.tiny_models import byte_tokenizer

from marlhf.common.errors import UserError
from marlhf.config import PTXSettings
from marlhf.runs.metrics import Metrics
from marlhf.training.objectives import text_objective
from marlhf.training.ptx import TextBatch, TextStream, text_ids

BOS, EOS = 0, 1


def written(folder: Path, rows: Sequence[Any], name: str = "texts.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(folder: Path, count: int = 6) -> str:
    return written(folder, [{"text": "x" * (i + 1), "prompt": "p"} for i in range(count)])


def stream(path: str, rank: int = 0, world: int = 1, positions: int = 256, **keys: Any) -> Any:
    ranks: Any = types.SimpleNamespace(rank=rank, world_size=world, device=torch.device("cpu"))
    settings = PTXSettings(path=path, **{"batch_size": 4, "max_length": 64, **keys})
    return TextStream(settings, 0, byte_tokenizer(add_bos=True), ranks, positions)


def lengths(rows: TextBatch) -> list[int]:
    return rows.attention_mask.sum(1).tolist()


def test_every_pass_has_every_text_once_and_a_step_stands_alone(tmp_path: Path) -> None:
    path = texts(tmp_path)
    whole = stream(path)
    seen = [n for step in range(3) for n in lengths(whole.batch(step))]
    every = [3, 4, 5, 6, 7, 8]  # with BOS and EOS
    assert sorted(seen[:6]) == sorted(seen[6:]) == every
    assert lengths(stream(path).batch(2)) == lengths(whole.batch(2)) == seen[8:]


def test_ranks_share_a_batch(tmp_path: Path) -> None:
    path = texts(tmp_path)
    parts = [lengths(stream(path, rank, 2).batch(1)) for rank in (0, 1)]
    assert [len(part) for part in parts] == [2, 2]
    assert sorted(parts[0] + parts[1]) == sorted(lengths(stream(path).batch(1)))


def test_rows_lose_padding_and_nothing_else(tmp_path: Path) -> None:
    batch = stream(texts(tmp_path)).batch(0)
    short = int(torch.tensor(lengths(batch)).argmin())
    row = batch.select(torch.tensor([short]))
    length = min(lengths(batch))
    assert row.input_ids.tolist() == [batch.input_ids[short, :length].tolist()]
    assert row.attention_mask.all()
    assert row.loss_mask.shape == (1, length - 1)
    assert int(row.counts()) == length - 1
    assert int(batch.counts()) == sum(lengths(batch)) - 4


@pytest.mark.parametrize(
    ("prompt", "text", "limit", "wanted", "first"),
    [
        (None, "abc", 9, [BOS, "a", "b", "c", EOS], 1),
        (None, "abc", 3, [BOS, "a", "b"], 1),
        ("pq", "abc", 9, [BOS, "p", "q", "a", "b", "c", EOS], 3),
        ("pqr", "abc", 6, [BOS, "r", "a", "b", "c", EOS], 2),
        ("pq", "abc", 3, ["q", "a", "b"], 1),
    ],
)
def test_texts_are_cut_at_the_end_and_prompts_on_the_left(
    prompt: str | None, text: str, limit: int, wanted: list[Any], first: int
) -> None:
    tokenizer = byte_tokenizer(add_bos=True)
    letters = tokenizer.convert_tokens_to_ids
    ids = [letters(x) if isinstance(x, str) else x for x in wanted]
    assert text_ids(prompt, text, tokenizer, limit) == (ids, first)


def test_the_texts_are_learned(tmp_path: Path) -> None:
    path = written(tmp_path, [{"text": "learn this"}])
    ptx = {"path": path, "batch_size": 1, "coef": 10.0, "max_length": 64}
    trainer = tiny_trainer(tmp_path / "run", steps=20, ptx=ptx)
    losses = [trainer.step(PROMPTS)["ptx_loss"] for _ in range(15)]
    assert losses[0] > 4
    assert losses[-1] < losses[0] / 4


def test_the_loss_is_null_while_the_policy_waits_and_absent_without_texts(tmp_path: Path) -> None:
    ptx = {"path": texts(tmp_path), "max_length": 64}
    trainer = tiny_trainer(tmp_path / "a", ptx=ptx, critic={"warmup_steps": 1})
    assert trainer.step(PROMPTS)["ptx_loss"] is None
    assert trainer.step(PROMPTS)["ptx_loss"] > 0
    assert "ptx_loss" not in tiny_trainer(tmp_path / "b").step(PROMPTS)


@pytest.mark.parametrize(
    ("rows", "keys", "fault"),
    [
        ([{"text": "a"}, {"text": " "}], {}, r"ptx\.path: row 1: 'text' is empty, must be text"),
        ([{"text": "a"}, {"text": 3}], {}, r"ptx\.path: row 1: 'text' is int, must be text"),
        ([{"body": "a"}], {}, r"ptx\.text_column: no column is called 'text'; the data has body"),
        ([{"text": "a"}], {"prompt_column": "q"}, r"ptx\.prompt_column: no column is called 'q'"),
        ([{"text": "a"}], {"max_length": 300}, r"ptx\.max_length: given 300, .* 256 positions"),
        ([{"text": "a"}], {"world": 3}, r"ptx\.batch_size: given 4, .* multiple of the 3 ranks"),
        ([{"text": "a"}], {"split": "test"}, r"ptx\.split: given 'test'"),
    ],
)
def test_what_cannot_be_modelled_is_refused(
    rows: list[Any], keys: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=fault):
        stream(written(tmp_path, rows), **keys)


def test_a_limit_reads_the_first_rows(tmp_path: Path) -> None:
    assert set(lengths(stream(texts(tmp_path), limit=2).batch(0))) == {3, 4}


def test_a_pass_over_texts_gives_every_weight_a_gradient(tmp_path: Path) -> None:
    """The critic's head too, or under ZeRO its gradients of two steps are added up."""
    trainer = tiny_trainer(
        tmp_path / "run",
        ptx={"path": texts(tmp_path), "batch_size": 4, "max_length": 32},
        critic={"backbone": "policy"},
    )
    assert trainer.texts is not None
    policy, batch = trainer.policy.model, trainer.texts.batch(0)
    text_objective(policy, trainer.config, Metrics(), batch, float(batch.counts())).backward()
    assert all(weight.grad is not None for weight in trainer.policy.parameters)
    assert not policy.head.weight.grad.any()
