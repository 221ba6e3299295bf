"""`marlhf sweep`: what is planned, what is run, skipped, stopped, tried again and refused."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.bad_input import build_world

from marlhf.cli import main
from marlhf.commands import sweep
from marlhf.common.errors import UserError
from marlhf.config import SweepConfig
from marlhf.views.report.groups import group_runs
from marlhf.views.report.runs import read_runs

# Stands for a job: notes when it ran, with how many threads, and does what its folder's name says.
FAKE = """\
import json, os, pathlib, signal, sys, time, yaml
config = yaml.safe_load(open(sys.argv[1]))
folder = pathlib.Path(config["output_dir"])
log = folder.parents[1] / "times.jsonl"
began = time.time()
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
time.sleep(0.3)
while "endless" in folder.parts[-2] and not stopped:
    time.sleep(0.05)
fails = "fails" in folder.parts[-2] and not (folder.parents[1] / "mended").exists()
row = {"run": folder.parts[-2] + folder.name, "began": began, "ended": time.time(),
       "threads": os.environ["OMP_NUM_THREADS"], "resume": config["resume"]}
with log.open("a") as file:
    file.write(json.dumps(row) + "\\n")
if stopped:
    sys.exit(130)
if "leaves" in folder.parts[-2]:
    sys.exit(0)
if fails:
    print("about to fail")
    print("marlhf: no such luck", file=sys.stderr)
    sys.exit(2)
(folder / "final").mkdir(exist_ok=True)
(folder / "metrics.jsonl").write_text('{"step": 1, "eval_score_mean": 0.5, "eval_kl_mean": 2.0}\\n')
"""


@pytest.fixture
def fake_job(tmp_path, monkeypatch):
    """A quick program in the place of `marlhf ppo`; returns how often each run was started."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "base.yaml").write_text("model: {path: some/model}\nsteps: 7\noverwrite: true\n")
    command = lambda job, file: [sys.executable, str(tmp_path / "fake.py"), str(file)]  # noqa: E731
    monkeypatch.setattr(sweep, "_command", command)

    def times() -> list[dict[str, Any]]:
        path = tmp_path / "out" / "times.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return times


def config(folder: Path, **keys: Any) -> SweepConfig:
    return SweepConfig(
        config=str(folder / "base.yaml"), output_dir=str(folder / "out"), **{"threads": 1, **keys}
    )


def states(folder: Path) -> dict[str, str]:
    files = sorted((folder / "out").rglob("sweep.yaml"))
    found = {
        str(f.parent.relative_to(folder / "out")): yaml.safe_load(f.read_text()) for f in files
    }
    return {name: status["state"] for name, status in found.items()}


# --- planning


def test_every_arm_at_every_point_with_every_seed(tmp_path, fake_job):
    arms = {"token": {"segmenter": "token"}, "five": {"segmenter": {"name": "ngram", "n": 5}}}
    trials = sweep.plan(
        config(
            tmp_path,
            arms=arms,
            grid={"kl.coef": [0.1, 0.2], "optimizer.learning_rate": [1e-5]},
            seeds=[3, 4],
            overrides={"steps": 9},
        )
    )
    assert len(trials) == 2 * 2 * 1 * 2
    assert len({t.folder for t in trials}) == len(trials)
    last = trials[-1]
    assert last.label == "five, kl.coef=0.2, optimizer.learning_rate=1e-05"
    assert last.name == "five-kl.coef=0.2-optimizer.learning_rate=1e-05/seed-4"
    wanted = {"seed": 4, "steps": 9, "overwrite": False, "resume": "auto"}
    assert {key: last.config[key] for key in wanted} == wanted
    assert last.config["segmenter"] == {"name": "ngram", "n": 5}
    assert last.config["kl"]["coef"] == 0.2
    assert last.config["output_dir"] == str(last.folder)


def test_an_arm_goes_before_what_all_runs_share_and_the_grid_before_both(tmp_path, fake_job):
    keys = {"overrides": {"steps": 1, "kl.coef": 0.1}, "arms": {"a": {"steps": 2}}}
    (trial,) = sweep.plan(config(tmp_path, **keys, grid={"steps": [3]}))
    assert trial.config["steps"] == 3
    assert trial.config["kl"]["coef"] == 0.1


def test_labels_that_make_one_name_get_folders_of_their_own(tmp_path, fake_job):
    arms = {"a b": {"steps": 1}, "a/b": {"steps": 2}, "a:b": {"steps": 3}}
    names = [t.name for t in sweep.plan(config(tmp_path, arms=arms))]
    assert names == ["a-b/seed-0", "a-b-2/seed-0", "a-b-2-2/seed-0"]


def test_labels_without_a_letter_get_folders_of_their_own(tmp_path, fake_job):
    arms = {"??": {"steps": 1}, "/": {"steps": 2}}
    names = [t.name for t in sweep.plan(config(tmp_path, arms=arms))]
    assert names == ["arm/seed-0", "arm-2/seed-0"]


