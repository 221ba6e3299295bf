"""`marlhf sweep`: one job over a grid of settings and seeds, one process per run.

In addition to the job's files, a run's folder holds its configuration (`job.yaml`), its output
(`log.txt`) and its state (`sweep.yaml`). Started again, a sweep skips finished runs and resumes
those that were stopped or failed.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from marlhf.common.errors import Stopped, UserError, one_line, say
from marlhf.common.paths import check_kinds, local_path, write_atomically, writing
from marlhf.common.registry import spec_label
from marlhf.config import PPOConfig, RewardConfig, SFTConfig, SweepConfig
from marlhf.config.loading import apply_overrides, config_from_dict, config_to_dict, read_yaml
from marlhf.config.yaml_text import dump_yaml
from marlhf.runs.directory import only_writer, try_lock
from marlhf.segmenters import build_segmenter
from marlhf.views.report.runs import read_runs

_CONFIGS: dict[str, Any] = {"ppo": PPOConfig, "sft": SFTConfig, "reward": RewardConfig}
_RESERVED_KEYS = ("seed", "output_dir", "overwrite", "resume")
_STILL_RUNS = "an earlier sweep, which was killed, has left it running"
_RESUME_HINT = "; run the same command again to resume"
_MOST_RUNS = 10_000
_POLL = 0.2  # seconds
_PATIENCE = 600.0  # seconds for a stopped run to finish its update and save it


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    label    its arm and its point of the grid, without the seed; None if nothing varies
    config   resolved, as plain data
    """

    folder: Path
    name: str
    label: str | None
    config: dict[str, Any]

    @property
    def status_file(self) -> Path:
        """File of the trial's state."""
        return self.folder / "sweep.yaml"

    def status(self) -> dict[str, Any]:
        """The state written last; empty before the first start, or if unreadable."""
        try:
            return read_yaml(self.status_file)
        except UserError:
            return {}

    def write_status(self, state: str, **fields: Any) -> None:
        """Replace the state atomically, so that a kill leaves no partial file."""
        status = {"arm": self.label, "state": state, **fields, "config": self.config}
        with writing("output_dir", self.folder, _RESUME_HINT):
            write_atomically(self.status_file, dump_yaml(status))

    @property
    def is_done(self) -> bool:
        """Whether it succeeded: by its state, or by its model, which is published last."""
        status = self.status()
        return bool(status) and (status.get("state") == "done" or (self.folder / "final").is_dir())


def run(config: SweepConfig) -> None:
    """Run the trials not done yet. Exits with status 1 if a run failed."""
    trials = plan(config)
    with only_writer(local_path(config.output_dir, "output_dir")):
        failed = _run_trials(trials, config)
    if failed:
        names = ", ".join(trial.name for trial in failed)
        say(f"{len(trials) - len(failed)} done, {len(failed)} failed: {names}")
        sys.exit(1)
    say(f"All done. Next: marlhf report {config.output_dir}", sys.stdout)


def _run_trials(trials: Sequence[Trial], config: SweepConfig) -> list[Trial]:
    for trial in trials:
        _check_same(trial)
    todo = [trial for trial in trials if not trial.is_done]
    before = len(trials) - len(todo)
    earlier = f", {before} done before" * bool(before)
    say(f"{len(trials)} runs in {config.output_dir}{earlier}", sys.stdout)
    return _run_all(todo, config, len(trials))


# --- planning


