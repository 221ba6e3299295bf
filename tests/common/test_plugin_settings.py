"""What a plug-in does to the process: without effect on the run, or an error that names it."""

from __future__ import annotations

import gc
import io
import locale
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from marlhf.rewards import RewardError, build_rewards


def score_after(harm: Callable[[], Any]) -> None:
    def mine(prompts: list[str], completions: list[str]) -> list[float]:
        harm()
        return [0.0] * len(prompts)

    build_rewards(mine)(["p"], ["c"])


def count_errors() -> int:
    return sum(kept[0] == "error" for kept in warnings.filters)


@pytest.mark.parametrize(
    ("harm", "read", "put"),
    [
        (lambda: torch.set_num_threads(3), torch.get_num_threads, torch.set_num_threads),
        (
            lambda: torch.set_float32_matmul_precision("medium"),
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        ),
        (
            lambda: torch.autograd.set_detect_anomaly(True),
            torch.is_anomaly_enabled,
            torch.autograd.set_detect_anomaly,
        ),
        (
            lambda: torch.set_autocast_enabled("cpu", True),
            lambda: torch.is_autocast_enabled("cpu"),
            lambda on: torch.set_autocast_enabled("cpu", on),
        ),
        (lambda: np.seterr(all="raise"), np.geterr, lambda old: np.seterr(**old)),
        (lambda: sys.setrecursionlimit(900), sys.getrecursionlimit, sys.setrecursionlimit),
        (gc.disable, gc.isenabled, lambda _: gc.enable()),
        (lambda: warnings.simplefilter("error"), count_errors, lambda _: warnings.resetwarnings()),
        (
            lambda: locale.setlocale(locale.LC_ALL, "C"),
            lambda: locale.setlocale(locale.LC_ALL),
            lambda old: locale.setlocale(locale.LC_ALL, old),
        ),
        (os.environ.clear, lambda: dict(os.environ), os.environ.update),
        (sys.path.clear, lambda: list(sys.path), sys.path.extend),
        (lambda: setattr(sys, "stdout", None), lambda: sys.stdout, lambda _: None),
        (
            lambda: signal.setitimer(signal.ITIMER_REAL, 500),
            lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0,
            lambda _: signal.setitimer(signal.ITIMER_REAL, 0),
        ),
    ],
    ids=(
        "threads matmul anomaly autocast numpy recursion gc warnings locale "
        "environment path stdout timer"
    ).split(),
)
def test_settings_are_afterwards_what_they_were(
    harm: Any, read: Any, put: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    locale.setlocale(locale.LC_ALL, "C.UTF-8")
    before = read()
    try:
        score_after(harm)
        assert read() == before
    finally:
        if read() != before:
            put(before)


def test_what_it_adds_for_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    score_after(lambda: (os.environ.update(MARLHF_TEST_KEY="x"), sys.path.insert(0, "/added")))
    assert os.environ.pop("MARLHF_TEST_KEY") == "x"
    assert sys.path == [*before, "/added"]  # no name of the run's libraries becomes another's


def test_streams_that_it_closes_are_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(RewardError, match=r"reward mine: .*closed stdout"):
        score_after(lambda: sys.stdout.close())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    kept = os.dup(2)
    try:
        with pytest.raises(RewardError, match=r"reward mine: .*closed stderr"):
            score_after(lambda: os.close(2))
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_inference_mode_that_it_leaves_on_is_an_error_that_names_it() -> None:
    mode = torch.inference_mode()
    try:
        with pytest.raises(RewardError, match=r"reward mine: .*left torch's inference mode on"):
            score_after(mode.__enter__)
    finally:
        mode.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("end", "status"),
    [(None, 1), (ValueError("x"), 1), (SystemExit(0), 0), (SystemExit(3), 3), (SystemExit("x"), 1)],
)
def test_a_process_that_it_forks_does_not_go_on_as_the_run(
    end: BaseException | None, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    children = []

    def fork() -> None:
        children.append(os.fork())
        if children[-1] == 0 and end is not None:
            raise end

    try:
        score_after(fork)
    finally:
        if children[-1] == 0:
            os._exit(7)
    (child,) = children
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    said = capfd.readouterr().err
    assert ("in a process that it forked: raised ValueError: x" in said) == (
        type(end) is ValueError
    )