def test_a_value_given_twice_makes_one_run(tmp_path, fake_job):
    trials = sweep.plan(config(tmp_path, grid={"steps": [1, 2, 1]}, seeds=[0, 0]))
    assert [t.name for t in trials] == ["steps=1/seed-0", "steps=2/seed-0"]


def test_values_arrive_as_they_were_written(tmp_path, fake_job):
    template = "🙂 é: {prompt}\n"
    keys = {"data.prompt_template": template, "data.path": datetime.date(2024, 1, 31)}
    (trial,) = sweep.plan(config(tmp_path, overrides=keys))
    assert trial.config["data"]["prompt_template"] == template
    assert trial.config["data"]["path"] == "2024-01-31"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, fake_job):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=r"output_dir: given .*/out', which is a file"):
        sweep.run(config(tmp_path))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"grid": {"kl.coeff": [1]}}, "kl.coeff"),
        ({"grid": {"kl.coef": [0.1, -1]}}, "kl.coef=-1/seed-0: kl.coef: given -1"),
        ({"grid": {"seed": [1, 2]}}, "grid: seed is set by the sweep"),
        ({"arms": {"a": {"output_dir": "x"}}}, "arms.a: output_dir is set by the sweep"),
        ({"overrides": {"segmenter.n": "x"}}, "segmenter ngram: n: given 'x'"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"grid": {f"k{i}": [*range(10)] for i in range(9)}}, "1000000000 runs, must be at most"),
        ({"job": "sft", "grid": {"kl.coef": [0.1]}}, "kl"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(keys, says, tmp_path, fake_job):
    given = {"config": str(tmp_path / "base.yaml"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        sweep.run(SweepConfig(**{**given, **keys}))
    assert fake_job() == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("config: base.yaml\nseeds: []\n", "seeds: given [], must be a list of at least 1"),
        ("config: base.yaml\ngrid: {steps: 3}\n", "grid"),
        ("config: base.yaml\nparallel: 0\n", "parallel"),
        ("config: base.yaml\njob: evaluate\n", "job"),
        ("seeds: [1]\n", "config: missing"),
        ("config: base.yaml\nseed: [1]\n", "did you mean 'seeds'"),
    ],
)
def test_a_bad_sweep_file_is_one_line(text, says, tmp_path, fake_job, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        main(["sweep", "sweep.yaml"])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    assert says in error


# --- running


def test_what_is_done_is_left_out_and_what_failed_is_tried_again(tmp_path, fake_job, capsys):
    arms = {"fine": {"steps": 1}, "fails": {"steps": 2}}
    one = config(tmp_path, arms=arms, seeds=[0, 1])
    with pytest.raises(SystemExit) as end:
        sweep.run(one)
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert "FAILED fails/seed-0, status 2: no such luck" in printed.err
    assert "2 done, 2 failed: fails/seed-0, fails/seed-1" in printed.err
    assert "done fine/seed-1" in printed.out
    assert "held-out score 0.500, held-out KL 2.000" in printed.out
    expected = {"fine/seed-0": "done", "fine/seed-1": "done"}
    assert states(tmp_path) == {**expected, "fails/seed-0": "failed", "fails/seed-1": "failed"}
    assert "about to fail" in (tmp_path / "out/fails/seed-0/log.txt").read_text()
    (tmp_path / "out" / "mended").touch()
    sweep.run(one)
    printed = capsys.readouterr()
    assert "4 runs" in printed.out
    assert "2 done before" in printed.out
    assert set(states(tmp_path).values()) == {"done"}
    started = [row["run"] for row in fake_job()]
    assert {name: started.count(name) for name in started} == {
        "fineseed-0": 1,
        "fineseed-1": 1,
        "failsseed-0": 2,
        "failsseed-1": 2,
    }
    sweep.run(one)
    assert len(fake_job()) == 6


@pytest.mark.parametrize("parallel", [1, 3])
def test_so_many_run_at_a_time(parallel, tmp_path, fake_job):
    sweep.run(config(tmp_path, seeds=list(range(4)), parallel=parallel, arms={"a": {}}, threads=2))
    spans = sorted((row["began"], row["ended"]) for row in fake_job())
    assert len(spans) == 4
    most = max(sum(b <= at < e for b, e in spans) for at, _ in spans)
    assert most == parallel
    assert {row["threads"] for row in fake_job()} == {"2"}


def test_another_configuration_in_the_folder_is_refused(tmp_path, fake_job):
    arms = {"a": {"kl.coef": 0.1}}
    sweep.run(config(tmp_path, arms=arms))
    with pytest.raises(UserError, match=r"kl\.coef=0\.1, which is now 0\.2; choose another"):
        sweep.run(config(tmp_path, arms={"a": {"kl.coef": 0.2}}))
    # a key that another version did not know makes no difference
    status = tmp_path / "out" / "a" / "seed-0" / "sweep.yaml"
    values = yaml.safe_load(status.read_text())
    del values["config"]["ppo"]["lam"]
    status.write_text(yaml.safe_dump(values))
    sweep.run(config(tmp_path, arms=arms))
    assert len(fake_job()) == 1


@pytest.mark.parametrize("name", ["log.txt", "sweep.yaml", "job.yaml"])
def test_a_pipe_where_a_file_belongs_is_refused(name, tmp_path, fake_job):
    folder = tmp_path / "out" / "a" / "seed-0"
    folder.mkdir(parents=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name}' is not a file"):
        sweep.run(config(tmp_path, arms={"a": {}}))
    assert fake_job() == []


def test_a_run_whose_end_was_not_recorded_is_done_if_its_model_is_there(tmp_path, fake_job):
    sweep.run(config(tmp_path, arms={"a": {}}))
    folder = tmp_path / "out" / "a" / "seed-0"
    text = (folder / "sweep.yaml").read_text()
    (folder / "sweep.yaml").write_text(text.replace("state: done", "state: running"))
    (folder / "final").mkdir(exist_ok=True)
    sweep.run(config(tmp_path, arms={"a": {}}))
    assert len(fake_job()) == 1
    (folder / "final").rmdir()
    sweep.run(config(tmp_path, arms={"a": {}}))
    assert len(fake_job()) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_and_leaves_no_process(number, tmp_path, fake_job):
    """In a process of its own, as a signal would also hit pytest."""
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
sys.path[:0] = {sys.path!r}
from marlhf.commands import sweep
from marlhf.cli import main
sweep._command = lambda job, file: [sys.executable, {str(tmp_path / "fake.py")!r}, str(file)]
main(["sweep", {str(tmp_path / "sweep.yaml")!r}])
"""
    keys = {"arms": {"endless": {}, "later": {}}, "threads": 1, "seeds": [0]}
    paths = {"config": str(tmp_path / "base.yaml"), "output_dir": str(tmp_path / "out")}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(paths | keys))
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "endless" / "seed-0" / "log.txt"
    end = time.monotonic() + 60
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1.0)  # until the fake job listens
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    assert states(tmp_path) == {"endless/seed-0": "stopped"}
    assert [row["run"] for row in fake_job()] == ["endlessseed-0"]  # it was let finish


# --- the real thing


def test_real_runs_go_on_and_are_reported_by_arm(tmp_path, monkeypatch, capsys):
    """Two runs of one update; one of them then goes on after a stop, by its checkpoint."""
    build_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    keys = {
        "config": "config.yaml",
        "arms": {
            "token": {"segmenter": "token"},
            "pairs": {"segmenter": {"name": "ngram", "n": 2}},
        },
        "overrides": {"checkpoint.every": 1, "log.warnings": False},
        "output_dir": "out",
        "parallel": 2,
        "threads": 1,
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(keys))
    main(["sweep", "sweep.yaml"])
    assert states(tmp_path) == {"pairs/seed-0": "done", "token/seed-0": "done"}
    groups = group_runs(read_runs(["out"]))
    assert sorted(group.label for group in groups) == ["pairs", "token"]
    assert all(group.runs[0].last_update == 1 for group in groups)
    assert "All done" in capsys.readouterr().out


def test_the_file_of_a_run_in_a_grid_is_no_assignment(tmp_path, capsys):
    folder = tmp_path / "optimizer.learning_rate=1e-06" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text("model: {path: nowhere}\nsteps: none\n")
    with pytest.raises(SystemExit):
        main(["ppo", str(folder / "job.yaml")])
    assert "steps: given 'none'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ppo", "steps=3"])
    assert "usage: marlhf ppo CONFIG.yaml" in capsys.readouterr().err


def test_a_run_that_ends_with_status_0_and_no_model_has_failed(tmp_path, fake_job, capfd):
    arms = {"leaves": {"steps": 1}, "fine": {"steps": 2}}
    with pytest.raises(SystemExit) as end:
        sweep.run(config(tmp_path, arms=arms, seeds=[0]))
    assert end.value.code == 1
    assert states(tmp_path) == {"leaves/seed-0": "failed", "fine/seed-0": "done"}
    assert "1 done, 1 failed: leaves/seed-0" in capfd.readouterr().err


def test_runs_that_a_killed_sweep_left_are_waited_for(tmp_path, fake_job, monkeypatch, capfd):
    """Started again at once, it neither fails them nor runs them beside themselves."""
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "-S", str(tmp_path / "slow.py")]
    monkeypatch.setattr(sweep, "_command", lambda job, file: [*command, str(file)])
    first = os.fork()
    if first == 0:
        sweep.run(config(tmp_path))
        os._exit(0)
    log = tmp_path / "out" / "seed-0" / "log.txt"
    while not (log.exists() and "began" in log.read_text()):
        time.sleep(0.02)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    threading.Timer(1.0, (tmp_path / "go").touch).start()
    sweep.run(config(tmp_path))
    assert capfd.readouterr().out.count("waiting for seed-0: an earlier sweep") == 1
    assert log.read_text().split() == ["began", "ended"]
    assert states(tmp_path) == {"seed-0": "done"}


SLOW = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[1]).parent
print("began", flush=True)
while not (folder.parent.parent / "go").exists():
    time.sleep(0.02)
(folder / "final").mkdir()
print("ended", flush=True)
"""
