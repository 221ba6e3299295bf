"""Sizes that would never be done, and templates that never end: a line instead of a run that
hangs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.bad_input import Refusals, build_world, cases

from marlhf.common import chat_templates
from marlhf.common.errors import UserError
from marlhf.common.signals import time_limit
from marlhf.rewards.calls import evaluate
from marlhf.rewards.learned import RewardModel

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

SIZES = """
rollout.batch_size=2147483647 -> rollout.batch_size: given 2147483647 & at most 1048576 responses
rollout.batch_size=1000000 -> given 1000000, must be at most 800, 100 times the 8 rows
rollout.responses_per_prompt=2147483647 -> responses_per_prompt: given 2147483647, must be at most
rollout.responses_per_prompt=65536 ;; rollout.batch_size=32 -> at most 1048576 responses per update
ppo.epochs=2147483647 -> ppo.epochs: given 2147483647, must be at most 1000
ptx={path: data.jsonl, text_column: prompt, max_length: 9, batch_size: 801} -> ptx.batch_size
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def refused(world: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> Refusals:
    monkeypatch.chdir(world)
    return Refusals(world, capfd, monkeypatch)


@pytest.mark.parametrize(("overrides", "fragments"), cases(SIZES))
def test_batches_that_would_never_be_done(overrides, fragments, refused):
    line = refused.of(*overrides)
    for fragment in fragments:
        assert fragment in line


@pytest.mark.parametrize("job", ["sft", "reward"])
def test_batches_of_the_other_jobs(job, refused):
    Path("rows.csv").write_text("prompt,completion,chosen,rejected\n" + "a,b,c,d\n" * 9)
    Path("job.yaml").write_text("model: {path: lm}\ndata: {path: rows.csv, eval_rows: 0}\n")
    line = refused(job, "job.yaml", "batch_size=1000", "output_dir=run")
    assert "batch_size: given 1000, must be at most 900, 100 times the 9 rows" in line


@pytest.mark.parametrize("layers", [100000, -1])
def test_more_layers_than_any_model_has(layers, refused):
    def deepen(folder: Path) -> None:
        file = folder / "config.json"
        text = file.read_text().replace('"num_hidden_layers": 2', f'"num_hidden_layers": {layers}')
        file.write_text(text)

    model = f"model.path={refused.copy('lm', deepen).name}"
    for line in (
        refused("estimate", "config.yaml", "--gpus=1", "--gpu-memory=1", model),
        refused.of(model),
    ):
        assert f"says {layers} layers, must be 1 to 500" in line


def test_a_template_that_never_ends(refused, monkeypatch):
    monkeypatch.setattr(chat_templates, "TEMPLATE_SECONDS", 0.2)
    start = time.monotonic()
    line = refused.of("data.apply_chat_template=true", f'model.chat_template="{ENDLESS}"')
    assert "the chat template refuses the prompt" in line
    assert "took longer than 0.2 seconds" in line
    assert time.monotonic() - start < 30


def test_a_template_that_writes_without_end(refused):
    """The tokenizer would take minutes and gigabytes for it."""
    line = refused.of(
        "data.apply_chat_template=true", "model.chat_template=\"{{ 'ab' * 9999999 }}\""
    )
    assert "the chat template refuses the prompt" in line
    assert "it writes 19999998 characters" in line


def test_a_reward_models_template_that_never_ends(world, monkeypatch):
    """One time limit, though a reward that raises is tried on parts of its batch as a rule."""
    monkeypatch.setattr(chat_templates, "TEMPLATE_SECONDS", 0.2)
    reward = RewardModel(str(world / "rm"))
    reward.tokenizer.chat_template = ENDLESS
    columns = {"messages": [[{"role": "user", "content": "Q"}]] * 64}
    start = time.monotonic()
    with pytest.raises(UserError, match=r"chat template refuses .* took longer than 0\.2 seconds"):
        evaluate("rm", reward, ["Q"] * 64, ["A"] * 64, columns)
    assert time.monotonic() - start < 30


def test_a_template_that_never_ends_in_reward_training(refused, monkeypatch):
    monkeypatch.setattr(chat_templates, "TEMPLATE_SECONDS", 0.2)
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 9)
    Path("pairs.yaml").write_text(
        f"model: {{path: lm, chat_template: '{ENDLESS}'}}\noutput_dir: run\n"
        "data: {path: pairs.jsonl, eval_rows: 0, apply_chat_template: true}\n"
    )
    line = refused("reward", "pairs.yaml", weights=True)
    assert "model.chat_template: " in line
    assert "took longer than 0.2 seconds" in line


def loop_for_ever() -> None:
    with time_limit(0.05):
        while True:
            pass


def test_a_limit_ends_with_what_it_limits():
    with time_limit(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(TimeoutError):
        loop_for_ever()
