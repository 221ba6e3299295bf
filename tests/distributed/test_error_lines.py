"""What the ranks of a launch print where it fails: one line, once, that names the rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_ranks import two_ranks
from support.launches import ppo_folder

from marlhf.cli import main
from marlhf.training.ppo import PPOTrainer

REWARD = """
import os
rank = os.environ["RANK"]
def score(prompts, completions):
    {}
    return [0.0] * len(prompts)
"""


def run_ppo(folder: Path, reward: str = "", **keys: Any) -> Callable[[int], str]:
    """What a rank does: `marlhf ppo` in `folder`; its exit status."""
    ppo_folder(folder, REWARD.format(reward), **keys)

    def work(rank: int) -> str:
        torch.set_num_threads(1)
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / "launch" / str(rank) / "error.json")
        os.chdir(folder)
        sys.path.insert(0, "")
        try:
            main(["ppo", "my_run.yaml"])
        except SystemExit as error:
            return str(error.code)
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
            return "1"
        return "0"

    (folder / "launch").mkdir()
    return work


ON_ONE = 'if rank == "1": {}'
# code of the reward, exit statuses, the line
REWARDS = {
    "raises on one": (
        ON_ONE.format('raise RuntimeError("no more")'),
        ["2", "2"],
        "marlhf: rank 1: reward score: row 0 (prompt 'hello'): raised RuntimeError: no more",
    ),
    "raises on both": (
        'raise RuntimeError("no more")',
        ["2", "2"],
        "marlhf: reward score: row 0 (prompt 'hello'): raised RuntimeError: no more",
    ),
    "leaves with status 0": (
        ON_ONE.format("os._exit(0)"),
        ["2", "2"],
        "marlhf: rank 1: reward score: row 0 (prompt 'hello'): raised SystemExit: os._exit(0)",
    ),
    "is killed": (
        ON_ONE.format("os.kill(os.getpid(), 9)"),
        ["2", "none"],
        "marlhf: rank 1 ended before the run did",
    ),
    "is interrupted": (
        ON_ONE.format("raise KeyboardInterrupt"),
        ["2", "130"],
        "marlhf: rank 1: interrupted in score",
    ),
}


@pytest.mark.parametrize("case", REWARDS)
def test_a_reward_that_fails_is_reported_once(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reward, statuses, line = REWARDS[case]
    work = run_ppo(tmp_path, reward)
    capfd.readouterr()
    assert two_ranks(work, tmp_path) == statuses
    shown = capfd.readouterr().err
    assert shown.count("\n") == 1
    assert shown.startswith(line)


def test_a_fault_of_the_configuration_is_reported_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    work = run_ppo(tmp_path, sed=7)
    capfd.readouterr()
    assert two_ranks(work, tmp_path) == ["2", "2"]
    shown = capfd.readouterr().err
    assert shown.count("\n") == 1
    assert shown.startswith("marlhf: sed: unknown key")


def test_a_bug_has_one_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(PPOTrainer, "step", step)
    assert two_ranks(run_ppo(tmp_path), tmp_path) == ["1", "1"]
    shown = capfd.readouterr().err
    assert shown.count("Traceback") == shown.count("ZeroDivisionError: a fault of ours") == 1
