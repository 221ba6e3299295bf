"""`marlhf report` of runs that are broken, odd or long: a note or a line, never a traceback."""

from __future__ import annotations

import json
import os
import time
from itertools import pairwise
from typing import Any

import pytest
from support.disks import mounted
from support.written_runs import learning, sample, some_runs, write_run

from marlhf.cli import main
from marlhf.common.errors import UserError
from marlhf.views.html_page import write_page
from marlhf.views.report.document import document
from marlhf.views.report.groups import group_runs
from marlhf.views.report.runs import read_runs

BROKEN: dict[str, dict[str, Any]] = {
    "empty file": {"rows": []},
    "one step": {"rows": [{"step": 1, "score_mean": 0.5, "kl_mean": 0.0, "step_seconds": 1.0}]},
    "only an evaluation": {"rows": [{"step": 0, "eval_score_mean": 0.5, "eval_kl_mean": 0.0}]},
    "nulls": {"rows": [{"step": 1, "score_mean": None}, {"step": 2, "score_mean": 1.0}]},
    "nan": {"rows": ['{"step": 1, "score_mean": NaN, "kl_mean": Infinity}\n', *learning(0.1)]},
    "half a line": {"rows": [*learning(0.1), '{"step": 21, "score_me']},
    "not objects": {"rows": ["[1, 2]\n", "3\n", '"text"\n', "\n", *learning(0.1)]},
    "no step": {"rows": [{"score_mean": 1.0}, {"step": "x"}, {"step": None}, *learning(0.1)]},
    "steps twice": {"rows": [*learning(0.1), *learning(0.1)]},
    "huge numbers": {
        "rows": [
            {"step": 1, "score_mean": 1e308, "kl_mean": -1e308},
            {"step": 2, "score_mean": 10**400},
            {"step": 3, "score_mean": 1e-320},
            {"step": 4, "step_seconds": 1e308},
            {"step": 5, "step_seconds": 1e308},
        ]
    },
    "tiny numbers": {"rows": [{"step": 1, "x": 0.0}, {"step": 2, "x": 5e-324}]},
    "a long name": {"rows": [{"step": 1, f"reward_{'my_package.' * 30}f_mean": 1.0}]},
    "texts for numbers": {"rows": [{"step": 1, "score_mean": "high", "kl_mean": [1], "x": {}}]},
    "odd samples": {
        "rows": learning(0.1),
        "samples": [
            {},
            {"step": 0, "held_out": True, "macro_actions": [1]},
            sample(0, 0, macro_advantages=[1.0]),
            sample(20, 0, macro_advantages=[None, 1.0, 2.0], macro_lengths="x", score=None),
            sample(20, 1, macro_lengths=[]),
            sample(20, 2, held_out=False, prompt=None, macro_advantages=None),
            sample(0, 3) | {"row": [3]},
            sample(20, 3) | {"row": [3]},
            '{"step": 3, "held_',
        ],
    },
    "macro actions beyond all measure": {
        "rows": learning(0.1),
        "samples": [
            sample(20, 0, macro_lengths=[99999999999]),
            sample(20, 1, macro_lengths=[10**400]),
        ],
    },
    "configuration of another kind": {
        "rows": learning(0.1),
        "segmenter": 3,
        "kl": None,
        "steps": "x",
    },
    "stopped early": {"rows": learning(0.1), "steps": 100, "segmenter": "token"},
    "another job": {"rows": [{"step": t, "loss": 1 / t, "learning_rate": 1e-5} for t in (1, 2, 3)]},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_leaves_a_gap_and_never_a_traceback(name, tmp_path, capsys):
    given = dict(BROKEN[name])
    rows, samples = given.pop("rows"), given.pop("samples", ())
    write_run(tmp_path / "odd", rows, samples, **given)
    main(["report", str(tmp_path / "odd")])
    html = (tmp_path / "odd" / "report" / "report.html").read_text(encoding="utf-8")
    assert "NaN" not in html.partition("<script>")[0].replace("NaN</", "")
    assert "</main>" in html
    # and beside a whole run
    main(["report", str(tmp_path / "odd"), *some_runs(tmp_path / "whole"), "--no-png", "--output",
          str(tmp_path / "both")])  # fmt: skip
    assert (tmp_path / "both" / "report.html").is_file()


LOOPS = {
    "a loop": "kl: &a\n  coef: *a\n",
    "a loop of lists": "segmenter: &a [*a]\n",
    "more and more": "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in pairwise("abcdefgh")),
    "deep": "a: " + "[" * 90 + "]" * 90 + "\n",
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_configuration_without_end_is_a_note(name, tmp_path, capsys):
    run = write_run(tmp_path / "run", learning(0.1))
    (run / "config.yaml").write_text(LOOPS[name])
    main(["report", str(run), "--no-png"])
    assert "config.yaml is nested too deeply, or too large" in capsys.readouterr().out


def test_notes_say_what_was_left_out(tmp_path, capsys):
    run = write_run(tmp_path / "run", [*learning(0.1), '{"step": 21, "sco'], steps=99, seed=0)
    (run / "config.yaml").write_text("steps: [unclosed")
    main(["report", str(run), "--no-png"])
    out = capsys.readouterr().out
    assert "run: metrics.jsonl: 1 broken line left out" in out
    assert "config.yaml cannot be read" in out
    assert "1 broken line left out" in (run / "report" / "report.html").read_text()


def test_line_breaks_of_unicode_are_no_ends_of_lines(tmp_path):
    """Samples are written with every character but the control characters of ASCII as it is."""
    pieces = ["one\u2028two", "\x85three", "\u2029"]
    samples = [sample(step, 0, macro_actions=pieces) for step in (0, 20)]
    run = write_run(tmp_path / "run", learning(0.1), segmenter="token")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
    (run / "samples.jsonl").write_text(lines, encoding="utf-8")
    (read,) = read_runs([str(run)])
    assert read.notes == []
    assert read.samples == samples


def test_many_rows_and_samples_take_time_in_proportion(tmp_path):
    """20,000 responses; what compares each with each takes minutes."""
    rows = [{"step": t, "score_mean": t % 7, "clip_fraction": 0.0} for t in range(1, 5001)]
    samples = [sample(1 + i // 4, i % 4, held_out=False) for i in range(20_000)]
    write_run(tmp_path / "run", rows, samples, segmenter="token")
    groups = group_runs(read_runs([str(tmp_path)]))
    began = time.process_time()
    html = document(groups, groups[0])
    assert time.process_time() - began < 8
    assert "Training responses of update 5000" in html


@pytest.mark.parametrize("name", ["2024-13-45", "[" * 3000, "\xff"])
def test_a_configuration_that_cannot_be_read_is_noted(name, tmp_path):
    run = write_run(tmp_path / "run", learning(0.1))
    (run / "config.yaml").write_bytes(f"name: {name}".encode("latin-1"))
    (read,) = read_runs([str(run)])
    assert any("config.yaml cannot be read" in note for note in read.notes)


def test_a_png_that_cannot_be_written_is_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", learning(0.1), segmenter="token")
    (run / "report" / "entropy.png").mkdir(parents=True)
    with pytest.raises(SystemExit) as end:
        main(["report", str(run)])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    assert "--output: cannot write" in error
    assert "entropy.png" in error


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path):
    disk = tmp_path / "disk"
    if not mounted(disk, 100):
        pytest.skip("needs the right to mount a disk")
    page, link = disk / "page.html", tmp_path / "link.html"
    link.symlink_to(page)
    before = "<!doctype html>before"
    write_page(link, before, "--html")
    with pytest.raises(UserError, match=r"--html: cannot write .*No space left"):
        write_page(link, "x" * 200_000, "--html")
    assert page.read_text() == before
    assert [*disk.iterdir()] == [page]
    assert link.is_symlink()


def test_a_page_goes_into_a_pipe_that_somebody_reads(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="--html: cannot write"):
        write_page(pipe, "nobody", "--html")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_page(pipe, "somebody", "--html")
    assert os.read(reader, 100) == b"somebody"
    os.close(reader)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "given 'nowhere', which does not exist"),
        (["empty"], "no run in 'empty'"),
        (["a_file"], "is a file"),
        ([], "RUN"),
        (["run", "--baseline", "x"], "no group is called 'x'"),
        (["run", "--output", "a_file"], "--output: cannot write"),
        (["run", "--baselines"], "unrecognized"),
    ],
)
def test_bad_input_is_one_line(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("")
    write_run(tmp_path / "run", learning(0.1), segmenter="token")
    with pytest.raises(SystemExit) as end:
        main(["report", *words])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    assert says in error


def test_a_folder_of_runs_is_read_whole_and_names_are_as_long_as_needed(tmp_path):
    for name in ("a/run", "b/run", "c/other"):
        write_run(tmp_path / name, learning(0.1))
    names = {run.name for run in read_runs([str(tmp_path), str(tmp_path / "a" / "run")])}
    assert names == {"a/run", "b/run", "c/other"}
