"""Summary of samples and measures: the numbers of an evaluation, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from marlhf.evaluation.bench import Bench
from marlhf.evaluation.scoring import Measure, total_score
from marlhf.evaluation.statistics import (
    best_of_n,
    best_of_n_kl,
    bootstrap,
    distinct,
    outcome,
    pass_at_k,
    win_rate,
)

# measure -> one list per prompt, of one value per sample
Values = dict[str, list[list[float | None]]]


def summarise(bench: Bench, measures: Sequence[Measure]) -> dict[str, Any]:
    """Contents of results.json, without the win rates of judge and raters."""
    config = bench.config
    labels = [source.label for source in bench.sources]
    baseline = config.baseline or labels[0]
    values = {
        (label, temperature): _values(bench, measures, label, temperature)
        for label in labels
        for temperature in config.swept_temperatures
    }
    comparable = [name for name in ("score", *(m.name for m in measures)) if measures]
    return {
        "prompts": len(bench.prompts),
        "responses_per_prompt": config.rollout.responses_per_prompt,
        "seed": config.seed,
        "resamples": config.resamples,
        "models": {source.label: source.settings.path for source in bench.sources},
        "reference": config.reference,
        "policies": [
            {"policy": label, "temperature": temperature, **_policy(bench, measured)}
            | {"distinct": _distinct(bench, label, temperature)}
            for (label, temperature), measured in values.items()
        ],
        "comparisons": [
            {"policy": label, "baseline": baseline, "temperature": temperature}
            | _comparison(bench, measured, values[baseline, temperature], comparable)
            for (label, temperature), measured in values.items()
            if label != baseline
        ],
    }


def _values(bench: Bench, measures: Sequence[Measure], label: str, temperature: float) -> Values:
    """All measures of each response of a policy at one temperature."""
    names = [measure.name for measure in measures]
    names += ["kl"] if bench.config.reference is not None else []
    values_by_measure: Values = {}
    for row in range(len(bench.prompts)):
        for sample in range(bench.config.rollout.responses_per_prompt):
            key = (label, temperature, row, sample)
            line = bench.samples.lines[key]
            of_rewards = {name: bench.measures.lines[(*key, name)]["value"] for name in names}
            score = {}
            if any(measure.weight is not None for measure in measures):
                score = {"score": total_score(of_rewards, measures)}
            of_text = {"length": len(line["tokens"]), "finished": float(line["finished"])}
            of_text |= {f"distinct_{n}": distinct([line["response"]], n) for n in (1, 2, 3)}
            for name, value in (score | of_rewards | of_text).items():
                rows = values_by_measure.setdefault(name, [[] for _ in bench.prompts])
                rows[row].append(value)
    return values_by_measure


def _policy(bench: Bench, values: Values) -> dict[str, Any]:
    """Means, pass@k and best-of-n of one policy at one temperature."""
    config = bench.config
    summary: dict[str, Any] = {"metrics": {n: _mean(bench, rows) for n, rows in values.items()}}
    if config.pass_at is not None:
        name = f"reward_{config.pass_at.reward}" if config.pass_at.reward else "score"
        summary["pass_at_k"] = {
            str(k): _passes(bench, values[name], k) for k in sorted(set(config.pass_at.k))
        }
    if config.best_of:
        summary["best_of_n"] = {
            str(n): {"kl_bound": best_of_n_kl(n)}
            | {name: _best(bench, values["score"], rows, n) for name, rows in values.items()}
            for n in sorted(set(config.best_of))
        }
    return summary


def _distinct(bench: Bench, label: str, temperature: float) -> dict[str, float | None]:
    """Distinct n-grams over all responses; no interval: resampling repeats texts."""
    keys = [key for key in bench.response_keys() if key[:2] == (label, temperature)]
    texts = [bench.samples.lines[key]["response"] for key in keys]
    return {str(n): distinct(texts, n) for n in (1, 2, 3)}


def _comparison(
    bench: Bench, values: Values, baseline: Values, comparable: Sequence[str]
) -> dict[str, Any]:
    """Paired differences of every measure, and win rates by those in `comparable`."""
    differences, win_rates = {}, {}
    for name in values:
        pairs = [
            [(a, b) for a, b in zip(*rows, strict=True) if a is not None and b is not None]
            for rows in zip(values[name], baseline[name], strict=True)
        ]
        differences[name] = _mean(bench, [[a - b for a, b in row] for row in pairs])
        if name in comparable:
            outcomes = [[outcome(a, b) for a, b in row] for row in pairs]
            win_rates[name] = asdict(win_rate(outcomes, bench.config.resamples, bench.config.seed))
    return {"differences": differences, "win_rates": win_rates}


def _mean(bench: Bench, rows: Sequence[Sequence[float | None]]) -> dict[str, Any] | None:
    """Mean over prompts of their samples' mean; prompts without values are left out."""
    present = [[x for x in row if x is not None] for row in rows]
    return _estimate(bench, [float(np.mean(row)) for row in present if row])


def _passes(bench: Bench, rows: Sequence[Sequence[float | None]], k: int) -> dict[str, Any] | None:
    assert bench.config.pass_at is not None
    threshold = bench.config.pass_at.threshold
    passed = [[x >= threshold for x in row if x is not None] for row in rows]
    return _estimate(bench, [pass_at_k(len(row), sum(row), k) for row in passed if len(row) >= k])


def _best(
    bench: Bench,
    scores: Sequence[Sequence[float | None]],
    rows: Sequence[Sequence[float | None]],
    n: int,
) -> dict[str, Any] | None:
    """Expected measure of the response with the best score of n."""
    expected = []
    for row_scores, row in zip(scores, rows, strict=True):
        pairs = [
            (s, v) for s, v in zip(row_scores, row, strict=True) if s is not None and v is not None
        ]
        if len(pairs) >= n:
            expected.append(best_of_n([s for s, _ in pairs], n, [v for _, v in pairs]))
    return _estimate(bench, expected)


def _estimate(bench: Bench, values: Sequence[float]) -> dict[str, Any] | None:
    estimate = bootstrap(values, bench.config.resamples, bench.config.seed)
    return None if estimate is None else asdict(estimate)
