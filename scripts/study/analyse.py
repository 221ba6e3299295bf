"""The study's tables and figures, from its packed metrics alone.

    python scripts/study/analyse.py      # docs/study/*.jsonl.xz -> docs/study/

For each task it writes TASK.json (every number), three PNGs, and the part of TASK.md between the
markers `<!-- results: TASK -->` and `<!-- end: TASK -->`.

reward      of held-out prompts, mean over a run's last 5 evaluations, mean over seeds with its 95%
            interval (Student's t); against token PPO: the difference with Welch's 95% interval
KL          likewise, and its ratio to token PPO's; without a KL penalty nobody measures it
at one KL   where a task has a KL penalty but no calibration: reward and KL of a run's last
            evaluation, and the reward where the run first reaches the KL that all runs reach,
            linear between evaluations; against token PPO by Welch
parity      updates until the held-out reward, averaged over 5 evaluations, reaches token PPO's
            final mean; medians and their ratio to token PPO's with 95% bootstrap intervals; seconds
            likewise (`marlhf.views.report.groups.parity`); once more with the median of token
            PPO's runs as the bar, on which one run that failed has no say
search      the last 5 evaluations of the search's runs, at every learning rate: reward and KL
variance of the advantages, explained variance, value loss, macro length: means over the updates of
            a run; seconds of an update: the median
gradient    noise and cosine, see gradient_noise.py; where they come from, see gradient_shares.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pack import Study, read
from run import OFF, TOKEN, by_rate

from marlhf.views.charts import number
from marlhf.views.report.document import mean, median_text, ratio_text
from marlhf.views.report.figures import figure, frontier
from marlhf.views.report.groups import Group, Mean, Parity, difference, finals, parity
from marlhf.views.report.png import draw, new_figure, save
from marlhf.views.report.runs import Run

NEAR = 0.9  # of a known optimum


@dataclass(frozen=True)
class Arm:
    """What there is to say of an arm; `against` are differences to token PPO.

    by_seed      final reward of each run
    last         reward and KL of each run's last evaluation
    at_kl        reward of each run at `level`, the KL that every run of the task reaches
    to_median    parity with the median of token PPO's runs
    by_rate      learning rate -> reward at the end of the search, mean over its seeds
    kl_by_rate   likewise the KL there
    """

    name: str
    runs: int
    learning_rate: float
    kl_coef: float
    reward: Mean
    by_seed: list[float]
    against: Mean | None
    kl: Mean | None
    kl_ratio: float | None
    updates: Parity
    seconds: Parity
    to_median: Parity
    near_optimum: Parity | None
    advantage_variance: Mean | None
    explained_variance: Mean | None
    value_loss: Mean | None
    macro_length: Mean | None
    update_seconds: Mean | None
    gradient: dict[str, Any]
    by_rate: dict[str, float]
    kl_by_rate: dict[str, float]
    last: dict[str, list[float]]
    level: float | None
    at_kl: list[float]


def main() -> None:
    """Write everything anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=Path("docs/study"))
    folder: Path = parser.parse_args().docs
    for path in sorted(folder.glob("*.jsonl.xz")):
        study = read(path)
        arms = analyse(study)
        write_json(study, arms, folder / f"{study.task}.json")
        draw_figures(study, arms, folder)
        page = folder / f"{study.task}.md"
        text = fill(page.read_text(encoding="utf-8"), study.task, markdown(study, arms))
        page.write_text(text, encoding="utf-8")
        print(f"{study.task}: {len(arms)} arms")


# --- numbers


def groups_of(study: Study) -> dict[str, Group]:
    """The final runs of each arm, in the order of the task's file."""
    all_arms = {name: study.runs("final", name) for name in study.settings["arms"]}
    with_runs = {name: runs for name, runs in all_arms.items() if runs}
    return {name: Group(name, i, runs) for i, (name, runs) in enumerate(with_runs.items())}


def analyse(study: Study) -> list[Arm]:
    """Every arm that has runs with 5 evaluations; token PPO must be one of them."""
    groups = groups_of(study)
    if TOKEN not in groups or not finals(groups[TOKEN]):
        raise SystemExit(f"{study.task}: no final run of {TOKEN!r} with 5 evaluations")
    runs = [run for group in groups.values() for run in group.runs]
    level = None if study.settings.get("equal_kl", True) else level_of(runs)
    return [_arm(study, group, groups[TOKEN], level) for group in groups.values() if finals(group)]


