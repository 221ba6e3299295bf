"""Rollouts that a run keeps, and their credit under other settings."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import tiny_trainer
from support.tiny_models import byte_tokenizer

from marlhf.cli import main
from marlhf.commands.replay import main as replay
from marlhf.common.errors import UserError
from marlhf.config import PPOConfig
from marlhf.config.loading import load_config
from marlhf.credit.arms import arm_of
from marlhf.credit.options import names_kl, settings_of_arms
from marlhf.runs.rollouts import KeptRollout, kept_steps, read_rollout
from marlhf.views.html_page import page, write_page
from marlhf.views.replay import Replay, replay_page

LOG = {"rollouts_every": 2, "samples": 8}
RUNS: dict[str, dict[str, Any]] = {
    "gae": {"macro": {"last_token_alone": True}},
    "an adapted kl": {"kl": {"target": 0.01, "horizon": 8}, "ppo": {"minibatches": 2}},
    "rloo, kl in the loss": {
        "ppo": {"estimator": {"name": "rloo", "return_to_go": True}, "weights": "positive"},
        "kl": {"where": "loss"},
        "rollout": {"responses_per_prompt": 2},
        "segmenter": "random_ngram",
    },
    "monte_carlo": {"ppo": {"estimator": "monte_carlo"}, "segmenter": "sequence"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three updates, of which the second is kept."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    tiny_trainer(folder, log=LOG, steps=3).train()
    return folder


def own(folder: Path) -> tuple[KeptRollout, PPOConfig]:
    return read_rollout(folder, 2), load_config(PPOConfig, folder / "config.yaml")


@pytest.mark.parametrize("name", RUNS)
def test_replaying_a_runs_own_settings_gives_its_own_credit_to_the_last_digit(
    name: str, tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, log=LOG, **RUNS[name])
    trainer.train()
    kept, config = own(tmp_path)
    arm = arm_of("own", kept, config, byte_tokenizer(add_bos=True), own_kl=True)
    assert torch.equal(arm.batch.advantages_BT, kept.tensors["advantages"])
    assert (arm.batch.weights_BT is not None) == ("weights" in RUNS[name].get("ppo", {}))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    samples = [s for s in samples if s["step"] == 2 and not s["held_out"]]
    for row, sample in enumerate(samples):
        mask = arm.batch.mask_BM[row]
        assert arm.batch.lengths_BM[row][mask].tolist() == sample["macro_lengths"]
        found = arm.batch.advantages_BM[row][mask].tolist()
        assert found == pytest.approx(sample["macro_advantages"], abs=1e-6)


def test_kept_are_the_updates_that_were_asked_for(run: Path, tmp_path: Path) -> None:
    assert kept_steps(run) == [2]
    tiny_trainer(tmp_path, log=LOG | {"rollouts_every": 0}).train()
    assert kept_steps(tmp_path) == []
    with pytest.raises(SystemExit):
        main(["replay", str(tmp_path)])


def test_a_resumed_run_keeps_none_of_what_it_does_again(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"log": LOG | {"rollouts_every": 1}, "overwrite": False}
    sections["checkpoint"] = {"every": 1, "keep": 9}
    tiny_trainer(tmp_path, **sections).train()
    before = read_rollout(tmp_path, 2).tensors
    trainer = tiny_trainer(tmp_path, resume=str(tmp_path / "checkpoints" / "step-1"), **sections)
    trainer.run_dir.open(trainer.config, 2)
    assert kept_steps(tmp_path) == [1]
    trainer.train()
    after = read_rollout(tmp_path, 2).tensors
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_the_parts_of_ranks_are_one_rollout(run: Path, tmp_path: Path) -> None:
    kept, config = own(run)
    from safetensors.torch import save_file

    folder = tmp_path / "rollouts" / "step-2"
    folder.mkdir(parents=True)
    for rank, rows in enumerate((slice(0, 4), slice(4, 8))):
        part = {name: x[rows] for name, x in kept.tensors.items()}
        width = int(part["response_mask"].sum(1).max())
        part = {n: x if x.dim() == 1 else x[:, :width].contiguous() for n, x in part.items()}
        facts = dict(kept.facts)
        facts |= {name: facts[name][rows] for name in ("prompt_texts", "continues")}
        save_file(part, folder / f"rank-{rank}.safetensors", {"facts": json.dumps(facts)})
    joined = read_rollout(tmp_path, 2)
    assert joined.facts == kept.facts
    mask = kept.tensors["response_mask"]
    assert torch.equal(joined.tensors["response_mask"], mask)
    tokenizer = byte_tokenizer(add_bos=True)
    arms = [arm_of("", x, config, tokenizer, own_kl=True) for x in (joined, kept)]
    assert torch.equal(arms[0].batch.advantages_BT, arms[1].batch.advantages_BT)


def test_arms_in_the_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["segmenter=token", "segmenter=sequence ppo.lam=0.5", "kl.coef=0 macro.whiten=none"]
    main(["replay", str(run), "--responses", "2", *[w for arm in arms for w in ("--arm", arm)]])
    shown = capsys.readouterr().out
    assert all(arm.split()[0] in shown for arm in ["the run", *arms])
    assert shown.count("response ") == 2
    (first,) = [line for line in shown.splitlines() if line.strip().startswith("the run  ")]
    assert "100%" in first
    assert "1.00" in first


def test_the_table_fits_80_columns(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main(["replay", str(run), "--arm", "segmenter={name: ngram, n: 5} ppo.lam=1"])
    shown = capsys.readouterr().out
    heads = set(shown.partition("──")[0].split())
    wanted = "arm macro actions tokens each advantages same sign correlation weight"
    assert heads >= set(wanted.split())
    assert "…" not in shown


def test_a_page_with_what_differs_most_first(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    main(["replay", str(run), "--arm", "segmenter=sequence", "--html", str(target)])
    text = target.read_text()
    assert text.count('class="m credit') > 16
    kept, config = own(run)
    tokenizer = byte_tokenizer(add_bos=True)
    other = load_config(PPOConfig, run / "config.yaml", ["segmenter=sequence"])
    arms = [arm_of(n, kept, c, tokenizer, own_kl=True) for n, c in (("a", config), ("b", other))]
    replay = Replay.of(kept, arms, tokenizer, 2)
    found = [replay.difference[i] for i in replay.order]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0
    assert "<script>" not in replay_page(replay, 1).partition("<body>")[2].partition("</main>")[0]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--step", "3"], "--step: given 3, must be one of 2"),
        (
            ["--arm", "rollout.top_p=0.5"],
            "given 'rollout.top_p=0.5', but the responses are sampled",
        ),
        (["--arm", "segmentr=sentence"], "--arm: segmentr: unknown key; did you mean 'segmenter'?"),
        (
            ["--grid", "pppo.lam=[1]"],
            "--grid: pppo: unknown key; did you mean 'ppo'? Possible: keys",
        ),
        (["--arm", "ppo.lamm=0.5"], "marlhf: arm 'ppo.lamm=0.5': ppo.lamm: unknown key"),
        (["--html", "RUN/config.yaml"], "run/config.yaml' is a file that is no page; choose"),
        (["--arm", ""], "--arm: given nothing; must hold settings"),
        (["--arm", "ppo.estimator='"], "No closing quotation"),
        (["--arm", "ppo.estimator=monte_carlo"], "needs continuations, which the run did not have"),
    ],
)
def test_bad_arms_are_one_line(
    words: list[str], line: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("RUN", str(run)) for word in words]
    with pytest.raises(SystemExit) as stopped:
        main(["replay", str(run), *words])
    (shown,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert line in shown


def test_faults_of_the_run_name_it(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for file in (copy / "final").glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"^RUN: cannot load the tokenizer of '.*copy/final'"):
        replay([str(copy)])
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("steps: 3", "steps: 0"))
    with pytest.raises(UserError, match=r"^RUN: '.*copy/config.yaml': steps: given 0"):
        replay([str(copy)])


def test_a_page_replaces_a_page_alone(tmp_path: Path) -> None:
    for name in ("page.html", "new/page.html", "empty"):
        (tmp_path / "empty").touch()
        for content in (page("t", "<p>a"), page("t", "<p>b")):
            assert write_page(tmp_path / name, content, "--html").read_text() == content
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UserError, match=r"^--html: .*notes' is a file that is no page"):
        write_page(tmp_path / "notes", page("t", ""), "--html")
    assert (tmp_path / "notes").read_text() == "mine"


def test_mappings_of_an_arm_need_no_quotes_and_keep_theirs() -> None:
    mapping = """segmenter={name: regex, pattern: "a] 'b"}"""
    text = f"""ppo.lam=1 {mapping} 'macro.whiten=no ne'"""
    arms = settings_of_arms(argparse.Namespace(arm=[text], grid=None))
    assert arms[text] == ["ppo.lam=1", mapping, "macro.whiten=no ne"]
    assert names_kl(["kl={coef: 0}"])


def test_a_damaged_rollout_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "rollouts" / "step-2" / "rank-0.safetensors").write_bytes(b"{" * 50)
    with pytest.raises(SystemExit):
        main(["replay", str(copy)])
    assert "step-2' is damaged: " in capsys.readouterr().err
