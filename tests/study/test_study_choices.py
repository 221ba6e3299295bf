"""What the study's runs are made with: the choice of learning rates and KL coefficients."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from support.study import write_trial

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "study"))

import pack
import run


class FakeTask(run.Task):
    """Runs cost nothing: a held-out KL is what a power law makes of the coefficient. `slower` are
    the laws of other learning rates than the one chosen."""

    slower: ClassVar[dict[tuple[str, float], tuple[float, float]]] = {}

    def __init__(self, folder: Path, laws: dict[str, tuple[float, float]]) -> None:
        self.laws = laws
        self.asked: list[tuple[str, str, float]] = []
        file = folder / "toy.yaml"
        seeds = {"seeds": [0], "search_seeds": [6], "calibration_seeds": [7, 8]}
        settings: dict[str, Any] = {**seeds, "equal_kl": True, "learning_rates": [1e-3]}
        settings["arms"] = {name: {} for name in laws}
        file.write_text(yaml.safe_dump({**settings, "config": "none.yaml"}))
        options = {"task": file, "arms": None, "seeds": None, "parallel": 1, "threads": 1}
        super().__init__(argparse.Namespace(**options, out=folder, overrides=[]))
        self.folder.mkdir(exist_ok=True)

    def _sweep(self, phase: str, arms: Any, seeds: Any, grid: Any = None) -> list[Any]:
        found = []
        for name, keys in arms.items():
            coef = keys.get("kl.coef", 0.1)
            self.asked.append((phase, name, coef))
            for rate in (grid or {}).get("optimizer.learning_rate", [None]):
                rate = rate or keys.get("optimizer.learning_rate")
                label = f"{name}, optimizer.learning_rate={rate}" if grid else name
                scale, power = self.slower.get((name, rate), self.laws[name])
                config = {"kl": {"coef": coef}, "optimizer": {"learning_rate": rate}}
                for factor in (0.9, 1.1):  # seeds differ
                    kl = factor * scale * coef**power
                    row = {"eval_kl_mean": kl, "eval_score_mean": 0.0}
                    evaluated = [{"step": 2 * i, **row} for i in range(6)]
                    found.append(run.Run(label, Path(name), config, evaluated, [], arm=label))
        return found


LAWS = {"token": (0.1, -1.0), "same": (0.1, -1.0), "loose": (0.5, -0.6), "tight": (0.02, -1.4)}


def test_calibration_ends_at_token_ppos_kl(tmp_path):
    task = FakeTask(tmp_path, LAWS)
    task.search()  # one learning rate: nothing to run
    assert not task.asked
    task.calibrate()
    for name in ("same", "loose", "tight"):
        scale, power = LAWS[name]
        assert abs(scale * task.chosen[name]["coef"] ** power - 1.0) <= run.WITHIN
    assert [asked for asked in task.asked if asked[1] == "token"] == [("calibrate-0", "token", 0.1)]
    assert task.chosen["token"]["kl"] == pytest.approx(1.0)
    assert sum(name == "same" for _, name, _ in task.asked) == 1  # right at once

    # started again, with what a stop in the middle left behind: the same steps
    again = FakeTask(tmp_path, LAWS)
    again.chosen = {name: {**found, "coef": 123.0} for name, found in task.chosen.items()}
    again.calibrate()
    assert again.asked == task.asked
    assert again.chosen["tight"] == task.chosen["tight"]


def test_reported_seeds_that_end_elsewhere_step_on(tmp_path):
    """The KL of `stuck` hardly follows its coefficient, and comes no nearer than 1.3 to 1."""
    task = FakeTask(tmp_path, {**LAWS, "stuck": (1.4, -0.02)})
    task.settings["calibration_seeds"] = []
    task.chosen = {name: {"learning_rate": 1e-3, "searched_coef": 0.1} for name in task.laws}
    task.calibrate()
    assert not task.asked
    task.final()
    for name in task.chosen.keys() - {"token"}:
        tried = [coef for phase, arm, coef in task.asked if arm == name and phase != "final"]
        kls = [task.laws[name][0] * coef ** task.laws[name][1] for coef in tried]
        best = min(zip(kls, tried, strict=True), key=lambda pair: abs(pair[0] - 1))
        assert (task.chosen[name]["kl"], task.chosen[name]["coef"]) == pytest.approx(best)
        assert (abs(best[0] - 1) <= run.OFF) == (name != "stuck")
        assert task.asked[-len(task.laws) :].count(("final", name, task.chosen[name]["coef"])) == 1

    # started again, with what was settled: the same steps
    again = FakeTask(tmp_path, task.laws)
    again.chosen = task.chosen
    again.final()
    assert again.asked == task.asked


def test_the_final_runs_are_those_of_the_sweeps_before(tmp_path):
    task = FakeTask(tmp_path, {"token": (0.1, -1.0), "fast": (0.1, -1.0)})
    task.seeds = [0, 1, 2]
    settings = {"learning_rate": 0.1, "coef": 0.05, "calibrated_coef": 0.05}
    task.chosen = {name: dict(settings) for name in task.laws}
    for arm, seeds in {"token": (0, 1, 2, 3), "fast": (0, 1, 2)}.items():
        for seed in seeds:  # 3 is not reported
            write_trial(task.folder / "reported-0" / arm / f"seed-{seed}", arm, arm, seed)
    task.chosen["fast"]["coef"] = 0.06  # not the one that was tried
    for _ in range(2):  # taken over once, they are there
        task._take_over(task.folder / "reported-0")
        found = [file.parent for file in (task.folder / "final").rglob("metrics.jsonl")]
        assert sorted(f"{f.parent.name}/{f.name}" for f in found) == [
            f"token/seed-{seed}" for seed in range(3)
        ]

    # and each counts once: three of token's are final, its seed 3 and those of fast are not
    (task.folder / "final.yaml").write_text("threads: 1\n")
    trials = pack.collect(tmp_path / "toy.yaml", task.folder).trials
    counts = Counter((trial.phase, trial.run.arm) for trial in trials)
    assert counts == {("final", "token"): 3, ("reported-0", "token"): 1, ("reported-0", "fast"): 3}


def test_a_task_without_a_horizon_is_not_steered(tmp_path):
    task = FakeTask(tmp_path, LAWS)
    task.chosen = {"token": {"kl": 2.0}}
    task.settings["horizon"] = 48
    assert task._kl_target() == {"kl.target": 2.0, "kl.horizon": 48}
    task.settings["horizon"] = None
    assert task._kl_target() == {}


def test_an_arm_that_was_not_steered_begins_with_what_its_searched_kl_asks_for(tmp_path):
    """At a coefficient of 0.1 token PPO's KL is 1, that of `loose` 0.5 * 0.1**-0.6 = 1.99."""
    task = FakeTask(tmp_path, LAWS)
    task.settings |= {"learning_rates": [1e-4, 1e-3], "horizon": None}
    task.search()
    assert task.chosen["token"]["searched_coef"] == pytest.approx(0.1)
    assert task.chosen["loose"]["kl"] == pytest.approx(1.99, abs=0.01)
    assert task.chosen["loose"]["searched_coef"] == pytest.approx(0.199, abs=0.001)
    task.settings["horizon"] = 48
    task.search()
    assert task.chosen["loose"]["searched_coef"] == pytest.approx(0.1)


