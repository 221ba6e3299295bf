"""Rules over the history of metrics, the line that they print; every metric is explained."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import PROMPTS, tiny_trainer
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm

from marlhf.config import RewardConfig, SFTConfig
from marlhf.config.loading import config_from_dict
from marlhf.runs.alarms import RULES, AlarmSink, fired
from marlhf.training import reward_model, sft

DOC = Path(__file__).parents[2] / "docs" / "metrics.md"


def history(steps: int = 30, **series: Any) -> list[dict[str, Any]]:
    """Rows of a healthy run, with some metrics as functions of the step or as constants."""
    healthy = {
        "score_mean": lambda t: 0.01 * t,
        "score_std": 0.3,
        "kl_mean": lambda t: 0.1 * t,
        "response_length_mean": 20.0,
        "score_length_correlation": 0.1,
        "explained_variance": lambda t: 0.02 * t,
        "clip_fraction": 0.05,
        "entropy": lambda t: 2.0 - 0.02 * t,
        "eos_fraction": 0.9,
        "grad_norm_policy": 0.5,
    }
    rows = []
    for step in range(1, steps + 1):
        given = {**healthy, **series}
        rows.append({"step": step, **{k: v(step) if callable(v) else v for k, v in given.items()}})
    return rows


# What makes each rule fire, and what comes close and must not.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kl_runaway": (
        {"kl_mean": lambda t: 0.8 * t},
        {"kl_mean": lambda t: 0.8 * t, "score_mean": lambda t: -0.01 * t},
    ),
    "value_not_learning": ({"explained_variance": -0.01}, {"explained_variance": 0.01}),
    "clipping": ({"clip_fraction": 0.4}, {"clip_fraction": lambda t: 0.9 if t == 20 else 0.1}),
    "entropy_collapse": (
        {"entropy": lambda t: 2.0 * 0.9**t},
        {"entropy": lambda t: 2.0 * 0.97**t},
    ),
    "length_exploitation": (
        {"response_length_mean": lambda t: 10 + t, "score_length_correlation": 0.7},
        {"response_length_mean": lambda t: 10 + t, "score_length_correlation": -0.7},
    ),
    "missing_eos": ({"eos_fraction": lambda t: 0.9 * 0.9**t}, {"eos_fraction": 0.04}),
    "policy_stands_still": (
        {"grad_norm_policy": 0.0},
        {"grad_norm_policy": lambda t: 0.3 if t % 4 == 0 else 0.0},
    ),
    "engine_gap": (
        {"engine_kl": lambda t: 0.001 * t},
        {"engine_kl": lambda t: 0.05 + 0.001 * t},
    ),
    "no_signal": ({"score_std": 0.0}, {"score_std": lambda t: 0.3 if t % 4 == 0 else 0.0}),
}


def test_every_rule_has_its_cases():
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_fires_when_it_should_and_only_that_rule(rule):
    sick, close = CASES[rule]
    assert set(fired(history(**sick))) == {rule}
    assert fired(history(**close)) == {}


def test_a_shrinking_response_that_pays_is_exploitation_too():
    shrinks = {
        "response_length_mean": lambda t: 40 / t,
        "score_length_correlation": -0.8,
        "kl_mean": 0.1,
    }
    assert set(fired(history(**shrinks))) == {"length_exploitation"}


def test_a_healthy_run_is_left_alone_however_long():
    assert fired(history(300, explained_variance=0.4, entropy=1.5, kl_mean=6.0)) == {}


@pytest.mark.parametrize("value", [None, math.nan, "text"])
@pytest.mark.parametrize("key", sorted({k for row in history(1) for k in row}))
def test_gaps_are_no_signs(key, value):
    rows = history(**{key: value} if key != "step" else {})
    assert fired(rows) == {}
    assert fired([{k: v for k, v in row.items() if k != key or k == "step"} for row in rows]) == {}


def test_what_the_policy_moves_while_it_is_sampled_ahead_is_no_gap():
    def lagged(later):
        rows = history(engine_kl=lambda t: later(t) if t > 1 else 1e-7)
        return fired([row | {"sampling_lag": min(i, 1)} for i, row in enumerate(rows)])

    assert lagged(lambda t: 0.02) == {}
    assert set(lagged(lambda t: 0.02 + 0.01 * t)) == {"engine_gap"}


def test_the_first_update_at_which_a_rule_fires_is_named():
    found = fired(history(40, clip_fraction=lambda t: 0.9 if t > 20 else 0.0))
    step, message = found["clipping"]
    assert step == 22  # two of the last five at 0.9 make 0.36
    assert "36%" in message


def test_a_line_is_printed_once(tmp_path, capsys):
    sink = AlarmSink(tmp_path / "metrics.jsonl")
    rows = history(60, clip_fraction=0.5)
    for row in rows:
        sink.write(row)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("marlhf: warning at update 5: 50% of the ratios")
    assert "docs/metrics.md" in lines[0]
    # a run that goes on knows what was said before
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = AlarmSink(tmp_path / "metrics.jsonl")
    again.write(history(61, clip_fraction=0.5)[-1])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("warnings", [True, False])
def test_a_run_warns_if_asked_to(warnings, tmp_path, capsys):
    same = lambda prompts, completions: [1.0] * len(prompts)  # noqa: E731
    tiny_trainer(tmp_path, score=same, steps=5, log={"warnings": warnings}).train()
    assert ("(no_signal, see docs/metrics.md)" in capsys.readouterr().err) == warnings


def documented() -> set[str]:
    """Metrics of a ppo run: the first column of the first table of docs/metrics.md."""
    text = DOC.read_text(encoding="utf-8").partition("## `marlhf sft`")[0]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_every_metric_of_a_run_is_documented_and_nothing_else(tmp_path):
    """One run with everything switched on that adds a metric."""
    trainer = tiny_trainer(
        tmp_path,
        steps=1,
        log={"eval_every": 1, "samples": 1},
        kl={"target": 1.0},
        ppo={"target_kl": 10.0},
    )
    trainer.eval_prompts = list(trainer.stream.prompts[:3])
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {key for row in rows for key in row}
    found = {re.sub(r"^reward_\w+_mean$", "reward_NAME_mean", key) for key in found}
    of_plug_ins = {"parsing_fallback_fraction", "syntax_fallback_fraction"}
    of_plug_ins |= {"curiosity_error", "curiosity_rewarded_fraction"}
    of_plug_ins |= {"engine_kl", "engine_ratio_max", "loss_weight_mean", "sampling_lag"}
    of_plug_ins |= {"continued_prefixes_mean", "continuation_tokens_mean"}
    of_gpus = {"reserved_memory_gb"}
    assert documented() - of_plug_ins - of_gpus - {"ptx_loss"} == found


def test_every_metric_of_supervised_jobs_is_documented_and_nothing_else(tmp_path):
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(tmp_path / "lm")
    byte_tokenizer().save_pretrained(tmp_path / "lm")
    row = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    (tmp_path / "data.jsonl").write_text((json.dumps(row) + "\n") * 6)
    found = set()
    for job, cls in (("sft", SFTConfig), ("reward", RewardConfig)):
        values = {"model": {"path": str(tmp_path / "lm")}, "output_dir": str(tmp_path / job)}
        values |= {"data": {"path": str(tmp_path / "data.jsonl"), "eval_rows": 2}, "steps": 1}
        values |= {"log": {"progress": False, "tensorboard": False}, "batch_size": 2}
        {"sft": sft, "reward": reward_model}[job].run(config_from_dict(cls, values))
        lines = (tmp_path / job / "metrics.jsonl").read_text().splitlines()
        found |= {key for line in lines for key in json.loads(line)}
    text = DOC.read_text(encoding="utf-8").partition("## `marlhf sft`")[2]
    section = text.partition("## Warning signs")[0]
    assert {name for name in found - {"step"} if f"`{name}`" not in section} == set()
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) - found == set()


def test_every_rule_is_documented():
    text = DOC.read_text(encoding="utf-8").partition("## Warning signs")[2]
    rules = re.findall(r"^\| `(\w+)` \|", text, re.M)
    assert sorted(rules) == sorted(RULES)


def test_keys_that_the_documentation_names_exist():
    from marlhf.config import PPOConfig
    from marlhf.config.loading import config_fields

    known = {field.key for field in config_fields(PPOConfig)}
    sections = {key.partition(".")[0] for key in known}
    text = DOC.read_text(encoding="utf-8")
    named = {k for k in re.findall(r"`([a-z]+\.[a-z_]+)[:`]", text) if k.split(".")[0] in sections}
    assert len(named) > 10
    assert named - known == set()


# --- the metrics that were made for the rules, against plain formulas


def test_correlation_and_spread_against_plain_formulas(tmp_path):
    """Scores are a known function of the response, lengths are read off the samples."""
    scores: list[float] = []
    lengths: list[int] = []

    def score(prompts, completions):
        found = [float(len(c) ** 2 % 7) for c in completions]
        scores.extend(found)
        return found

    longer = {"max_new_tokens": 120}
    trainer = tiny_trainer(tmp_path, score=score, rollout=longer, segmenter="token")
    batches = []
    original = trainer.credit

    def spy(starts, rollout):
        batch = original(starts, rollout)
        lengths.extend(rollout.generation.lengths.tolist())
        batches.append(batch)
        return batch

    trainer.credit = spy  # type: ignore[assignment]
    row = trainer.step(PROMPTS)
    pair = torch.tensor([scores, [float(n) for n in lengths]], dtype=torch.float64)
    expected = float(torch.corrcoef(pair)[0, 1])
    assert row["score_length_correlation"] == pytest.approx(expected, abs=1e-6)
    (batch,) = batches
    raw = [
        float(batch.returns_BM[b, m] - batch.values_BM[b, m])
        for b in range(len(PROMPTS))
        for m in range(int(batch.mask_BM[b].sum()))
    ]
    mean = sum(raw) / len(raw)
    spread = math.sqrt(sum((a - mean) ** 2 for a in raw) / len(raw))
    assert row["advantage_std"] == pytest.approx(spread, rel=1e-5)


def test_constant_scores_have_no_correlation(tmp_path):
    same = lambda prompts, completions: [0.1] * len(prompts)  # noqa: E731
    row = tiny_trainer(tmp_path, score=same).step(PROMPTS)
    assert row["score_length_correlation"] is None


def test_held_out_samples_carry_advantages(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=2, log={"eval_every": 1, "samples": 2})
    trainer.eval_prompts = list(trainer.stream.prompts[:3])
    trainer.train()
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    held_out = [s for s in map(json.loads, lines) if s["held_out"]]
    assert len(held_out) == 6
    assert all(len(s["macro_advantages"]) == len(s["macro_lengths"]) for s in held_out)
    assert any(a != 0 for s in held_out for a in s["macro_advantages"])


def test_without_a_critic_held_out_samples_have_none(tmp_path):
    sections: dict[str, Any] = {
        "ppo": {"estimator": "rloo"},
        "rollout": {"responses_per_prompt": 2},
        "log": {"eval_every": 1, "samples": 2},
    }
    trainer = tiny_trainer(tmp_path, steps=1, **sections)
    trainer.eval_prompts = list(trainer.stream.prompts[:3])
    trainer.train()
    samples = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert all(("macro_advantages" in s) != s["held_out"] for s in samples)
