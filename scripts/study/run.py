"""The runs of a task of the study, one phase after another.

    python scripts/study/run.py configs/study/summaries.yaml --phase all --parallel 2

search      every arm at every learning rate, on seeds of their own, with the KL coefficient steered
            so that all end at the KL of token PPO, where the task asks for equal KL; left out where
            the task has one learning rate alone
calibrate   token PPO for its final KL (the search has it where both have the same seeds), and for
            each other arm the fixed KL coefficient with which it ends within 7% of that, on seeds
            that are not reported; left out where the task has no seeds for it
final       every arm with what was chosen, on the seeds that are reported; one that ends more than
            10% off token PPO's KL there gets other coefficients (sweeps `reported-1`, ...)

Every phase is a `marlhf sweep` below runs/study/TASK; started again, it resumes where it stopped.
What was chosen is kept in runs/study/TASK/chosen.json. `--arms` takes a part of the arms (token PPO
comes first wherever it is needed), `--seeds` other seeds for the final runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from marlhf.views.report.runs import Run, read_runs

TOKEN = "token"
LAST = 5  # evaluations that a final score or KL is averaged over
NEAR = 2.0  # factor from the target KL: a learning rate that ends further off is out
OFF = 0.1  # of token PPO's KL: what an arm reaches further off is no evidence
WITHIN = 0.07  # of it in the calibration: the reported seeds add their own noise
ROUNDS = 5  # of the calibration at one learning rate, and on the reported seeds

Chosen = dict[str, dict[str, float]]


def main() -> None:
    """Run the phases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", type=Path, help="a file such as configs/study/summaries.yaml")
    parser.add_argument("--phase", choices=["search", "calibrate", "final", "all"], default="all")
    parser.add_argument("--arms", nargs="+", help="some of the arms")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the final runs")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("overrides", nargs="*", help="keys for all runs, such as steps=20")
    args = parser.parse_intermixed_args()
    task = Task(args)
    unknown = [name for name in task.arms if name not in task.chosen]
    if unknown and args.phase in ("calibrate", "final"):
        parser.error(
            f"{task.chosen_file} has no learning rate of {unknown[0]!r}: --phase search first"
        )
    if args.phase in ("search", "all"):
        task.search()
    if args.phase in ("calibrate", "all") and task.settings["equal_kl"]:
        task.calibrate()
    if args.phase in ("final", "all"):
        task.final()


