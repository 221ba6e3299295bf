"""`scripts/study/credit.py`: the page's numbers, from audits and training runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts" / "study"))

import credit  # noqa: E402


def estimate(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None}


def audited(rank: float | None, finest: float, signal: float) -> dict[str, Any]:
    return {
        "rank": {"corrected": None if rank is None else estimate(rank)},
        "finest": {"corrected": estimate(finest)},
        "gradient": {"signal_to_noise": estimate(signal)},
    }


def trained(name: str, updates: float | str, reward: float) -> dict[str, Any]:
    return {
        "name": name,
        "updates": {"median": updates},
        "reward": {"value": reward},
        "update_seconds": {"value": 2.0},
    }


PLAN = {"arm": {"ppo.lam": 1.0}, "updates": 4, "prompts": 3, "responses": 2, "continuations": 8}


def test_the_pages_are_those_of_the_committed_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.xz"))
    credit.write_page(tmp_path / "docs")
    assert (tmp_path / "docs/credit.md").read_text() == (ROOT / "docs/credit.md").read_text()


def test_an_arm_has_the_means_over_seeds_and_what_its_training_did() -> None:
    seeds = [
        {"arms": {"a": audited(0.1, 0.2, 0.5), "b": audited(None, 0.4, 1.5)}},
        {"arms": {"a": audited(0.3, 0.4, 0.7), "b": audited(None, 0.6, 2.5)}},
    ]
    a, b = credit.rows_of({"seeds": seeds}, [trained("a", "never", 0.5)])
    assert (a["rank"].value, a["finest"].value) == pytest.approx((0.2, 0.3))
    assert a["signal"].value == pytest.approx(0.6)
    assert (a["updates"], a["reward"], a["seconds"]) == (np.inf, 0.5, 2.0)
    assert b["rank"] is None
    assert b["finest"].value == pytest.approx(0.5)
    assert b["updates"] is b["reward"] is b["seconds"] is None


def test_the_relation_is_spearmans_and_never_is_last() -> None:
    finest, updates = [0.1, 0.2, 0.3, 0.25, 0.5, 0.4], [np.inf, 40, 20, 30, 10, 20]
    rows = [
        {"finest": credit.over_seeds([estimate(x)]), "updates": t}
        for x, t in zip(finest, updates, strict=True)
    ]
    _, text, count = credit.relation(rows, "finest")
    last = [1e9 if np.isinf(t) else t for t in updates]
    assert text.startswith(f"{spearmanr(finest, last).statistic:.2f} [")
    assert count == "6"


@pytest.mark.parametrize("arms", [3, 6])
def test_few_arms_have_no_correlation(arms: int) -> None:
    names = [f"arm {i}" for i in range(arms)]
    of_seed = {"seed": 0, "critic": None}
    audits = {name: audited(None, 0.1 * i, i) for i, name in enumerate(names)}
    content = {"task": "x", "plan": PLAN, "seeds": [{**of_seed, "arms": audits}]}
    rows = credit.rows_of(content, [trained(name, 9 - i, 0.1) for i, name in enumerate(names)])
    text = credit.markdown(content, rows)
    assert "6 responses each, 8 continuations of every prefix" in text
    assert ("Spearman" in text) == (arms == 6)
    few = {**content, "plan": {**PLAN, "places": 5}}
    assert "8 continuations of 5 prefixes of each" in credit.markdown(few, rows)


def test_a_run_of_the_study_is_known_by_arm_and_seed(tmp_path: Path) -> None:
    for arm in ("a", "b"):
        for seed in (0, 1):
            folder = tmp_path / arm / f"seed-{seed}"
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(f"seed: {seed}\n")
            (folder / "sweep.yaml").write_text(f"arm: {arm}\n")
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    assert credit.run_of(tmp_path, "b", 1) == (tmp_path / "b" / "seed-1").resolve()