def plan(config: SweepConfig) -> list[Trial]:
    """All runs, with checked configurations. Raises UserError that names the run."""
    lists = [config.arms or [None], config.seeds, *config.grid.values()]
    if (count := math.prod(map(len, lists))) > _MOST_RUNS:
        raise UserError(f"grid: with arms and seeds {count} runs, must be at most {_MOST_RUNS}")
    cls = _CONFIGS[config.job]
    base = read_yaml(config.config)
    trials: dict[Path, Trial] = {}  # a value given twice makes one run
    used: dict[str, str | None] = {}
    for label, settings in _points(config):
        slug = "" if label is None else _slug(label) or "arm"
        while slug and used.setdefault(slug, label) != label:
            slug += "-2"
        for seed in config.seeds:
            name = "/".join(part for part in (slug, f"seed-{seed}") if part)
            folder = local_path(config.output_dir, "output_dir") / name
            reserved = {
                "seed": seed,
                "output_dir": str(folder),
                "overwrite": False,
                "resume": "auto",
            }
            keys = {**config.overrides, **settings, **reserved}
            assignments = [f"{key}={_written(value)}" for key, value in keys.items()]
            try:
                values = apply_overrides(cls, base, assignments)
                resolved = config_to_dict(config_from_dict(cls, values))
                if "segmenter" in resolved:
                    build_segmenter(resolved["segmenter"])
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            trials[folder] = Trial(folder, name, label, resolved)
    return [*trials.values()]


def _points(config: SweepConfig) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Label and settings of every arm at every point of the grid."""
    sources = {"overrides": config.overrides, "grid": config.grid}
    sources |= {f"arms.{name}": keys for name, keys in config.arms.items()}
    for source, keys in sources.items():
        for key in keys:
            if key in _RESERVED_KEYS:
                raise UserError(f"{source}: {key} is set by the sweep itself; leave it out")
    arms: dict[str | None, dict[str, Any]] = {**config.arms} or {None: {}}
    for (arm, settings), values in itertools.product(
        arms.items(), itertools.product(*config.grid.values())
    ):
        point = dict(zip(config.grid, values, strict=True))
        parts = [arm] if arm is not None else []
        parts += [f"{key}={spec_label(value)}" for key, value in point.items()]
        yield ", ".join(parts) or None, {**settings, **point}


def _written(value: Any) -> str:
    """A value as YAML: JSON with non-ASCII unescaped, as YAML takes no surrogate pairs."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _slug(label: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", label).strip("-.")[:100]


def _check_same(trial: Trial) -> None:
    """Raise UserError if the trial's folder holds a run of another configuration.

    Keys that only one of the two has (another version wrote it) are ignored.
    """
    names = ("job.yaml", "log.txt", "sweep.yaml")
    check_kinds([trial.folder, *(trial.folder / name for name in names)], "output_dir")
    recorded, current = _flat(trial.status().get("config")), _flat(trial.config)
    for key in recorded.keys() & current.keys():
        if recorded[key] != current[key]:
            raise UserError(
                f"output_dir: {str(trial.folder)!r} holds a run with {key}={recorded[key]}, "
                f"which is now {current[key]}; choose another output_dir, or delete that folder"
            )


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(config, Mapping):
        return {}
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and not prefix:
            flat |= _flat(value, f"{name}.")
        elif name not in (*_RESERVED_KEYS, "resume_changed"):
            flat[name] = json.dumps(value, sort_keys=True, default=str)
    return flat


# --- running


@dataclass(frozen=True)
class _Running:
    trial: Trial
    process: subprocess.Popen[bytes]
    started: float

    @property
    def succeeded(self) -> bool:
        """Whether it exited with 0 and left a model. User code may exit with 0 too early."""
        return self.process.returncode == 0 and (self.trial.folder / "final").is_dir()