def level_of(runs: Sequence[Run]) -> float | None:
    """The highest KL that every run reaches; None where nobody measures it."""
    highest = [max(run.values("eval_kl_mean").values(), default=None) for run in runs]
    return None if None in highest else min(kl for kl in highest if kl is not None)


def reward_at(run: Run, level: float) -> float:
    """Held-out reward where a run's KL first reaches a level, linear between evaluations."""
    rewards, before = run.values("eval_score_mean"), None
    for step, kl in run.values("eval_kl_mean").items():
        if kl >= level:
            if before is None:
                return rewards[step]
            share = (level - before[0]) / (kl - before[0])
            return before[1] + share * (rewards[step] - before[1])
        before = kl, rewards[step]
    raise ValueError(f"the run never reaches {level}")


def _arm(study: Study, group: Group, token: Group, level: float | None) -> Arm:
    reward, updates = Mean.of(finals(group)), parity(group, token)
    seconds = parity(group, token, seconds=True)
    to_median = parity(group, token, target=float(np.median(finals(token))))
    kl, of_token = (Mean.of(finals(g, "eval_kl_mean")) for g in (group, token))
    assert reward is not None
    assert updates is not None
    assert seconds is not None
    assert to_median is not None
    best = study.settings.get("optimum")
    return Arm(
        name=group.label,
        runs=len(group.runs),
        learning_rate=group.runs[0].config["optimizer"]["learning_rate"],
        kl_coef=group.runs[0].config["kl"]["coef"],
        reward=reward,
        by_seed=finals(group),
        against=None if group is token else difference(finals(group), finals(token)),
        kl=kl,
        kl_ratio=kl.value / of_token.value if kl and of_token and of_token.value else None,
        updates=updates,
        seconds=seconds,
        to_median=to_median,
        near_optimum=None if best is None else parity(group, token, target=NEAR * best),
        advantage_variance=_over_updates(group, "advantage_std", 2),
        explained_variance=_over_updates(group, "explained_variance"),
        value_loss=_over_updates(group, "value_loss"),
        macro_length=_over_updates(group, "macro_length_mean"),
        update_seconds=_over_updates(group, "step_seconds", how=np.median),
        gradient=study.gradient.get(group.label, {}),
        by_rate=_by_rate(study, group.label, "eval_score_mean"),
        kl_by_rate=_by_rate(study, group.label, "eval_kl_mean"),
        last={name: _last(group, f"eval_{name}_mean") for name in ("score", "kl")},
        level=level,
        at_kl=[] if level is None else [reward_at(run, level) for run in group.runs],
    )


def _last(group: Group, metric: str) -> list[float]:
    curves = [run.values(metric) for run in group.runs]
    return [list(curve.values())[-1] for curve in curves if curve]


def _by_rate(study: Study, name: str, metric: str) -> dict[str, float]:
    """What the search saw of an arm, at each learning rate that it tried."""
    searched = [trial.run for trial in study.trials if trial.phase == "search"]
    tried = by_rate(searched, name).items()
    ends = {f"{rate:g}": finals(Group(name, 0, runs), metric) for rate, runs in tried}
    return {rate: float(np.mean(values)) for rate, values in ends.items() if values}


def _over_updates(
    group: Group, key: str, power: int = 1, how: Callable[[Any], Any] = np.mean
) -> Mean | None:
    """The mean over runs of a metric's mean (or median, ...) over updates."""
    values = [list(run.values(key).values()) for run in group.runs]
    return Mean.of(float(how(np.power(of_run, power))) for of_run in values if of_run)


def core_hours(study: Study) -> float:
    """Of all runs of all phases, from start to end."""
    return sum(t.seconds or 0.0 for t in study.trials) * study.threads / 3600


