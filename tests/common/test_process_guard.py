"""Plug-ins neither end the process nor take its terminal, and what they fork ends with them."""

from __future__ import annotations

import multiprocessing
import os
import posix
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import launches
from support.runs import tiny_trainer, vowels
from support.runs_that_die import in_child

from marlhf import cli
from marlhf.common.errors import UserError
from marlhf.common.plugins import plugin_call
from marlhf.common.process_guard import open_streams
from marlhf.common.signals import StopSignals
from marlhf.rewards import RewardError, build_rewards
from marlhf.runs.directory import only_writer
from marlhf.segmenters import build_segmenter

ENDS: dict[str, Callable[[], Any]] = {
    "os._exit(0)": lambda: os._exit(0),
    "os._exit(3)": lambda: posix._exit(3),
    "os.execv('/bin/true', ['true'])": lambda: os.execv("/bin/true", ["true"]),
    "os.execve('/bin/true', ('true',), {})": lambda: os.execle("/bin/true", "true", {}),
}


def test_files_do_not_take_the_numbers_of_closed_streams(tmp_path: Path) -> None:
    def run() -> None:
        os.closerange(0, 3)
        sys.stdin = sys.stdout = sys.stderr = None  # pyright: ignore  as Python starts then
        open_streams()
        with (tmp_path / "metrics").open("w") as file:
            assert file.fileno() > 2
            os.write(2, b"of a C library")
            print("nobody sees it")
        (tmp_path / "told").touch()

    assert in_child(run) == 0
    assert (tmp_path / "told").exists()
    assert (tmp_path / "metrics").read_text() == ""


@pytest.mark.parametrize("words", ENDS)
def test_a_reward_that_ends_the_process_is_a_failure(words: str, tmp_path: Path) -> None:
    def leaving(prompts: Any, completions: Any) -> Any:
        ENDS[words]()

    def run() -> None:
        with pytest.raises(RewardError) as error:
            build_rewards(leaving)(["p"], ["c"])
        assert "reward leaving: row 0" in str(error.value)
        assert f"raised SystemExit: {words}" in str(error.value)
        (tmp_path / "told").touch()

    assert in_child(run) == 0
    assert (tmp_path / "told").exists()


def test_a_thread_that_outlives_its_call_does_not_end_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With status 0, as if the job were done."""
    thread = threading.Thread(target=lambda: (time.sleep(0.05), os._exit(0)))

    def job(config: Any) -> None:
        with plugin_call("reward late"):
            thread.start()
        thread.join()
        (tmp_path / "done").touch()

    monkeypatch.setattr(cli, "_imported", lambda path: job)
    monkeypatch.setattr("marlhf.config.loading.load_config", lambda *_: None)
    monkeypatch.setattr(cli, "_check_file", lambda *_: None)
    assert in_child(lambda: cli.main(["sft", "x.yaml"])) == 0
    assert (tmp_path / "done").exists()


def test_a_process_that_a_plug_in_forks_may_end_as_it_likes() -> None:
    with plugin_call("plug-in"):
        child = os.fork()
        if child == 0:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert os._exit is posix._exit
    assert os._exit.__module__ == "posix"


def closing(how: str) -> None:
    if how == "sys.stderr":
        sys.stderr.close()
    elif how == "both":
        os.closerange(1, 256)
    else:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("sys.stderr", "reward: raised RuntimeError: closed stderr, which the run writes to"),
        ("both", "reward: raised RuntimeError: closed stderr, stdout, which the run writes to"),
        ("elsewhere", None),
    ],
)
def test_stderr_is_put_back(how: str, line: str | None, tmp_path: Path) -> None:
    def run() -> None:
        for number, name in enumerate(("out", "err"), 1):
            os.dup2(os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT), number)
        sys.stderr = os.fdopen(2, "w")
        try:
            with plugin_call("reward"):
                closing(how)
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
        print("the run goes on", file=sys.stderr, flush=True)
        os.write(1, b"and its output too")

    assert in_child(run) == 0
    lines = [*([line] if line else []), "the run goes on"]
    assert (tmp_path / "err").read_text().splitlines() == lines
    assert (tmp_path / "out").read_text() == "and its output too"


def with_workers(prompts: Any, completions: Any) -> Any:
    with multiprocessing.get_context("fork").Pool(2) as pool:  # leaves by SIGTERM
        return pool.map(len, completions)


def reward_with_workers() -> None:
    signal.alarm(60)
    with StopSignals(lambda items: items) as signals:
        assert build_rewards(with_workers)(["p"] * 2, ["a", "bcd"]).scores == [1.0, 3.0]
        assert signals.requested() is None


def test_worker_processes_of_a_reward_end_by_sigterm() -> None:
    """In a process of its own: workers forked beside pytest's threads may inherit a held lock."""
    here = Path(__file__).parent
    code = (
        f"import sys; sys.path[:0] = {[str(here.parent), str(here)]}\nimport {__name__} as tests\n"
    )
    done = launches.run(["-c", code + "tests.reward_with_workers()"], folder=here)
    assert done.returncode == 0, done.stderr