def _run_all(todo: Sequence[Trial], config: SweepConfig, total: int) -> list[Trial]:
    """Run trials, `parallel` at a time; returns the failed ones and leaves no process behind."""
    waiting, failed, announced = list(todo), [], list[Trial]()
    finished = total - len(todo)
    running: list[_Running] = []
    threads = config.threads or max(1, (os.cpu_count() or 1) // config.parallel)
    with _sigterm_raises():
        try:
            while waiting or running:
                while waiting and len(running) < config.parallel:
                    if waiting[0] in announced and waiting[0].is_done:
                        finished += 1
                        waiting[0].write_status("done")
                        say(f"[{finished}/{total}] done {waiting.pop(0).name}", sys.stdout)
                        continue
                    child = _start(waiting[0], config.job, threads)
                    if child is None:
                        if waiting[0] not in announced:
                            announced.append(waiting[0])
                            say(f"waiting for {waiting[0].name}: {_STILL_RUNS}", sys.stdout)
                        break
                    running.append(child)
                    waiting.pop(0)
                time.sleep(_POLL)
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    finished += 1
                    if not _finish(child, f"[{finished}/{total}]"):
                        failed.append(child.trial)
        except BaseException:
            _stop(running)
            raise
    return failed


def _start(trial: Trial, job: str, threads: int) -> _Running | None:
    """Start a trial; returns None while an earlier sweep's process of it still runs."""
    job_file = trial.folder / "job.yaml"
    text = dump_yaml(trial.config)
    count = str(threads)
    environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    environment["PYTHONUNBUFFERED"] = "1"  # the log is unbuffered and in order
    with writing("output_dir", trial.folder, _RESUME_HINT):
        trial.folder.mkdir(parents=True, exist_ok=True)
        with (trial.folder / "log.txt").open("ab") as log:
            # the lock lives as long as any process has the log open, even if this one dies
            if not try_lock(log.fileno()):
                return None
            write_atomically(job_file, text)
            trial.write_status("running")
            process = subprocess.Popen(
                _command(job, job_file),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches only the sweep, which forwards it
            )
    say(f"started {trial.name}", sys.stdout)
    return _Running(trial, process, time.monotonic())


def _command(job: str, job_file: Path) -> list[str]:
    return [sys.executable, "-m", "marlhf", job, str(job_file)]


def _finish(child: _Running, count: str) -> bool:
    """Record and print the outcome of a run; returns whether it succeeded."""
    trial, code = child.trial, child.process.returncode
    seconds = round(time.monotonic() - child.started, 1)
    if child.succeeded:
        trial.write_status("done", seconds=seconds)
        say(f"{count} done {trial.name}, {seconds:.0f} s{_outcome(trial.folder)}", sys.stdout)
        return True
    error = _last_words(trial.folder / "log.txt")
    trial.write_status("failed", status=code, seconds=seconds, error=error)
    say(f"{count} FAILED {trial.name}, status {code}: {error}")
    say(f"    see {trial.folder / 'log.txt'}")
    return False


def _stop(running: Sequence[_Running]) -> None:
    """Let runs finish and save their update; kill them on a second Ctrl-C or timeout."""
    if not running:
        return
    say(f"stopping {len(running)} runs; once more kills them")
    for child in running:
        _signal(child, signal.SIGINT)
    deadline = time.monotonic() + _PATIENCE
    try:
        for child in running:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for child in running:
            _signal(child, signal.SIGKILL)
            child.process.wait()
        for child in running:
            with suppress(
                UserError
            ):  # full disk: the next start sees from its model that it is done
                child.trial.write_status("done" if child.succeeded else "stopped")


def _signal(child: _Running, number: int) -> None:
    with suppress(ProcessLookupError):  # it has just exited
        os.killpg(child.process.pid, number)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def end(number: int, _frame: Any) -> NoReturn:
        raise Stopped(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _outcome(folder: Path) -> str:
    """The last held-out score, KL and loss of a run, if it has them."""
    try:
        (run,) = read_runs([str(folder)])
    except (UserError, ValueError):
        return ""
    words = {"score": "eval_score_mean", "KL": "eval_kl_mean", "loss": "eval_loss"}
    last = {word: list(run.values(key).values())[-1:] for word, key in words.items()}
    return "".join(f", held-out {word} {value[0]:.3f}" for word, value in last.items() if value)


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = [line for line in lines if line.strip()] or ["nothing was printed"]
    return one_line(last[-1].removeprefix("marlhf: "))
