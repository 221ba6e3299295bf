"""The study's scripts on runs made by hand, whose numbers are known."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from support.study import KLS, RATES, SHARES, write_task
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from marlhf.commands import sweep
from marlhf.config import EvaluateConfig, PPOConfig, RewardConfig, SFTConfig, SweepConfig
from marlhf.config.loading import load_config
from marlhf.views.report.groups import difference, parity

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "study"
sys.path.append(str(ROOT / "scripts" / "study"))

import analyse  # noqa: E402
import opening_task  # noqa: E402
import pack  # noqa: E402
import sentiment_task  # noqa: E402


@pytest.fixture
def study(tmp_path):
    """The task as the packed file alone gives it."""
    packed = tmp_path / "toy.jsonl.xz"
    pack.write(pack.collect(write_task(tmp_path), tmp_path / "toy"), packed)
    return pack.read(packed)


# --- the packed file


def test_the_packed_file_holds_all_that_the_analysis_reads(tmp_path, study):
    unpacked = pack.collect(tmp_path / "toy.yaml", tmp_path / "toy")
    from_folder, from_file = analyse.analyse(unpacked), analyse.analyse(study)
    assert [a.name for a in from_file] == ["token", "fast", "slow"]
    assert analyse.markdown(unpacked, from_folder) == analyse.markdown(study, from_file)
    assert (study.threads, study.chosen) == (2, {"token": {"learning_rate": 0.1}})
    assert study.shares == SHARES
    final = [t for t in study.trials if t.phase == "final"]
    assert len(final) == 9
    assert final[0].run.rows[1]["value_loss"] == 0.333333
    assert all("unwanted" not in row for t in study.trials for row in t.run.rows)
    searched = next(t for t in study.trials if t.phase == "search")
    assert searched.run.keys() == {"eval_score_mean", "eval_kl_mean"}


def test_arms_are_added_to_a_packed_file(study):
    older = replace(study, trials=[t for t in study.trials if t.arm != "slow"], chosen={})
    with_slow = pack.together(older, study)
    assert len(with_slow.trials) == len(study.trials)
    assert {t.arm for t in with_slow.trials} == {"token", "fast", "slow"}
    assert with_slow.chosen == study.chosen
    again = pack.together(older, replace(study, trials=with_slow.trials[:1] * 5))
    assert again.trials == older.trials  # arms that it has keep their runs


def test_the_packed_file_is_reproducible_and_tells_nothing_of_the_machine(tmp_path, study):
    again = tmp_path / "again.xz"
    pack.write(study, again)
    assert again.read_bytes() == (tmp_path / "toy.jsonl.xz").read_bytes()
    assert "somebody" not in str(study.trials)
    assert str(tmp_path) not in str(study)


def test_runs_that_did_not_end_well_are_left_out_and_named(tmp_path, capsys):
    file = write_task(tmp_path)
    failed = tmp_path / "toy" / "final" / "slow" / "seed-1"
    (failed / "sweep.yaml").write_text("arm: slow\nstate: failed\n")
    found = pack.collect(file, tmp_path / "toy")
    assert len(found.runs("final", "slow")) == 2
    assert f"{failed}: left out, it is failed" in capsys.readouterr().out


# --- the analysis


def test_final_reward_and_leash_against_sums_by_hand(study):
    """The last five evaluations are those at 12, 14, 16, 18 and 20: step 16 on average. Seeds add
    0, 0.01 and 0.02, so that the interval's half is 4.303 (t for 2) * 0.01 / sqrt(3)."""
    token, fast, slow = analyse.analyse(study)
    half = 4.303 * 0.01 / math.sqrt(3)
    for arm in (token, fast, slow):
        assert arm.reward.value == pytest.approx(16 * RATES[arm.name] + 0.01)
        assert arm.reward.half == pytest.approx(half)
        assert arm.kl is not None
        assert arm.kl.value == pytest.approx(KLS[arm.name] + 0.01)
    assert fast.kl_ratio == pytest.approx(2.11 / 2.01)
    assert token.against is None
    assert fast.against is not None
    assert fast.against.value == pytest.approx(0.32)
    # Welch: equal variances and counts give 4 degrees of freedom
    assert fast.against.half == pytest.approx(2.776 * 0.01 * math.sqrt(2 / 3), rel=1e-3)


def test_parity_against_steps_by_hand(study):
    """Token ends at 0.33 on average. At 0.04 an update the average of five evaluations, which lags
    by 4 updates, is there at 12.25, 12 and 11.75, that is at the evaluations 14, 12 and 12; at
    0.005 never. Of token's own runs the first ends below the mean and counts as 20."""
    token, fast, slow = analyse.analyse(study)
    assert fast.updates.times == [14, 12, 12]
    assert fast.updates.ratio == 12 / 20
    assert fast.seconds.times == [28, 24, 24]
    assert slow.updates.times == [math.inf] * 3
    assert slow.updates.reached == 0
    assert token.updates.times == [math.inf, 20, 20]
    # 0.9 of the optimum of 0.5: the average reaches 0.45 at 15.25, 15 and 14.75
    assert fast.near_optimum is not None
    assert fast.near_optimum.times == [16, 16, 16]
    assert slow.near_optimum is not None
    assert slow.near_optimum.reached == 0


