"""Full disks, and ranks that fail or are killed: what is shown, and what is left."""

from __future__ import annotations

import errno
import io
import json
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from support import two_ranks_that_die
from support.forked_ranks import two_ranks
from support.launches import PROFILES, accelerate, first_error, run, torchrun
from support.runs import PROMPTS, tiny_trainer
from support.runs_that_die import contents, in_child, train, trainer

from marlhf.algorithm.estimators import GAE, Credit, CreditInputs
from marlhf.common.errors import UserError
from marlhf.distributed import trained
from marlhf.rewards import TokenReward
from marlhf.runs import checkpoint, sinks, state
from marlhf.segmenters import NGram

SCRIPT = Path(__file__).parents[1] / "support" / "two_ranks_that_die.py"


def full(owner: Any, name: str, call: int, error: Exception, monkeypatch: Any) -> None:
    """From its `call`-th call on that writes to the disk, a function finds it full."""
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        to_memory = any(isinstance(arg, io.BytesIO) for arg in args)
        if not to_memory and next(calls) >= call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
WRITES: dict[str, tuple[Any, str, int, Exception]] = {
    "a row": (sinks.JsonLines, "write", 14, NO_SPACE),
    "events": (sinks.TensorBoard, "write", 5, NO_SPACE),
    "weights": (trained, "save_file", 3, SafetensorError("I/O error: No space (os error 28)")),
    "optimiser": (trained.torch, "save", 4, RuntimeError("PytorchStreamWriter failed writing")),
    "rank": (state.torch, "save", 6, NO_SPACE),
    "digests": (checkpoint, "sync", 23, NO_SPACE),
    "manifest": (checkpoint, "sync", 30, NO_SPACE),
    "name": (checkpoint.os, "rename", 2, NO_SPACE),
    "deleting an old one": (state.shutil, "rmtree", 1, NO_SPACE),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that never stops writes."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder)
    return contents(folder)


@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint_whole(
    write: str, alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        made = trainer(tmp_path / "run")
        owner, name, call, error = WRITES[write]
        full(owner, name, call, error, patched)
        free = type("Usage", (), {"free": 0})
        patched.setattr("shutil.disk_usage", lambda _: free)
        with pytest.raises(UserError, match=r"the disk is full; .* resume=auto") as raised:
            made.train()
        assert "\n" not in str(raised.value)
    found = checkpoint.latest(tmp_path / "run" / "checkpoints", pytest.fail)
    assert found is not None
    train(tmp_path / "run")
    assert contents(tmp_path / "run") == alone


def test_other_errors_keep_their_traceback(tmp_path: Path, monkeypatch: Any) -> None:
    full(trained, "save_file", 1, RuntimeError("a fault of ours"), monkeypatch)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        train(tmp_path)


LAUNCHERS = {"ddp": torchrun(2), "zero2": accelerate(PROFILES / "zero2.yaml")}


def launch(folder: Path, fault: str, launcher: str = "ddp") -> subprocess.CompletedProcess[str]:
    """Two ranks, with a fault."""
    return run([*LAUNCHERS[launcher], str(SCRIPT), str(folder), fault])


@dataclass(frozen=True)
class Runs:
    """The files of two ranks that were never stopped, and the folder of two of which one died."""

    whole: dict[str, Any]
    killed: Path


@pytest.fixture(scope="module", params=["ddp", "zero2"])
def launcher(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def runs(launcher: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    whole, killed = (tmp_path_factory.mktemp(f"{launcher}-{name}") for name in ("whole", "killed"))
    done = launch(whole, "none", launcher)
    assert done.returncode == 0, first_error(done)
    assert f"zero stage {2 if launcher == 'zero2' else 0}" in done.stdout
    fault = "checkpoint" if launcher == "ddp" else "update"
    assert launch(killed, fault, launcher).returncode != 0
    return Runs(contents(whole), killed)


def test_two_ranks_killed_and_resumed_are_as_if_never_killed(
    launcher: str, runs: Runs, tmp_path: Path
) -> None:
    shutil.copytree(runs.killed, tmp_path / "run")
    done = launch(tmp_path / "run", "none", launcher)
    assert done.returncode == 0, first_error(done)
    step = 2 if launcher == "ddp" else 4
    assert f"resuming from {tmp_path / 'run' / 'checkpoints' / f'step-{step}'}" in done.stderr
    assert contents(tmp_path / "run") == runs.whole


def test_one_rank_goes_on_from_what_two_have_written(
    runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs.killed, tmp_path / "run")
    assert in_child(lambda: train(tmp_path / "run")) == 0
    assert "ranks 2 -> 1, which may change results by rounding" in capfd.readouterr().err
    rows, wanted = contents(tmp_path / "run")["metrics"], runs.whole["metrics"]
    assert rows[:3] == wanted[:3]
    assert len(rows) == len(wanted)
    for row, like in zip(rows, wanted, strict=True):
        assert {k for k in row if row[k] is None} == {k for k in like if like[k] is None}
        numbers = {k: v for k, v in like.items() if v is not None}
        assert {k: row[k] for k in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-4)


# of rank 1, and what rank 0 is told
FAULTS = {
    "reward": "RewardError: reward DrawingReward: ",
    "learning": "RewardError: token reward curiosity: raised RuntimeError: the learner is ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reward_that_fails_on_one_rank_ends_both_with_its_error(
    fault: str, tmp_path: Path
) -> None:
    first, second = two_ranks(lambda _: str(two_ranks_that_die.main(tmp_path, fault)), tmp_path)
    assert second.startswith(FAULTS[fault])
    assert "out of order" in second
    assert first == f"PeerError: rank 1 failed: {second.partition(': ')[2]}"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


class Odd(TokenReward):
    """One whose ranks differ in a call of `all_reduce`, and which catches what that raises."""

    requires = frozenset()

    def __init__(self, on_one: str) -> None:
        self.on_one = on_one

    def __call__(self, rollout: Any) -> torch.Tensor:
        return torch.zeros(rollout.responses.response_mask.shape)

    def update(self, rollout: Any, all_reduce: Any) -> dict[str, float]:
        differs = torch.distributed.get_rank() == 1
        with suppress(UserError):
            if not differs or self.on_one != "none":
                all_reduce(torch.ones(2 if differs and self.on_one == "float32 [2]" else 3))
            if differs and self.on_one == "two":
                all_reduce(torch.ones(3))
        return {}


ODD = {
    "none": "no further all_reduce on rank 1, all_reduce of float32 [3] on rank 0",
    "two": "all_reduce of float32 [3] on rank 1, no further all_reduce on rank 0",
    "float32 [2]": "all_reduce of float32 [2] on rank 1, all_reduce of float32 [3] on rank 0",
}


@pytest.mark.parametrize("on_one", ODD)
def test_token_rewards_that_reduce_differently_end_both_with_one_line(
    on_one: str, tmp_path: Path
) -> None:
    """Else they would wait for each other for hours, or be ended by a signal."""

    def work(_: int) -> str:
        reward = Odd(on_one)
        tiny_trainer(tmp_path, token_reward=reward, distributed_timeout_minutes=1).step(PROMPTS)
        return "done"

    outcomes = two_ranks(work, tmp_path)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].startswith(f"UserError: token reward Odd: {ODD[on_one]}; all ranks must ")


FAULT = "none"  # of the second rank


def fail(name: str) -> None:
    if name == FAULT and torch.distributed.get_rank() == 1:
        raise RuntimeError(f"no {name} today")


class Learning(NGram):
    def learn(self, responses: Any) -> None:
        fail("learn")

    def metrics(self) -> dict[str, float]:
        fail("metrics")
        return {}


class Failing(GAE):
    def __call__(self, inputs: CreditInputs) -> Credit:
        fail("estimator")
        if FAULT == "all_reduce" and torch.distributed.get_rank() == 1:
            inputs.all_reduce(torch.ones(3))
        return super().__call__(inputs)


@pytest.mark.parametrize("fault", ["learn", "metrics", "estimator", "all_reduce"])
def test_segmenters_and_estimators_that_fail_on_one_rank_end_both_with_their_error(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "FAULT", fault)

    def work(_: int) -> str:
        made = tiny_trainer(tmp_path, distributed_timeout_minutes=1)
        made.segmenter, made.credit = Learning(3), replace(made.credit, estimator=Failing())
        made.step(PROMPTS)
        return "done"

    first, second = two_ranks(work, tmp_path)
    if fault == "all_reduce":
        assert first == second
        assert "all_reduce of float32 [3] on rank 1, all_reduce of float64 [2] on rank 0" in first
    else:
        assert f"raised RuntimeError: no {fault} today" in second
        assert first == f"PeerError: rank 1 failed: {second.removeprefix('UserError: ')}"


def test_a_resume_says_that_the_threads_are_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sums of products round by how they are shared out."""
    threads = torch.get_num_threads()
    train(tmp_path, steps=1, checkpoint={"every": 1})
    try:
        torch.set_num_threads(threads + 1)
        trainer(tmp_path, steps=2, overwrite=False, resume="auto")
    finally:
        torch.set_num_threads(threads)
    line = f"threads {threads} -> {threads + 1}, which may change results by rounding"
    assert line in capfd.readouterr().err
    trainer(tmp_path, steps=2, overwrite=False, resume="auto")
    assert "threads" not in capfd.readouterr().err