def test_the_search_has_token_ppos_kl_where_the_seeds_are_the_same(tmp_path):
    task = FakeTask(tmp_path, LAWS)
    task.settings |= {"learning_rates": [0.1, 0.2], "search_seeds": [7, 8]}
    for seed in (7, 8):
        folder = task.folder / "search" / f"token-{seed}"
        write_trial(folder, "token, optimizer.learning_rate=0.1", "token", seed)
    task.chosen = {name: {"learning_rate": 0.1} for name in LAWS}
    task.calibrate()
    assert not [asked for asked in task.asked if asked[1] == "token"]
    assert task.chosen["token"] == {"learning_rate": 0.1, "kl": pytest.approx(2.075), "coef": 0.05}
    task.settings["search_seeds"] = [7]
    task.calibrate()
    assert [asked for asked in task.asked if asked[1] == "token"] == [("calibrate-0", "token", 0.1)]


def test_an_arm_that_stays_too_far_tries_smaller_learning_rates(tmp_path, monkeypatch):
    """At 1e-3 the KL of `stuck` is 3 whatever the coefficient, that of `never` at 1e-4 as well."""
    stuck, fine = (3.0, 0.0), (0.1, -1.0)
    laws = {"token": fine, "stuck": stuck, "never": stuck, "fine": fine}
    monkeypatch.setattr(FakeTask, "slower", {("stuck", 1e-4): (0.4, -1.0)})

    def calibrated() -> FakeTask:
        task = FakeTask(tmp_path, laws)
        task.search()
        task.settings["learning_rates"] = [1e-5, 1e-4, 1e-3]
        return task

    task = calibrated()
    task.calibrate()
    rates = {name: found["learning_rate"] for name, found in task.chosen.items()}
    assert rates == {"token": 1e-3, "stuck": 1e-4, "never": 1e-5, "fine": 1e-3}
    assert 0.4 / task.chosen["stuck"]["coef"] == pytest.approx(1.0, rel=run.WITHIN)
    phases = [phase for phase, name, _ in task.asked if name == "stuck"]
    assert phases[:6] == [f"calibrate-{i}" for i in range(1, 7)]

    # started again: the same steps from the same learning rates
    again = calibrated()
    again.chosen = task.chosen
    again.calibrate()
    assert again.asked == task.asked


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--phase", "final"], "has no learning rate of 'token': --phase search first"),
        (["--arms", "five"], "has no arm 'five': fast, token"),
    ],
)
def test_what_cannot_be_run_is_named(tmp_path, words, line):
    task = tmp_path / "toy.yaml"
    task.write_text(yaml.safe_dump({"seeds": [0], "arms": {"token": {}, "fast": {}}}))
    script = [sys.executable, run.__file__, str(task), "--out", str(tmp_path), *words]
    ended = subprocess.run(script, capture_output=True, text=True)
    assert ended.returncode != 0
    assert line in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_choice_of_a_learning_rate():
    def runs(score: float, kl: float, coef: float = 0.2) -> list[run.Run]:
        rows = [{"step": i, "eval_score_mean": score, "eval_kl_mean": kl} for i in range(6)]
        return [run.Run("x", Path("x"), {"kl": {"coef": coef}}, rows, [], arm="x")]

    by_rate = {1e-4: runs(0.0, 2.0), 1e-3: runs(1.0, 5.0), 1e-2: runs(2.1, 11.0)}
    assert run.choose(by_rate, None) == 1e-3  # less 0.2 * KL: -0.4, 0 and -0.1
    assert run.choose(by_rate, 10.0) == 1e-3  # which ended at half the target
    assert run.choose(by_rate, 10.5) == 1e-2  # less than half cannot be brought there
    assert run.choose(by_rate, 2.4) == 1e-4  # and neither can more than twice as much
    assert run.choose(by_rate, 0.1) == 1e-4  # none is near: the nearest
    assert run.choose({1e-3: runs(1.0, -0.1)}, 1.0) == 1e-3  # an estimate may be negative
    assert run.choose({1e-3: runs(1.0, -0.1)}, None) == 1e-3
    assert run.choose({1e-3: runs(1.0, 9.0, 0.0), 1e-2: runs(2.0, 99.0, 0.0)}, None) == 1e-2


def test_the_next_coefficient_follows_the_last_two():
    assert run.next_coefficient([(0.1, 2.0)], 1.0) == pytest.approx(0.2)
    # KL = coef^-0.5
    tried = [(1.0, 1.0), (4.0, 0.5)]
    assert run.next_coefficient(tried, 0.25) == pytest.approx(16.0)