def test_a_worker_process_that_is_left_behind_does_not_hold_the_folder(tmp_path: Path) -> None:
    read, write = os.pipe()
    with only_writer(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the end of the test
            os._exit(0)
    try:
        with only_writer(tmp_path):  # waits for PATIENCE seconds where it is locked
            pass
    finally:
        os.close(write)
        os.waitpid(child, 0)


def test_an_excepthook_is_put_back() -> None:
    before = sys.excepthook
    with plugin_call("plug-in"):
        sys.excepthook = print
    assert sys.excepthook is before


# --- rewards that no call fits


async def later(prompts: Any, completions: Any) -> Any:
    return vowels(prompts, completions)


def one_by_one(prompts: Any, completions: Any) -> Any:
    yield from vowels(prompts, completions)


class Alone:
    def __call__(self) -> Any:
        return []


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        (lambda: None, "is called with prompts, completions, but its parameters are none"),
        (lambda x: x, "is called with prompts, completions, but its parameters are x"),
        (Alone(), "reward Alone: is called with prompts, completions, but its parameters are none"),
        (later, "reward later: is an async function, must return its result when called"),
        (one_by_one, "reward one_by_one: is a generator function, must return its result"),
    ],
)
def test_a_reward_that_no_call_fits_is_refused_before_training(
    reward: Any, line: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        tiny_trainer(tmp_path, score=reward)
    assert not isinstance(error.value, RewardError)
    assert line in str(error.value)


def by_name(**texts: Any) -> Any:
    return vowels(texts["prompts"], texts["completions"])


@pytest.mark.parametrize("reward", [by_name, lambda *texts: vowels(*texts)])
def test_a_reward_may_take_anything(reward: Any) -> None:
    assert build_rewards(reward)(["p"], ["c"], {}).scores == vowels(["p"], ["c"])


@pytest.mark.parametrize("segmenter", [lambda: None, lambda a, b: a, later])
def test_a_segmenter_that_no_call_fits_is_refused(segmenter: Any) -> None:
    with pytest.raises(UserError, match=r"segmenter .*: is (called with batch|an async function)"):
        build_segmenter(segmenter)


@pytest.mark.parametrize("score", [1e300, -3.5e38])
def test_a_reward_beyond_float32_is_refused(score: float) -> None:
    def huge(prompts: Any, completions: Any) -> Any:
        return [0.0, score]

    with pytest.raises(RewardError, match=r"reward huge: row 1 .*must be finite \(in float32\)"):
        build_rewards(huge)(["p"] * 2, ["c"] * 2)
    two = [(lambda prompts, completions: [3e38], 1.0)] * 2
    with pytest.raises(RewardError, match=r"row 0: the weighted sum is 6e\+38, must be finite"):
        build_rewards(two)(["p"], ["c"])