class Task:
    """A task's arms, and what was chosen for them so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.settings: dict[str, Any] = yaml.safe_load(args.task.read_text(encoding="utf-8"))
        self.folder: Path = args.out / args.task.stem
        self.parallel: int = args.parallel
        self.threads: int = args.threads
        self.seeds: list[int] = args.seeds or self.settings["seeds"]
        overrides = dict(word.split("=", 1) for word in args.overrides)
        self.overrides = {key: yaml.safe_load(value) for key, value in overrides.items()}
        arms = self.settings["arms"]
        names = [TOKEN, *(args.arms or arms)]
        if unknown := [name for name in names if name not in arms]:
            raise SystemExit(f"{args.task} has no arm {unknown[0]!r}: {', '.join(arms)}")
        self.arms = {name: arms[name] for name in dict.fromkeys(names)}
        self.chosen_file = self.folder / "chosen.json"
        text = self.chosen_file.read_text() if self.chosen_file.exists() else "{}"
        self.chosen: Chosen = json.loads(text)

    def search(self) -> None:
        """Choose the learning rate of each arm, that of token PPO first."""
        if len(self.settings["learning_rates"]) == 1:
            (rate,) = self.settings["learning_rates"]
            self.chosen |= {name: {"learning_rate": rate} for name in self.arms}
            return self._keep()
        self._search({TOKEN: self.arms[TOKEN]})
        others = {name: keys for name, keys in self.arms.items() if name != TOKEN}
        if self.settings["equal_kl"]:
            others = {name: {**keys, **self._kl_target()} for name, keys in others.items()}
        return self._search(others)

    def _kl_target(self) -> dict[str, Any]:
        """Keys that adapt the KL to token PPO's; none in a task without a horizon."""
        horizon = self.settings["horizon"]
        return {"kl.target": self.chosen[TOKEN]["kl"], "kl.horizon": horizon} if horizon else {}

    def _search(self, arms: Mapping[str, dict[str, Any]]) -> None:
        rates = {"optimizer.learning_rate": self.settings["learning_rates"]}
        runs = self._sweep("search", arms, self.settings["search_seeds"], rates)
        for name in arms:
            tried = by_rate(runs, name)
            target = self.chosen.get(TOKEN, {}).get("kl") if name != TOKEN else None
            best = choose(tried, target)
            coefs = [
                row.get("kl_coef", run.config["kl"]["coef"])
                for run in tried[best]
                for row in run.rows[-20:]
                if row["step"]
            ]
            coef = sum(coefs) / len(coefs)
            self.chosen[name] = {"learning_rate": best, "searched_coef": coef, "coef": coef}
            if self.settings["equal_kl"]:
                kl = mean(tried[best], "eval_kl_mean")
                if target and not self.settings["horizon"]:  # it was not adapted to the target
                    coef = next_coefficient([(coef, kl)], target)
                self.chosen[name] |= {"kl": kl, "searched_coef": coef, "coef": coef}
            self._keep()

    def calibrate(self) -> None:
        """Choose the KL coefficient of each arm.

        An arm that no coefficient brings to token PPO's KL tries the next smaller learning rate. In
        a task without calibration seeds, the reported seeds decide. Started again, it takes the
        same steps, and skips those that are done.
        """
        seeds, token = self.settings["calibration_seeds"], self.chosen[TOKEN]
        left = [name for name in self.arms if name != TOKEN]
        if seeds:
            self._aim(self._token_runs())
        for name in left:
            chosen = self.chosen[name]
            chosen["learning_rate"] = chosen.get("searched_rate", chosen["learning_rate"])
            chosen["coef"] = chosen.get("searched_coef", token.get("coef"))
        first = 1
        while left and seeds:
            tried = self._steps("calibrate", first, left, seeds, WITHIN)
            far = (1 + OFF) * token["kl"]
            left = [n for n in left if min(kl for _, kl in tried[n]) > far and self._slow_down(n)]
            first += ROUNDS
        for name in self.arms.keys() - {TOKEN}:
            self.chosen[name]["calibrated_coef"] = self.chosen[name]["coef"]
        self._keep()

    def _token_runs(self) -> list[Run]:
        """Token PPO at its learning rate, on the seeds of the calibration."""
        seeds, rates = self.settings["calibration_seeds"], self.settings["learning_rates"]
        if len(rates) > 1 and seeds == self.settings["search_seeds"]:
            rate = self.chosen[TOKEN]["learning_rate"]
            return by_rate(read_runs([str(self.folder / "search")]), TOKEN)[rate]
        return self._token_sweep("calibrate-0", seeds)

    def _token_sweep(self, phase: str, seeds: Sequence[int]) -> list[Run]:
        rate = {"optimizer.learning_rate": self.chosen[TOKEN]["learning_rate"]}
        return self._sweep(phase, {TOKEN: self.arms[TOKEN] | rate}, seeds)

    def _aim(self, token: Sequence[Run]) -> None:
        """Make the KL of these runs of token PPO the target of the other arms."""
        kl, coef = mean(token, "eval_kl_mean"), token[0].config["kl"]["coef"]
        self.chosen[TOKEN] |= {"kl": kl, "coef": coef}

    def _steps(
        self, phase: str, first: int, names: Sequence[str], seeds: Sequence[int], within: float
    ) -> dict[str, list[tuple[float, float]]]:
        """Adapt coefficients until each arm's KL is `within` a share of token PPO's.

        Interpolates log KL over log coefficient, in sweeps numbered from `first`. Returns the
        coefficients tried, each with its KL.
        """
        target = self.chosen[TOKEN]["kl"]
        tried: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for number in range(first, first + ROUNDS):
            left = [n for n in names if not tried[n] or abs(tried[n][-1][1] / target - 1) > within]
            if not left:
                break
            arms = {name: {**self.arms[name], **self._settings(name)} for name in left}
            runs = self._sweep(f"{phase}-{number}", arms, seeds)
            for name in left:
                kl = mean([run for run in runs if run.arm == name], "eval_kl_mean")
                tried[name].append((self.chosen[name]["coef"], kl))
                self.chosen[name]["kl"] = kl
                if abs(kl / target - 1) > within:
                    self.chosen[name]["coef"] = next_coefficient(tried[name], target)
            self._keep()
        return tried

    def _slow_down(self, name: str) -> bool:
        """Take the next smaller learning rate, and token PPO's coefficient, if there is one."""
        chosen = self.chosen[name]
        smaller = [r for r in self.settings["learning_rates"] if r < chosen["learning_rate"]]
        if smaller:
            chosen.setdefault("searched_rate", chosen["learning_rate"])
            chosen |= {"learning_rate": max(smaller), "coef": self.chosen[TOKEN]["coef"]}
        return bool(smaller)

    def final(self) -> None:
        """The runs that are reported."""
        if self.settings["equal_kl"]:
            self._settle()
        arms = {name: {**keys, **self._settings(name)} for name, keys in self.arms.items()}
        self._sweep("final", arms, self.seeds)

    def _settle(self) -> None:
        """Bring the reported seeds to equal KL.

        An arm whose calibrated coefficient ends too far from token PPO tries others on these seeds,
        and keeps the nearest.
        """
        self._aim(self._token_sweep("reported-0", self.seeds))
        others = [name for name in self.arms if name != TOKEN]
        for name in others:
            self.chosen[name]["coef"] = self.chosen[name]["calibrated_coef"]
        target = self.chosen[TOKEN]["kl"]
        for name, tried in self._steps("reported", 1, others, self.seeds, OFF).items():
            coef, kl = min(tried, key=lambda pair: abs(pair[1] - target))
            self.chosen[name] |= {"coef": coef, "kl": kl}
        self._keep()
        for phase in self.folder.glob("reported-*/"):
            self._take_over(phase)

    def _take_over(self, phase: Path) -> None:
        """Runs that had what was chosen are final ones, which the sweep then finds done."""
        for run in read_runs([str(phase)]):
            if run.arm not in self.arms or run.config["seed"] not in self.seeds:
                continue
            had = {"optimizer.learning_rate": run.config["optimizer"]["learning_rate"]}
            had["kl.coef"] = run.config["kl"]["coef"]
            target = self.folder / "final" / run.path.relative_to(phase.resolve())
            if had == self._settings(run.arm) and not target.exists():
                shutil.copytree(run.path, target, copy_function=os.link)

    def _settings(self, name: str) -> dict[str, Any]:
        chosen = self.chosen[name]
        rate = {"optimizer.learning_rate": chosen["learning_rate"]}
        return rate | ({"kl.coef": chosen["coef"]} if self.settings["equal_kl"] else {})

    def _keep(self) -> None:
        partial = self.chosen_file.with_suffix(".partial")
        partial.write_text(json.dumps(self.chosen, indent=1) + "\n")
        partial.replace(self.chosen_file)

    def _sweep(
        self,
        phase: str,
        arms: Mapping[str, dict[str, Any]],
        seeds: Sequence[int],
        grid: Mapping[str, Sequence[Any]] | None = None,
    ) -> list[Run]:
        """Run a sweep to its end, and read its runs."""
        folder = self.folder / phase
        folder.mkdir(parents=True, exist_ok=True)
        sweep = {
            "config": self.settings["config"],
            "overrides": self.overrides,
            "arms": dict(arms),
            "grid": dict(grid or {}),
            "seeds": list(seeds),
            "parallel": self.parallel,
            "threads": self.threads,
            "output_dir": str(folder),
        }
        file = self.folder / f"{phase}.yaml"
        file.write_text(yaml.safe_dump(sweep, sort_keys=False))
        marlhf("sweep", str(file))
        return [run for run in read_runs([str(folder)]) if run.config["seed"] in seeds]


