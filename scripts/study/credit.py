"""Is the credit right, and does the truest credit learn soonest? Audits of a task's arms.

    python scripts/study/credit.py audit configs/study/recall.yaml
    python scripts/study/credit.py page

`audit` has `marlhf audit` judge every arm of the task on the policy and critic of one, a seed after
the other; what is there is not made again. The task's file describes that run under `audit`: as
keys, with which it is trained and stopped after some updates, or as one of the task's own arms,
whose checkpoint after so many updates is taken. Arms that differ from another in the optimiser's
steps alone have the same credit and are left out. The figures go to docs/study/TASK_credit.json.

`page` reads these, and what analyse.py found of the training runs (docs/study/TASK.json), and
writes tables and figures into docs/credit.md, between the markers `<!-- results: TASK -->`.

Spearman's correlation over arms relates each number of the audits to updates to parity; never
counts as last. Its interval comes from resampling arms, of which there are few.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from analyse import fill
from analyse import table as markdown_table
from run import marlhf

from marlhf.config import PPOConfig
from marlhf.config.loading import load_config
from marlhf.credit.agreement import correlation, ranks
from marlhf.views.charts import number
from marlhf.views.report.document import mean
from marlhf.views.report.groups import Mean
from marlhf.views.report.png import new_figure, save
from marlhf.views.report.runs import read_runs

SECTIONS = ("segmenter", "macro.", "ppo.", "kl.")  # of keys that credit is made of
STEPS = ("ppo.epochs", "ppo.minibatches", "macro.ratio")  # of which the optimiser's steps are made
AMOUNTS = ("prompts", "responses", "continuations", "places")  # of an audit
RESAMPLES = 2000
FEWEST = 6  # arms for a correlation over them, and a figure
FOLDER = "study"  # of the figures, below the page's
MEASURES = {
    "rank": "rank agreement at the arm's own boundaries",
    "finest": "rank agreement between the boundaries of all arms",
    "signal": "signal to noise of a prompt's gradient",
}


def main() -> None:
    """Audit a task, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["audit", "page"])
    parser.add_argument("tasks", nargs="*", type=Path, help="files such as configs/study/x.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    if args.what == "page":
        write_page(args.docs)
        return
    for file in args.tasks:
        audits = audit(file, args.out / file.stem)
        target = args.docs / "study" / f"{file.stem}_credit.json"
        target.write_text(json.dumps(audits, indent=1) + "\n", encoding="utf-8")
        print(target)


# --- audits


def audit(file: Path, folder: Path) -> dict[str, Any]:
    """The audits of a task, a seed after the other."""
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    plan = settings["audit"]
    if "run" in plan:
        plan["arm"] = settings["arms"][plan["run"]]
    usual = load_config(PPOConfig, Path(settings["config"]))
    undone = {key: value_of(usual, key) for key in plan["arm"]}
    arms: dict[str, str] = {}
    for name, keys in audited_arms(settings["arms"]).items():
        has_critic = "ppo.estimator" not in keys  # the others refuse a lambda
        arms.setdefault(text_of({**undone, **keys} if has_critic else keys), name)
    seeds = []
    for seed in plan["seeds"]:
        of_seed = folder / "credit" / f"seed-{seed}"
        if "run" in plan:
            run = run_of(folder / "final", plan["run"], seed)
        else:
            run = of_seed
            train(Path(settings["config"]), plan, seed, run)
        words = [f"--{key}={plan[key]}" for key in AMOUNTS if key in plan]
        words += [word for text in arms for word in ("--arm", text)]
        output = of_seed / "audit"
        checkpoint = f"--checkpoint=step-{plan['updates']}"
        marlhf("audit", str(run), *words, checkpoint, f"--output={output}")
        audited = json.loads((output / "audit.json").read_text(encoding="utf-8"))
        by_name = {arms[arm["label"]]: arm for arm in audited["arms"] if arm["label"] in arms}
        kept = {key: audited[key] for key in ("critic", "by_position", "truth")}
        seeds.append({"seed": seed, **kept, "arms": by_name})
    return {"task": file.stem, "plan": plan, "seeds": seeds}


def audited_arms(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The keys of each arm that its credit is made of; arms with keys of steps are left out."""
    return {
        name: {key: value for key, value in keys.items() if key.startswith(SECTIONS)}
        for name, keys in arms.items()
        if not any(key in STEPS for key in keys)
    }


def value_of(config: PPOConfig, key: str) -> Any:
    """The value of a key such as `ppo.lam`: an arm that does not set it has the configuration's."""
    return functools.reduce(getattr, key.split("."), config)


def text_of(keys: Mapping[str, Any]) -> str:
    """Keys of an arm as `--arm` takes them."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in keys.items())


def run_of(folder: Path, arm: str, seed: int) -> Path:
    """The folder of a run of the study."""
    (run,) = [r for r in read_runs([str(folder)]) if (r.arm, r.config["seed"]) == (arm, seed)]
    return run.path


def train(config: Path, plan: Mapping[str, Any], seed: int, run: Path) -> None:
    """The run whose policy and critic are audited."""
    steps = plan["updates"]
    keys = {**plan["arm"], "seed": seed, "steps": steps, "checkpoint.every": steps}
    words = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    marlhf("ppo", str(config), *words, f"output_dir={run}", "resume=auto")


# --- the page


def write_page(docs: Path) -> None:
    """Tables and figures of all audited tasks."""
    page = docs / "credit.md"
    for file in sorted((docs / "study").glob("*_credit.json")):
        audits = json.loads(file.read_text(encoding="utf-8"))
        trained = json.loads((docs / "study" / f"{audits['task']}.json").read_text())
        rows = rows_of(audits, trained["arms"])
        if len(rows) >= FEWEST:
            draw(rows, docs / "study" / f"{audits['task']}_credit.png")
        text = fill(page.read_text(encoding="utf-8"), audits["task"], markdown(audits, rows))
        page.write_text(text, encoding="utf-8")


def rows_of(
    audits: Mapping[str, Any], trained: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """An arm's numbers: means over seeds of the audits, and what its training runs did."""
    of_training = {arm["name"]: arm for arm in trained}
    rows = []
    for name in audits["seeds"][0]["arms"]:
        of_seeds = [seed["arms"][name] for seed in audits["seeds"]]
        run = of_training.get(name)
        rows.append(
            {
                "name": name,
                "rank": over_seeds([arm["rank"]["corrected"] for arm in of_seeds]),
                "finest": over_seeds([arm["finest"]["corrected"] for arm in of_seeds]),
                "signal": over_seeds([arm["gradient"]["signal_to_noise"] for arm in of_seeds]),
                "updates": None if run is None else as_number(run["updates"]["median"]),
                "reward": None if run is None else run["reward"]["value"],
                "seconds": None if run is None else run["update_seconds"]["value"],
            }
        )
    return rows


def as_number(time: float | str) -> float:
    """A median of times; never is infinite."""
    return math.inf if time == "never" else float(time)


def over_seeds(estimates: Sequence[Mapping[str, Any] | None]) -> Mean | None:
    """The mean over seeds; None where one of them could not tell."""
    values = [e["value"] for e in estimates if e is not None and e["value"] is not None]
    return Mean.of(values) if len(values) == len(estimates) else None


def markdown(audits: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What stands in the page: what was audited, the arms, and what predicts learning."""
    plan = audits["plan"]
    arm = ", ".join(f"`{key}: {value}`" for key, value in plan["arm"].items())
    responses = plan["prompts"] * plan["responses"]
    places = f"{plan['places']} prefixes of each" if "places" in plan else "every prefix"
    critics = "; ".join(
        f"seed {seed['seed']}: {explained(seed['critic'])}" for seed in audits["seeds"]
    )
    counts = (
        f"Audited: {len(audits['seeds'])} runs with {arm}, after {plan['updates']} updates; "
        f"{responses} responses each, {plan['continuations']} continuations of {places}. "
        f"Variance of the truth that their critics explain: {critics}."
    )
    heads = ["arm", "rank agreement", "finest", "signal to noise", "updates to parity",
             "final reward", "seconds an update"]  # fmt: skip
    cells = [
        [
            str(row["name"]),
            mean(row["rank"]),
            mean(row["finest"]),
            mean(row["signal"]),
            time_text(row["updates"]),
            "–" if row["reward"] is None else number(row["reward"]),
            "–" if row["seconds"] is None else number(row["seconds"]),
        ]
        for row in rows
    ]
    trained = [row for row in rows if row["updates"] is not None]
    told = {key: [row for row in trained if row[key] is not None] for key in MEASURES}
    relations = [relation(rows, key) for key, rows in told.items() if len(rows) >= FEWEST]
    heads_of_relations = ["number of the audit", "Spearman with updates to parity", "arms"]
    figure = f"![Agreement and learning]({FOLDER}/{audits['task']}_credit.png)"
    tables = [markdown_table(heads, cells)]
    if relations:
        tables.append(markdown_table(heads_of_relations, relations))
    if len(rows) >= FEWEST:
        tables.append(figure)
    return "\n\n".join([counts, *tables])


def explained(critic: Mapping[str, Any] | None) -> str:
    """Explained variance with its interval."""
    if critic is None or critic["explained"] is None:
        return "–"
    low, high = critic["explained"]["low"], critic["explained"]["high"]
    interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    return f"{critic['explained']['value']:.2f}{interval}"


def time_text(time: float | None) -> str:
    """A median of times."""
    if time is None:
        return "–"
    return "never" if math.isinf(time) else number(time)


def relation(told: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """How a number of the audits relates to updates to parity, with its bootstrap interval."""
    x = np.array([row[key].value for row in told])
    y = np.array([row["updates"] for row in told])
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(told), (RESAMPLES, len(told)))
    all_once = np.ones((1, len(told)))
    counts = np.array([np.bincount(row, minlength=len(told)) for row in draws], dtype=float)
    weights = np.concatenate([all_once, counts])
    value, *resampled = correlation(weights, ranks(weights, x), ranks(weights, y))
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return [MEASURES[key], f"{value:.2f} [{low:.2f}, {high:.2f}]", str(len(told))]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Agreement and signal to noise of each arm, the one that learns soonest on top."""
    trained = [row for row in rows if row["updates"] is not None]
    trained.sort(key=lambda row: row["updates"])
    chart, axes = new_figure()
    chart.delaxes(axes)
    chart.set_size_inches(9.0, 1.2 + 0.24 * len(trained))
    panels = chart.subplots(1, 2, sharey=True)
    for axes, key in zip(panels, ("finest", "signal"), strict=True):
        for y, row in enumerate(trained):
            if (told := row[key]) is None:
                continue
            ends = told.value - (told.half or 0), told.value + (told.half or 0)
            axes.plot(ends, [y, y], color="#5b5b5b", linewidth=1.4)
            axes.plot([told.value], [y], "o", color="#0072b2", markersize=6)
        axes.set_xlabel(MEASURES[key], fontsize=8)
        values = [row[key].value for row in trained if row[key] is not None]
        axes.set_xlim(0, 1.3 * max(values))
        axes.tick_params(labelsize=8)
    names = [f"{row['name']}: {time_text(row['updates'])}" for row in trained]
    panels[0].set_yticks(range(len(trained)), names, fontsize=8)
    panels[0].set_ylim(len(trained) - 0.5, -0.5)
    chart.suptitle("arms by updates to parity", fontsize=9)
    save(chart, path)


if __name__ == "__main__":
    main()