def write_json(study: Study, arms: list[Arm], path: Path) -> None:
    """Every number, unrounded; what is infinite is `never`."""
    content = {
        "task": study.task,
        "runs": len(study.trials),
        "core_hours": core_hours(study),
        "chosen": study.chosen,
        "arms": [dataclasses.asdict(arm) for arm in arms],
    }
    path.write_text(json.dumps(_finite(content), indent=1) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "never" if value > 0 else None
    return value


# --- tables


def markdown(study: Study, arms: list[Arm]) -> str:
    """What stands in the page: counts, the tables, and the figures."""
    final = sum(t.phase == "final" for t in study.trials)
    rates = ", ".join(f"{rate:g}" for rate in study.settings["learning_rates"])
    counts = (
        f"{len(arms)} arms, {final} final runs, {len(study.trials) - final} runs of search and "
        f"calibration, {number(core_hours(study))} core-hours. Learning rates tried: {rates}."
    )
    figures = "\n".join(
        f"![{title}]({study.task}_{name}.png)"
        for name, title in (
            ("reward", "Held-out reward by update"),
            ("frontier", "Held-out reward by KL"),
            ("parity", "Updates to parity, as a ratio to token PPO's"),
        )
        if name != "frontier" or arms[0].kl
    )
    tables = [outcome_table(arms), cause_table(arms), check_table(study, arms)]
    if arms[0].level is not None:
        tables.insert(1, kl_table(arms))
    if study.shares:
        tables.insert(2, shares_table(study.shares))
    return "\n\n".join([counts, *tables, figures])


def outcome_table(arms: list[Arm]) -> str:
    """Reward, KL and parity."""
    heads = ["arm", "seeds", "reward", "against token", "KL, nats", "KL to token's",
             "reach parity", "updates", "ratio", "ratio of seconds"]  # fmt: skip
    near = any(arm.near_optimum for arm in arms)
    rows = [
        [
            arm.name,
            str(arm.runs),
            mean(arm.reward),
            mean(arm.against),
            mean(arm.kl),
            _kl_ratio(arm.kl_ratio),
            f"{arm.updates.reached} of {len(arm.updates.times)}",
            median_text(arm.updates),
            ratio_text(arm.updates),
            ratio_text(arm.seconds),
            *([median_text(arm.near_optimum)] if arm.near_optimum else []),
        ]
        for arm in arms
    ]
    return table([*heads, *([f"updates to {NEAR:.0%} of the optimum"] if near else [])], rows)


def kl_table(arms: list[Arm]) -> str:
    """Where runs end, and their rewards at one KL."""
    heads = ["arm", "last reward", "last KL, nats", f"reward at KL {number(arms[0].level or 0)}",
             "of each seed", "against token"]  # fmt: skip
    rows = [
        [
            arm.name,
            mean(Mean.of(arm.last["score"])),
            mean(Mean.of(arm.last["kl"])),
            mean(Mean.of(arm.at_kl)),
            ", ".join(f"{value:.3g}" for value in arm.at_kl),
            mean(None if arm is arms[0] else difference(arm.at_kl, arms[0].at_kl)),
        ]
        for arm in arms
    ]
    return table(heads, rows)


def cause_table(arms: list[Arm]) -> str:
    """What was chosen for an arm, and what its gradients and its critic are like."""
    heads = ["arm", "learning rate", "KL coefficient", "variance of advantages",
             "explained variance", "value loss", "gradient noise", "cosine"]  # fmt: skip
    rows = [
        [
            arm.name,
            f"{arm.learning_rate:g}",
            number(arm.kl_coef),
            mean(arm.advantage_variance),
            mean(arm.explained_variance),
            mean(arm.value_loss),
            _with_error(arm.gradient, "noise"),
            _with_error(arm.gradient, "cosine"),
        ]
        for arm in arms
    ]
    return table(heads, rows)


def check_table(study: Study, arms: list[Arm]) -> str:
    """What single seeds and other learning rates say."""
    searched = any(arm.by_rate for arm in arms)
    rates = [f"{rate:g}" for rate in study.settings["learning_rates"]] if searched else []
    heads = ["arm", "macro length", "reward of each seed", "ratio to token's median run"]
    with_kl = bool(arms[0].kl_by_rate)
    rows = [
        [
            arm.name,
            "–" if arm.macro_length is None else number(arm.macro_length.value),
            ", ".join(f"{value:.3g}" for value in arm.by_seed),
            ratio_text(arm.to_median),
            *(_searched(arm, rate, with_kl) for rate in rates),
        ]
        for arm in arms
    ]
    heads += [f"search: {rate}{' (KL)' * with_kl}" for rate in rates]
    return table(heads, rows)


def _searched(arm: Arm, rate: str, with_kl: bool) -> str:
    if rate not in arm.by_rate:
        return "–"
    kl = f" ({number(arm.kl_by_rate[rate])})" if with_kl else ""
    return f"{number(arm.by_rate[rate])}{kl}"


def shares_table(shares: dict[str, Any]) -> str:
    """Shares of the gradient of token PPO with lambda 1, by distance from the end."""
    starts = [group["from"] for group in shares["groups"]]
    ends = [f" to {start - 1}" if start - 1 > begin else "" for begin, start in pairwise(starts)]
    rows = [
        [f"{start}{end}", _with_error(group, "signal"), _with_error(group, "noise")]
        for start, end, group in zip(starts, [*ends, " and more"], shares["groups"], strict=True)
    ]
    total, weighted = (_with_error(shares, key) for key in ("noise", "weighted"))
    noises = (
        f"Gradient noise of `{shares['arm']}`, and how it divides: {total}; with tokens weighted "
        f"by {shares['lam']:g}^distance: {weighted}."
    )
    heads = ["tokens from the end", "share of its signal", "share of its noise"]
    return f"{noises}\n\n{table(heads, rows)}"


def _kl_ratio(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return f"{ratio:.2f}" + (" (!)" if abs(ratio - 1) > OFF else "")


def _with_error(measured: dict[str, Any], key: str) -> str:
    if measured.get(key) is None:
        return "–"
    return f"{number(measured[key])} ± {number(measured[f'{key}_half'])}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def fill(page: str, name: str, content: str) -> str:
    """The page with this between the markers of that name."""
    begin, end = f"<!-- results: {name} -->", f"<!-- end: {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise SystemExit(f"{name}.md: must hold {begin} and {end} once")
    return pattern.sub(lambda _: f"{begin}\n\n{content}\n\n{end}", page)


# --- figures


def draw_figures(study: Study, arms: list[Arm], folder: Path) -> None:
    """Curves and frontier of the arms that the task's file names, parity of all."""
    groups = groups_of(study)
    names = [name for name in study.settings["curves"] if name in groups]
    drawn = [Group(name, i, groups[name].runs) for i, name in enumerate(names)]
    curves = figure(drawn, "eval_score_mean", "Held-out reward").by_update
    save(draw(curves), folder / f"{study.task}_reward.png")
    chart = frontier(drawn)
    if arms[0].kl and chart is not None:
        save(draw(chart), folder / f"{study.task}_frontier.png")
    save(draw_parity(arms), folder / f"{study.task}_parity.png")


def draw_parity(arms: list[Arm]) -> Any:
    """Draw each arm's ratio of updates to parity, with its interval.

    An arm that never reaches parity is an arrow to the right.
    """
    chart, axes = new_figure()
    chart.set_size_inches(6.4, 1.4 + 0.24 * len(arms))
    rows = [(arm.name, arm.updates) for arm in arms if arm.updates.ratio is not None]
    known = [x for _, to in rows for x in (to.ratio, to.ratio_high) if _is_finite(x)]
    edge = 1.15 * max([1.0, *known])
    for y, (_, to_parity) in enumerate(rows):
        low, high = to_parity.ratio_low, to_parity.ratio_high
        if low is not None and high is not None:
            axes.plot([min(low, edge), min(high, edge)], [y, y], color="#5b5b5b", linewidth=1.4)
        reaches = _is_finite(to_parity.ratio)
        x, marker = (to_parity.ratio, "o") if reaches else (edge, ">")
        axes.plot([x], [y], marker, color="#0072b2" if reaches else "#c24a00", markersize=6)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(1.0, color="#5b5b5b", linewidth=1)
    axes.axvline(0.5, color="#5b5b5b", linewidth=1, linestyle=":")
    axes.set_xlim(0, edge * 1.03)
    axes.set_xlabel("updates to parity, ratio to token PPO (arrow: never)")
    return chart


def _is_finite(x: float | None) -> bool:
    return x is not None and math.isfinite(x)


if __name__ == "__main__":
    main()