def marlhf(*words: str) -> None:
    """Run a command of marlhf, which may import the tasks' rewards from this folder."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-m", "marlhf", *words], check=True, env=environment)


def by_rate(runs: Sequence[Run], arm: str) -> dict[float, list[Run]]:
    """An arm's runs of the search by learning rate; a sweep names them by both."""
    runs_by_rate: dict[float, list[Run]] = {}
    for run in runs:
        if (run.arm or "").startswith(f"{arm}, optimizer."):
            runs_by_rate.setdefault(run.config["optimizer"]["learning_rate"], []).append(run)
    return runs_by_rate


def mean(runs: Sequence[Run], metric: str) -> float:
    """Mean over runs of a held-out metric's last values."""
    by_run = [[row[metric] for row in run.rows if row.get(metric) is not None] for run in runs]
    last = [value for values in by_run for value in values[-LAST:]]
    return sum(last) / len(last)


def choose(tried: Mapping[float, Sequence[Run]], target: float | None) -> float:
    """The learning rate with the highest last held-out score less KL penalty.

    The penalty has the configuration's coefficient. With a KL target, only rates that ended near it
    count, if there are any.
    """
    scores = {rate: mean(runs, "eval_score_mean") for rate, runs in tried.items()}
    coef = next(iter(tried.values()))[0].config["kl"]["coef"]
    kls = {rate: mean(runs, "eval_kl_mean") if coef else 0.0 for rate, runs in tried.items()}
    near = list(scores)
    if coef and target is not None:
        # an estimate may be negative, and has a logarithm here
        off = {rate: abs(math.log(max(kl / target, 0.01))) for rate, kl in kls.items()}
        near = [rate for rate in near if off[rate] <= math.log(NEAR)]
        near = near or [min(off, key=off.__getitem__)]
    return max(near, key=lambda rate: scores[rate] - coef * kls[rate])


def next_coefficient(tried: Sequence[tuple[float, float]], target: float) -> float:
    """The coefficient for a target KL, if log KL is linear in log coefficient.

    The line goes through the last two coefficients tried, or has slope -1 through one.
    """
    # an estimate may be negative, and has a logarithm here
    last = [(coef, max(kl, 0.01 * target)) for coef, kl in tried[-2:]]
    (c1, k1), slope = last[-1], -1.0
    if len(last) > 1:
        c0, k0 = last[0]
        if c0 != c1 and k0 != k1:
            slope = min(-0.2, max(-3.0, math.log(k1 / k0) / math.log(c1 / c0)))
    return c1 * (target / k1) ** (1 / slope)


if __name__ == "__main__":
    main()
