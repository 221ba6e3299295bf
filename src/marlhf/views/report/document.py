"""Groups of runs -> the HTML of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from marlhf.common.registry import spec_label
from marlhf.runs.alarms import fired
from marlhf.views.charts import LineChart, histogram, legend, line_chart, number
from marlhf.views.html_page import escape, html_table, page, tag
from marlhf.views.report.figures import (
    Figure,
    final,
    frontier,
    macro_lengths,
    sections,
    total_seconds,
)
from marlhf.views.report.groups import (
    SMOOTHED,
    Group,
    Mean,
    Parity,
    parity,
    target_of,
    value_of,
    what_varies,
)
from marlhf.views.report.runs import Run
from marlhf.views.report.samples import before_after

ADVICE = {
    "kl_runaway": "raise kl.coef or set kl.target, lower optimizer.learning_rate; read the samples",
    "value_not_learning": "raise optimizer.critic_learning_rate, set critic.warmup_steps",
    "clipping": "lower optimizer.learning_rate, ppo.epochs or ppo.minibatches; set ppo.target_kl",
    "entropy_collapse": "raise kl.coef, lower optimizer.learning_rate; read the samples",
    "length_exploitation": "change the reward so that length alone does not pay",
    "missing_eos": "set reward.missing_eos_penalty, raise rollout.max_new_tokens",
    "no_signal": "check the reward on the samples; raise rollout.temperature",
    "policy_stands_still": "raise rollout.batch_size, cut shorter, or set macro.whiten to none",
    "engine_gap": "compare with rollout.engine=transformers; check the engine's dtype",
}


def document(groups: Sequence[Group], baseline: Group) -> str:
    """The complete report, as HTML."""
    runs = [run for group in groups for run in group.runs]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        tag("h1", escape(f"Report: {title}")),
        tag("p", escape(_lead(groups)), class_="lead"),
        _overview(groups),
        _notes(runs),
        _warnings(runs),
        _parity(groups, baseline),
        _charts(groups),
        _frontier(groups),
        _histograms(groups),
        _samples(groups),
        _configuration(groups),
    ]
    return page(f"marlhf report: {title}", "\n".join(part for part in parts if part))


def _lead(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    if len(runs) == 1:
        updates = runs[0].last_update
        return f"{groups[0].label}; {updates} update{'s' * (updates != 1)}."
    bands = any(len(group.runs) > 1 for group in groups)
    means = (
        " Lines are means over the runs of a configuration; bands are their 95% interval "
        "(Student's t)."
        if bands
        else ""
    )
    return f"{len(runs)} runs of {len(groups)} configurations.{means}"


def _overview(groups: Sequence[Group]) -> str:
    heads = ["configuration", "runs", "updates", "held-out reward", "reward", "KL, nats",
             "minutes"]  # fmt: skip
    rows = []
    for group in groups:
        updates = sorted({run.last_update for run in group.runs})
        minutes = Mean.of(total_seconds(run) / 60 for run in group.runs)
        kl = final(group, "eval_kl_mean") or final(group, "kl_mean")
        rows.append(
            (
                escape(group.label),
                str(len(group.runs)),
                f"{updates[0]}–{updates[-1]}" if len(updates) > 1 else str(updates[0]),
                mean(final(group, "eval_score_mean")),
                mean(final(group, "score_mean")),
                mean(kl),
                mean(minutes),
            )
        )
    caption = tag("p", "Last values of each run, mean ± half of the 95% interval over runs.",
                  class_="muted")  # fmt: skip
    return html_table(heads, rows) + caption


def mean(value: Mean | None) -> str:
    """A mean with its interval; a dash where there is none."""
    if value is None:
        return "–"
    return number(value.value) + (f" ± {number(value.half)}" if value.half is not None else "")


def _notes(runs: Sequence[Run]) -> str:
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    for run in runs:
        updates = run.config.get("steps")
        if run.rows and isinstance(updates, int) and run.last_update < updates:
            notes.append(f"{run.name}: stopped at update {run.last_update} of {updates}")
    items = "".join(tag("li", escape(note)) for note in notes)
    return tag("h2", "Notes on the data") + tag("ul", items, class_="notes") if notes else ""


def _warnings(runs: Sequence[Run]) -> str:
    cases_by_rule: dict[str, list[tuple[Run, int, str]]] = {}
    for run in runs:
        for rule, (update, message) in fired(run.rows).items():
            cases_by_rule.setdefault(rule, []).append((run, update, message))
    if not cases_by_rule:
        return ""
    rows = []
    for rule, cases in cases_by_rule.items():
        affected = ", ".join(f"{run.name} (from update {update})" for run, update, _ in cases)
        first = cases[0][2] + (f", and like it in {len(cases) - 1} more" if cases[1:] else "")
        rows.append((tag("code", rule), escape(first), escape(affected), escape(ADVICE[rule])))
    heads = ["sign", "what", "runs", "what may help"]
    return tag("h2", "Warning signs") + html_table(heads, rows, numbers=False)


def _parity(groups: Sequence[Group], baseline: Group) -> str:
    target = target_of(baseline)
    if len(groups) < 2:
        return ""
    title = tag("h2", "Updates and seconds to parity")
    if target is None:
        needs = f"Not known: {baseline.label}, the baseline, has no {SMOOTHED} evaluations."
        return title + tag("p", escape(needs), class_="muted")
    rows = []
    for group in groups:
        updates, seconds = parity(group, baseline), parity(group, baseline, seconds=True)
        if updates is None or seconds is None:
            rows.append(
                (escape(group.label), f"fewer than {SMOOTHED} evaluations", "–", "–", "–", "–")
            )
            continue
        rows.append(
            (
                escape(group.label) + (" (baseline)" if group is baseline else ""),
                f"{updates.reached} of {len(updates.times)}",
                median_text(updates),
                ratio_text(updates),
                median_text(seconds),
                ratio_text(seconds),
            )
        )
    heads = ["configuration", "runs that reach it", "updates", "ratio", "seconds", "ratio"]
    explained = (
        f"Parity: the first evaluation at which the held-out reward, averaged over {SMOOTHED} "
        f"evaluations, reaches {number(target)}, the final mean of the baseline "
        f"({baseline.label}). Medians over runs with a 95% bootstrap interval; a run that does not "
        "reach it counts as never. The ratio is to the baseline's median, where a run of the "
        "baseline that falls short counts with its last update."
    )
    return title + tag("p", escape(explained), class_="muted prose") + html_table(heads, rows)


def median_text(result: Parity) -> str:
    """The median with its interval."""
    interval = (
        "" if result.low is None or result.high is None else _between(result.low, result.high)
    )
    return _or_never(result.median) + interval


def ratio_text(result: Parity) -> str:
    """The ratio to the baseline with its interval."""
    if result.ratio is None:
        return "–"
    if result.ratio_low is None or result.ratio_high is None:
        return _or_never(result.ratio)
    return _or_never(result.ratio) + _between(result.ratio_low, result.ratio_high)


def _between(low: float, high: float) -> str:
    return f" ({_or_never(low)} to {_or_never(high)})"


def _or_never(value: float) -> str:
    return number(value) if math.isfinite(value) else "never"


def _charts(groups: Sequence[Group]) -> str:
    figures_by_section = sections(groups)
    if not figures_by_section:
        return tag("h2", "Charts") + tag("p", "No metrics to draw.", class_="muted")
    buttons = "".join(
        tag("button", label, type="button", data_axis=axis, aria_pressed=pressed)
        for axis, label, pressed in (
            ("step", "by update", "true"),
            ("seconds", "by seconds", "false"),
        )
    )
    bar = tag("div", buttons, class_="switch", role="group", aria_label="horizontal axis")
    parts = [tag("div", _legend(groups) + bar, class_="bar-top")]
    for title, figures in figures_by_section.items():
        inner = tag("div", "".join(map(_figure, figures)), class_="charts")
        if title == "Other metrics":
            parts.append(tag("details", tag("summary", escape(title)) + inner))
        else:
            parts.append(tag("h2", escape(title)) + inner)
    return tag("section", "".join(parts), id="curves", data_axis="step")


def _legend(groups: Sequence[Group]) -> str:
    return legend([(group.label, group.index) for group in groups]) if len(groups) > 1 else ""


def _figure(figure: Figure) -> str:
    charts = line_chart(figure.by_update, class_="by-step") + line_chart(
        figure.by_seconds, class_="by-seconds"
    )
    return tag("figure", tag("figcaption", escape(figure.title)) + charts, class_="card")


def _frontier(groups: Sequence[Group]) -> str:
    chart: LineChart | None = frontier(groups)
    if chart is None:
        return ""
    explained = (
        "The reward of each configuration by its distance from the reference; points are "
        "evaluations in the order of training. Compare configurations at equal KL: a higher reward "
        "further to the right may only be the work of a weaker KL penalty."
    )
    drawn = tag("figure", tag("figcaption", escape(chart.title)) + line_chart(chart), class_="card")
    return (
        tag("h2", "Reward and KL frontier")
        + tag("p", escape(explained), class_="muted prose")
        + _legend(groups)
        + tag("div", drawn, class_="charts large")
    )


def _histograms(groups: Sequence[Group]) -> str:
    lengths_by_group = [(group, *macro_lengths(group)) for group in groups]
    largest = max((max(lengths, default=0) for _, lengths, _ in lengths_by_group), default=0)
    if not largest:
        return ""
    cards = [
        tag(
            "figure",
            tag("figcaption", escape(group.label))
            + tag(
                "p", escape(f"{lengths.total()} macro actions of {count} responses"), class_="muted"
            )
            + histogram(
                lengths, "tokens in a macro action", f"macro actions of {group.label}", largest
            ),
            class_="card",
        )
        for group, lengths, count in lengths_by_group
        if lengths
    ]
    return (
        tag("h2", "Lengths of macro actions")
        + tag("p", "Of the responses in samples.jsonl.", class_="muted")
        + tag("div", "".join(cards), class_="charts")
    )


def _samples(groups: Sequence[Group]) -> str:
    parts = []
    for group in groups:
        run = next((run for run in group.runs if run.samples), None)
        if run is None:
            continue
        name = f"{group.label}: {run.name}" if len(groups) > 1 else run.name
        heading = tag("h3", escape(name))
        inner = before_after(run)
        parts.append(
            heading + inner
            if len(groups) == 1
            else tag(
                "details", tag("summary", escape(name)) + inner, open="" if not parts else None
            )
        )
    if not parts:
        return ""
    key = (
        "A bar marks the start of each macro action, its underline takes one of four colours in "
        "turn. A macro action in "
        + tag("span", "blue with +", class_="a e0 nowrap", style="--a:rgba(var(--good),.4)")
        + " had a positive advantage, one in "
        + tag("span", "orange with −", class_="a e1 nowrap", style="--a:rgba(var(--bad),.4)")
        + " a negative one; the stronger the colour, the larger. Point at one, or touch it, for "
        "the number."
    )
    return (
        tag("h2", "Samples before and after") + tag("p", key, class_="muted prose") + "".join(parts)
    )


def _configuration(groups: Sequence[Group]) -> str:
    import yaml

    parts = []
    configured = [group for group in groups if group.runs[0].config]
    varying = what_varies([group.runs[0] for group in configured])
    if varying:
        rows = [
            [tag("code", escape(key))]
            + [escape(spec_label(value_of(group.runs[0].config, key))) for group in configured]
            for key in varying
        ]
        parts.append(
            html_table(
                ["what differs", *(group.label for group in configured)], rows, numbers=False
            )
        )
    for group in groups:
        config = group.runs[0].config
        if config:
            listing = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
            summary = tag("summary", escape(f"Configuration of {group.runs[0].name}"))
            parts.append(tag("details", summary + tag("pre", escape(listing))))
    return tag("h2", "Configurations") + "".join(parts) if parts else ""
