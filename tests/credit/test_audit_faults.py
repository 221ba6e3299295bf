"""What `marlhf audit` refuses, in one line each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.audits import audit, build_model, train

from marlhf.cli import main
from marlhf.common.errors import UserError
from marlhf.credit.trained_run import chosen_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(build_model(tmp_path_factory.mktemp("audit")), log={"rollouts_every": 1})


@pytest.fixture(scope="module")
def audited(run: Path) -> dict[str, Any]:
    return audit(run, "--prompts", "2", "--responses", "2")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--continuations", "3"], "--continuations: given 3, must be an even number"),
        (["--arm", "segmentr=word"], "--arm: segmentr: unknown key; did you mean 'segmenter'?"),
        (["--arm", "rollout.top_p=0.5"], "given 'rollout.top_p=0.5', but the responses are"),
        (["--arm", "ppo.estimator=rloo"], "for ppo.estimator=rloo; raise --responses"),
        (["--grid", "ppo.lam=1"], "--grid: given 'ppo.lam=1', must look like ppo.lam=[0.95, 1]"),
        (["--arm", "ppo.estimator=monte_carlo kl.coef=0"], "continuations have the run's"),
        (["--checkpoint", "step-9"], "--checkpoint: given 'step-9'; must be one of step-1"),
        (["--checkpoint", "other/step-1"], "given 'other/step-1'; must be one of step-1"),
        (["--arm", "ppo={estimator: monte_carlo, gamma: 0.5}"], "continuations have the run's"),
        (["--arm", "kl={coef: 0} ppo.estimator=monte_carlo"], "continuations have the run's"),
        (["--data", "missing.jsonl"], "marlhf: --data: given 'missing.jsonl', which does not"),
        (["--output", "RUN"], "run' holds a training run; choose another"),
        (["--arm", "ppo.lam=7"], "marlhf: arm 'ppo.lam=7': ppo.lam: given 7"),
        (["--grid", "ppo.lam=[1, 7]"], "marlhf: arm 'ppo.lam=7': ppo.lam: given 7"),
        (["--responses", "1", "--arm", "ppo.estimator=rloo"], "given 1, must be at least 2"),
        (["--critic", "./missing", "--output", "OUT"], "marlhf: --critic: "),
        (["--prompts", "5"], "holds an audit of another checkpoint, critic or prompts"),
    ],
)  # fmt: skip
def test_what_cannot_be_audited_is_one_line(
    words: list[str],
    line: str,
    audited: dict[str, Any],
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = {"RUN": run, "OUT": run / "audit-of-faults"}
    words = [str(folders.get(word, word)) for word in words]
    with pytest.raises(SystemExit) as stopped:
        main(["audit", str(run), *words])
    (shown,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("marlhf")]
    assert stopped.value.code == 2
    assert line in shown


def test_a_head_on_the_policy_cannot_be_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("backbone: own", "backbone: policy"))
    with pytest.raises(SystemExit):
        main(["audit", str(copy), "--critic", "model"])
    assert "--critic: the run has no separate critic that" in capsys.readouterr().err


def test_continuations_are_counted_before_anything_is_loaded() -> None:
    code = (
        "import sys; from marlhf.commands.audit import main\n"
        "try: main(['no_such_run', '--continuations', '3'])\n"
        "except ValueError as error: print(error, 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "--continuations: given 3, must be an even number" in shown
    assert shown.endswith("False\n")


REFUSES = """class Refuses:
    requires = frozenset({"groups"})

    def __call__(self, inputs):
        raise IndexError("oh no")
"""


def test_a_plug_in_of_an_arm_fails_before_continuations_are_sampled(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And is named with the arm, since two arms may differ in its arguments alone."""
    (tmp_path / "refusing.py").write_text(REFUSES)
    monkeypatch.syspath_prepend(tmp_path)
    bad = "ppo.estimator=refusing.Refuses segmenter=token"
    words = ["--prompts", "2", "--responses", "2", "--output", str(tmp_path / "audit")]
    with pytest.raises(SystemExit):
        main(["audit", str(run), *words, "--arm", "ppo.estimator=monte_carlo", "--arm", bad])
    err = capsys.readouterr().err
    assert f"marlhf: arm '{bad}': estimator Refuses: raised IndexError: oh no" in err
    assert "continuations" not in err
    assert not (tmp_path / "audit" / "returns.jsonl").exists()
    audit(run, *words)
    err = capsys.readouterr().err
    assert "continuations" in err
    with pytest.raises(SystemExit):
        main(["replay", str(run), "--arm", "segmenter={name: ngram, n: 3} ppo.estimator=nolab.X"])
    assert "marlhf: arm 'segmenter={name: ngram, n: 3} ppo.es" in capsys.readouterr().err


def test_a_folder_without_a_run_or_a_whole_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^RUN: given .*, which holds no config\.yaml"):
        chosen_checkpoint(tmp_path, None)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="has no checkpoint"):
        chosen_checkpoint(tmp_path, None)
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^audit: all checkpoints in .* are damaged") as raised:
        chosen_checkpoint(tmp_path, None)
    assert "delete" not in str(raised.value)
    with pytest.raises(UserError, match=r"^--checkpoint: checkpoint .* is damaged"):
        chosen_checkpoint(tmp_path, str(tmp_path / "checkpoints" / "step-1"))
