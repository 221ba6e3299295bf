"""What reaches a terminal or a page: foreign text commands neither, and brackets are no markup."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from marlhf.cli import main
from marlhf.commands import quickstart, sweep
from marlhf.common.errors import one_line, printable, say
from marlhf.common.third_party_output import quiet_libraries
from marlhf.evaluation import job
from marlhf.evaluation.render import Table
from marlhf.evaluation.render import show as show_tables
from marlhf.views.html_page import escape, tag
from marlhf.views.terminal import visible

COMMANDS = ["\x1b[31m", "\x07", "\x9b", "\x7f", "\u202e", "\u2066", "\u200f", "\u061c", "\ud800"]
NAME = "a[/b]\x1b[2J\u202e:smile:"


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_that_commands_is_shown(command: str, capfd: Any) -> None:
    foreign = f"one{command}two"
    wanted = f"one�{command[1:]}two"
    assert printable(foreign) == one_line(foreign) == visible(foreign) == wanted
    assert one_line(ValueError(foreign)) == escape(foreign) == wanted
    assert tag("p", title=foreign) == f'<p title="{wanted}"></p>'
    say(foreign)
    say(foreign, sys.stdout)
    assert capfd.readouterr() == (wanted + "\n", wanted + "\n")


def test_a_log_on_a_full_disk_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115  closing it raises too
    monkeypatch.setattr(sys, "stderr", full)
    say("one")
    with pytest.raises(OSError, match="No space left"):
        say("the result", full)
    os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_what_people_write_stays() -> None:
    written = "naïve שלום 你好 👩‍🚀 a\u200bb\tc\nd"
    assert printable(written, "\n\t") == written
    assert escape("<a>\n&") == "&lt;a&gt;\n&amp;"


@pytest.mark.parametrize("key", ['"\\e[31mred"', '"a\\u202Eb"'])
def test_an_unknown_key(key: str, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "c.yaml").write_text(f"{key}: 1\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["ppo", str(tmp_path / "c.yaml")])
    error = capfd.readouterr().err
    assert error == printable(error, "\n")
    assert "�" in error


def test_a_fault_of_ours_may_quote_them_too(capfd: Any) -> None:
    with pytest.raises(SystemExit):
        main([])
    with pytest.raises(SystemExit):
        main(["--nothing"])
    capfd.readouterr()
    error = ValueError("\x1b[31m")
    sys.excepthook(ValueError, error, None)
    assert capfd.readouterr().err == "ValueError: �[31m\n\n"


def test_nor_does_a_thread_of_a_plug_in_command_the_terminal(
    capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", None)
    monkeypatch.setattr(threading, "excepthook", None)
    with pytest.raises(SystemExit):
        main([])
    capfd.readouterr()

    def fail() -> None:
        raise ValueError("\x1b[31m")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert "ValueError: �[31m" in capfd.readouterr().err


def test_what_libraries_log(caplog: Any) -> None:
    quiet_libraries()
    logging.getLogger("another").warning("model %s says %s", "m\x1b[1m", "x\u202e")
    logging.getLogger("another").warning("100%")
    assert [record.getMessage() for record in caplog.records] == ["model m�[1m says x�", "100%"]


def test_a_policy_may_be_called_anything(capfd: Any) -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    show_tables_of = Table(f"Difference to {NAME}", ["", NAME], [[NAME, "1"]])
    pages = {"policies": [], "made": show_tables_of}
    import marlhf.evaluation.render as module

    before = module.tables
    module.tables = lambda results: [results["made"]]
    try:
        show_tables(pages, console)
    finally:
        module.tables = before
    assert out.getvalue().count("a[/b]�[2J�:smile:") == 3
    list(job._Track(is_main=True)([1, 2], f"sampling {NAME}"))
    assert "sampling a[/b]�[2J�:smile:: 2 batches" in capfd.readouterr().err


def test_a_bar_with_brackets_in_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    bar = job._Track(is_main=True)
    bar._console = Console(file=out, force_terminal=True, width=200)
    assert list(bar([1, 2], f"sampling {NAME}")) == [1, 2]
    assert "sampling a[/b]�[2J�" in out.getvalue()


def test_quickstart_in_a_folder_with_brackets(tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "a[" / "b]"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "score_mean": 1.0}) + "\n")
    (run / "samples.jsonl").write_text("")
    quickstart.show(run, Console(width=300))
    assert f"Plot: {run / 'reward_kl.png'}" in capsys.readouterr().out


def test_a_runs_last_words_in_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("marlhf: \x1b[31mred\u202e\n", encoding="utf-8")
    assert sweep._last_words(tmp_path / "log.txt") == "�[31mred�"
