"""Pack the raw metrics of a task of the study into one compressed file.

    python scripts/study/pack.py configs/study/recall.yaml     # -> docs/study/recall.jsonl.xz

With `--add` the file keeps what it has, and gets the arms that it lacks.

The first line is the task: its file, what was chosen, how many threads a run had, and what
gradient_noise.py and gradient_shares.py measured. Every other line is a run: its phase, arm, seed
and configuration, the seconds it took, and its metrics as columns, six digits each: all that
analyse.py reads. Of runs of the search and of the calibration only the evaluations are kept.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from marlhf.views.report.runs import MetricsRow, Run, read_runs

EVALUATED = ["eval_score_mean", "eval_kl_mean"]
KEPT = [
    *EVALUATED,
    "score_mean",
    "kl_mean",
    "entropy",
    "response_length_mean",
    "macro_length_mean",
    "advantage_std",
    "explained_variance",
    "value_loss",
    "grad_norm_policy",
    "clip_fraction",
    "step_seconds",
]


@dataclass(frozen=True)
class Trial:
    """A run of a phase: `search`, `calibrate-0`, ..., `reported-0`, ... or `final`.

    seconds   from its start to its end, evaluations and all; None where it was taken up again
    """

    phase: str
    run: Run
    seconds: float | None

    @property
    def arm(self) -> str:
        """The name of the arm; a sweep's search adds the learning rate to it."""
        return (self.run.arm or "").partition(", optimizer.")[0]


@dataclass(frozen=True)
class Study:
    """A task's runs.

    settings   what its file says
    chosen     learning rate and KL coefficient of each arm
    threads    CPU threads that each run had
    gradient   what gradient_noise.py measured, by arm
    shares     what gradient_shares.py measured, empty where it did not
    """

    task: str
    settings: dict[str, Any]
    chosen: dict[str, dict[str, float]]
    threads: int
    gradient: dict[str, dict[str, Any]]
    shares: dict[str, Any]
    trials: list[Trial]

    def runs(self, phase: str, arm: str) -> list[Run]:
        """The runs of an arm in a phase."""
        return [t.run for t in self.trials if t.phase == phase and t.run.arm == arm]


def main() -> None:
    """Pack the runs of tasks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", type=Path, help="files such as configs/study/x.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="--out of run.py")
    parser.add_argument("--docs", type=Path, default=Path("docs/study"))
    parser.add_argument("--add", action="store_true", help="only arms that the file lacks")
    args = parser.parse_args()
    args.docs.mkdir(parents=True, exist_ok=True)
    for file in args.tasks:
        path = args.docs / f"{file.stem}.jsonl.xz"
        study = collect(file, args.runs / file.stem)
        if args.add:
            study = together(read(path), study)
        write(study, path)
        print(f"{len(study.trials)} runs in {path}, {path.stat().st_size / 1e6:.2f} MB")


def collect(file: Path, folder: Path) -> Study:
    """A task's runs as `run.py` left them; failed ones are left out and named."""
    tries = [p for kind in ("calibrate", "reported") for p in sorted(folder.glob(f"{kind}-*/"))]
    phases = [folder / "search", *tries, folder / "final"]
    trials = [trial for phase in phases if phase.is_dir() for trial in _trials(phase)]
    final = [_identity(trial) for trial in trials if trial.phase == "final"]
    trials = [t for t in trials if t.phase == "final" or _identity(t) not in final]
    sweep = yaml.safe_load((folder / "final.yaml").read_text(encoding="utf-8"))
    return Study(
        task=file.stem,
        settings=yaml.safe_load(file.read_text(encoding="utf-8")),
        chosen=_read_json(folder / "chosen.json"),
        threads=sweep["threads"],
        gradient=_read_json(folder / "gradient.json"),
        shares=_read_json(folder / "shares.json"),
        trials=trials,
    )


def together(old: Study, new: Study) -> Study:
    """A study with the arms of both; where they have the same, the old one's runs."""
    arms = {trial.arm for trial in old.trials}
    return replace(
        old,
        settings=new.settings,
        chosen={**new.chosen, **old.chosen},
        gradient={**new.gradient, **old.gradient},
        trials=[*old.trials, *(trial for trial in new.trials if trial.arm not in arms)],
    )


def _trials(phase: Path) -> list[Trial]:
    trials = []
    for run in read_runs([str(phase)]):
        status = yaml.safe_load((run.path / "sweep.yaml").read_text(encoding="utf-8"))
        if status["state"] != "done":
            print(f"{run.path}: left out, it is {status['state']}")
            continue
        trials.append(Trial(phase.name, run, status.get("seconds")))
    return trials


def _identity(trial: Trial) -> tuple[str | None, Any]:
    """What makes a run the same in two phases: the final one takes over what it can."""
    return trial.run.arm, _without_folders(trial.run.config)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# --- the file


def write(study: Study, path: Path) -> None:
    """The same study gives the same bytes."""
    head = {
        "task": study.task,
        "settings": study.settings,
        "chosen": study.chosen,
        "threads": study.threads,
        "gradient": study.gradient,
        "shares": study.shares,
    }
    lines = [head, *map(_packed, study.trials)]
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    path.write_bytes(lzma.compress(text.encode(), preset=9))


def read(path: Path) -> Study:
    """What `write` wrote."""
    head, *lines = map(json.loads, lzma.decompress(path.read_bytes()).decode().splitlines())
    return Study(**head, trials=[_unpacked(line) for line in lines])


def _packed(trial: Trial) -> dict[str, Any]:
    run, keys = trial.run, KEPT if trial.phase == "final" else EVALUATED
    rows = [row for row in run.rows if any(row.get(key) is not None for key in keys)]
    columns = {key: [_short(row.get(key)) for row in rows] for key in keys}
    return {
        "phase": trial.phase,
        "arm": run.arm,
        "seconds": trial.seconds,
        "config": _without_folders(run.config),
        "step": [row["step"] for row in rows],
        "columns": {key: column for key, column in columns.items() if set(column) != {None}},
    }


def _unpacked(line: Mapping[str, Any]) -> Trial:
    columns: Mapping[str, Sequence[Any]] = line["columns"]
    rows: list[MetricsRow] = [
        {"step": step} | {key: column[i] for key, column in columns.items()}
        for i, step in enumerate(line["step"])
    ]
    name = f"{line['phase']}/{line['arm']}/seed-{line['config']['seed']}"
    run = Run(name, Path(name), line["config"], rows, samples=[], arm=line["arm"])
    return Trial(line["phase"], run, line["seconds"])


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _without_folders(config: Any) -> Any:
    """A configuration without `output_dir`, and with the last part alone of absolute paths: where
    somebody keeps their files is nobody's business."""
    if isinstance(config, Mapping):
        return {k: _without_folders(v) for k, v in config.items() if k != "output_dir"}
    if isinstance(config, list):
        return [_without_folders(v) for v in config]
    if isinstance(config, str) and Path(config).is_absolute():
        return Path(config).name
    return config


if __name__ == "__main__":
    main()