def test_a_target_that_is_given_replaces_the_baselines(study):
    groups = analyse.groups_of(study)
    found = parity(groups["fast"], groups["token"], target=0.16)
    assert found is not None
    assert found.times == [8, 8, 8]


def test_means_over_updates_and_core_hours(study):
    (token, *_) = analyse.analyse(study)
    assert token.advantage_variance is not None
    assert token.advantage_variance.value == pytest.approx(0.25)
    assert token.explained_variance is not None
    assert token.explained_variance.value == pytest.approx(21 / 40)
    assert analyse.core_hours(study) == pytest.approx(15 * 90 * 2 / 3600)
    assert token.macro_length is not None
    assert token.macro_length.value == pytest.approx(1 + 21 / 2)


def test_single_seeds_and_other_learning_rates(study):
    token, fast, slow = analyse.analyse(study)
    assert slow.by_seed == pytest.approx([0.08, 0.09, 0.1])
    # the search's seeds are 8 and 9
    assert fast.by_rate == {"0.1": pytest.approx(0.64 + 0.085)}
    # the median of token's runs is at 0.33 too; without its last two runs it is at 0.32
    assert token.to_median == token.updates
    lone = pack.Study(**{**vars(study), "trials": []})
    for trial in study.trials:
        if (trial.phase, trial.run.arm) != ("final", "token") or trial.run.config["seed"] == 0:
            lone.trials.append(trial)
    assert analyse.analyse(lone)[1].to_median.times == [12, 12, 12]
    lines = analyse.markdown(study, analyse.analyse(study)).splitlines()
    (head,) = [line for line in lines if "search: 0.1 (KL)" in line]
    row = lines[lines.index(head) + 2]
    assert row == "| token | 11.5 | 0.32, 0.33, 0.34 | – | 0.405 (2.08) |"


def test_the_tables_say_never_and_mark_a_longer_leash(study):
    token, fast, slow = analyse.markdown(study, analyse.analyse(study)).splitlines()[4:7]
    assert token.startswith("| token | 3 | 0.33 ± 0.0248 | – | 2.01 ±")
    assert "| 3 of 3 |" in fast
    assert "(!)" not in fast
    assert "1.50 (!)" in slow
    assert "| 0 of 3 | never" in slow


def test_where_the_gradient_comes_from(study):
    text = analyse.markdown(study, analyse.analyse(study))
    assert "of `token, lambda 1`, and how it divides: 30.6 ± 8; with tokens" in text
    assert "weighted by 0.95^distance: 14.3 ± 3." in text
    lines = text.splitlines()
    (head,) = [line for line in lines if "share of its signal" in line]
    assert lines[lines.index(head) + 2 :][:3] == [
        "| 0 | 0.875 ± 0.1 | 0.04 ± 0.004 |",
        "| 1 to 3 | 0.125 ± 0.1 | 0.26 ± 0.02 |",
        "| 4 and more | – | 0.7 ± 0.02 |",
    ]
    without = pack.Study(**{**vars(study), "shares": {}})
    assert "share of its" not in analyse.markdown(without, analyse.analyse(without))


def test_the_page_is_filled_between_its_markers(study, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pack.write(study, tmp_path / "toy.jsonl.xz")
    page = tmp_path / "toy.md"
    page.write_text("before\n<!-- results: toy -->\nold\n<!-- end: toy -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["analyse.py", "--docs", str(tmp_path)])
    analyse.main()
    first = page.read_text()
    assert first.startswith("before\n<!-- results: toy -->\n\n3 arms, 9 final runs, 6 runs of")
    assert first.endswith("<!-- end: toy -->\nafter\n")
    assert "old" not in first
    for name in ("reward", "frontier", "parity"):
        assert f"(toy_{name}.png)" in first
        assert (tmp_path / f"toy_{name}.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "toy.json").read_text(), parse_constant=pytest.fail)
    assert found["arms"][2]["updates"]["median"] == "never"
    analyse.main()
    assert page.read_text() == first
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="results: toy"):
        analyse.main()


def test_a_task_without_a_leash_has_no_kl(tmp_path, study):
    for trial in study.trials:
        for row in trial.run.rows:
            row.pop("eval_kl_mean", None)
    arms = analyse.analyse(study)
    token = analyse.markdown(study, arms).splitlines()[4]
    assert token.startswith("| token | 3 | 0.33 ± 0.0248 | – | – | – | 2 of 3 |")
    analyse.draw_figures(study, arms, tmp_path)
    assert not (tmp_path / "toy_frontier.png").exists()


def test_rewards_at_one_kl_where_runs_are_not_calibrated(tmp_path, study):
    assert {arm.level for arm in analyse.analyse(study)} == {None}
    study.settings["equal_kl"] = False
    for i, trial in enumerate(study.trials):
        for row in trial.run.rows:
            if row.get("eval_score_mean") is not None:
                row["eval_kl_mean"] = (0.1 + 0.01 * (i % 3)) * row["step"]  # at last 2, 2.2, 2.4
    arms = analyse.analyse(study)
    assert [arm.level for arm in arms] == pytest.approx([2.0] * 3)
    fast = next(arm for arm in arms if arm.name == "fast")
    runs = study.runs("final", "fast")
    slopes = [run.values("eval_kl_mean")[20] / 20 for run in runs]
    seeds = [run.config["seed"] for run in runs]
    wanted = [0.04 * 2 / slope + 0.01 * seed for slope, seed in zip(slopes, seeds, strict=True)]
    assert fast.at_kl == pytest.approx(wanted)
    assert fast.last["score"] == pytest.approx([0.8 + 0.01 * seed for seed in seeds])
    text = analyse.markdown(study, arms)
    assert "| arm | last reward | last KL, nats | reward at KL 2 | of each seed |" in text
    with pytest.raises(ValueError, match="never reaches"):
        analyse.reward_at(runs[0], 3.0)


def test_without_token_ppo_there_is_nothing_to_compare_with(study):
    without = [t for t in study.trials if t.run.arm != "token"]
    with pytest.raises(SystemExit, match="no final run of 'token'"):
        analyse.analyse(pack.Study(**{**vars(study), "trials": without}))


def test_welchs_interval_against_a_textbooks_formula():
    ours, theirs = [1.0, 2.0, 4.0, 5.0], [0.0, 0.5]
    found = difference(ours, theirs)
    assert found is not None
    assert found.value == pytest.approx(2.75)
    a, b = (10 / 3) / 4, 0.125 / 2  # variances of the means
    freedom = (a + b) ** 2 / (a**2 / 3 + b**2 / 1)
    assert 3 <= freedom < 4
    assert found.half == pytest.approx(3.182 * math.sqrt(a + b))
    assert difference([1.0], theirs) is not None
    assert difference([1.0], theirs).half is None  # type: ignore[union-attr]
    assert difference([], theirs) is None


# --- the configurations


def test_the_model_of_the_sentiment_task_is_unpacked(tmp_path):
    lm = tiny_causal_lm("llama", BYTES_VOCAB)
    lm.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    sentiment_task.unpack(tmp_path / "source", tmp_path / "base")
    ids = torch.arange(3, 9)[None]
    found = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(found(input_ids=ids).logits, lm(input_ids=ids).logits)


def test_the_critic_of_the_opening_task_is_the_first_layers(tmp_path):
    lm = tiny_causal_lm("llama", BYTES_VOCAB, num_hidden_layers=8)
    lm.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    opening_task.cut(tmp_path / "source", tmp_path / "critic")
    critic = LlamaForSequenceClassification.from_pretrained(tmp_path / "critic")
    assert critic.config.num_labels == 1
    assert not critic.score.weight.any()
    of_critic, of_lm = critic.model.state_dict(), lm.model.state_dict()
    layers = {name.split(".")[1] for name in of_critic if name.startswith("layers.")}
    assert layers == {str(i) for i in range(6)}
    assert all(torch.equal(of_critic[name], of_lm[name]) for name in of_critic)


def test_the_reward_of_the_opening_task_ends_after_150_characters():
    opening = "I " * 3 + "x" * 143 + " my"  # 152 characters
    texts = [opening, "me, my, I, I, I, I", "mystery Ice", ""]
    assert opening_task.first_person([], texts) == [0.6, 1.0, 0.0, 0.0]


def test_the_studys_configurations_are_read():
    jobs = {"ppo": PPOConfig, "sft": SFTConfig, "reward": RewardConfig, "evaluate": EvaluateConfig}
    for path in CONFIGS.glob("*.yaml"):
        if (job := path.stem.partition("_")[0]) in jobs:
            load_config(jobs[job], path)
    load_config(SFTConfig, CONFIGS / "pretrain.yaml")


@pytest.mark.parametrize("task", ["recall", "summaries", "sentiment", "opening"])
def test_every_arm_of_a_task_is_a_configuration_of_its_own(task, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load((CONFIGS / f"{task}.yaml").read_text())
    keys = {"config": settings["config"], "arms": settings["arms"], "output_dir": "nowhere"}
    trials = sweep.plan(SweepConfig(**keys, seeds=settings["seeds"]))
    different = {json.dumps({**t.config, "output_dir": "", "seed": 0}) for t in trials}
    assert len(different) == len(settings["arms"])
    assert {"token", *settings["curves"]} <= settings["arms"].keys()
    others = settings.get("search_seeds", []) + settings.get("calibration_seeds", [])
    assert others or len(settings["learning_rates"]) == 1
    assert not set(settings["seeds"]) & set(others)
