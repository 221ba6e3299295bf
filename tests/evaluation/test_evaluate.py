"""`marlhf evaluate`: what it measures, against plain transformers; going on; ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rouge_score.rouge_scorer import RougeScorer
from support import warm_python
from support.evaluations import PROMPTS, build_models, config_for, lines_of, results_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from marlhf.cli import main
from marlhf.common.errors import UserError
from marlhf.config.loading import config_to_dict
from marlhf.evaluation.records import Records
from marlhf.models import loading
from marlhf.rollout.transformers_engine import TransformersEngine


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(models, tmp_path) -> Path:
    """A folder of its own for each test, with the models in it."""
    for item in models.iterdir():
        (tmp_path / item.name).symlink_to(item)
    return tmp_path


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The models whose weights are read."""
    found, load = [], loading.load_policy

    def counted(settings: Any, *rest: Any) -> Any:
        found.append(Path(settings.path).name)
        return load(settings, *rest)

    monkeypatch.setattr(loading, "load_policy", counted)
    return found


def of_policy(results: dict[str, Any], label: str, temperature: float = 1.0) -> dict[str, Any]:
    (entry,) = (
        e for e in results["policies"] if (e["policy"], e["temperature"]) == (label, temperature)
    )
    return entry


# -- what is measured ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(models, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """Everything at once, at two temperatures."""
    folder = tmp_path_factory.mktemp("evaluated")
    for item in models.iterdir():
        (folder / item.name).symlink_to(item)
    results = results_of(
        folder,
        reference=str(folder / "a"),
        temperatures=[1.0, 0.6],
        rewards=[
            {"name": "length", "target": 9, "unit": "characters", "weight": 2.0},
            str(folder / "rm"),
        ],
        rouge_column="summary",
        rollout={"responses_per_prompt": 3},
        pass_at={"k": [1, 2], "reward": "rm", "threshold": -0.6},
        best_of=[1, 2, 3],
    )
    return folder, results


def mean_over_prompts(lines: list[dict[str, Any]], value: Any) -> float:
    by_row = [[value(x) for x in lines if x["row"] == row] for row in range(len(PROMPTS))]
    return sum(sum(values) / len(values) for values in by_row) / len(by_row)


@torch.no_grad()
def logprob(model: Any, tokenizer: Any, line: dict[str, Any]) -> float:
    """Of a response, alone in its batch, token by token in float64."""
    prompt = tokenizer(line["prompt"])["input_ids"]
    logits = model(torch.tensor([prompt + line["tokens"]])).logits[0].double()
    scaled = (logits / line["temperature"]).log_softmax(-1)
    return sum(float(scaled[len(prompt) - 1 + i, t]) for i, t in enumerate(line["tokens"]))


def test_kl_is_that_of_plain_transformers(evaluated):
    folder, results = evaluated
    tokenizer = AutoTokenizer.from_pretrained(folder / "a")
    models = {x: AutoModelForCausalLM.from_pretrained(folder / x).eval() for x in "ab"}
    for temperature in (1.0, 0.6):
        lines = [
            x
            for x in lines_of(folder, "samples")
            if x["policy"] == "b" and x["temperature"] == temperature
        ]
        assert len(lines) == 3 * len(PROMPTS)

        def kl(line: dict[str, Any]) -> float:
            return logprob(models["b"], tokenizer, line) - logprob(models["a"], tokenizer, line)

        found = of_policy(results, "b", temperature)["metrics"]["kl"]
        assert found["mean"] == pytest.approx(mean_over_prompts(lines, kl), abs=1e-3)
        assert found["low"] < found["mean"] < found["high"]
        itself = of_policy(results, "a", temperature)["metrics"]["kl"]
        assert itself["mean"] == pytest.approx(0, abs=1e-4)


def test_rewards_rouge_and_lengths_are_means_over_prompts(evaluated):
    folder, results = evaluated
    lines = [
        x for x in lines_of(folder, "samples") if x["policy"] == "b" and x["temperature"] == 0.6
    ]
    metrics = of_policy(results, "b", 0.6)["metrics"]
    scorer = RougeScorer(["rouge2", "rougeL"], use_stemmer=True)

    def rouge(line: dict[str, Any], metric: str) -> float:
        return scorer.score(line["prompt"] + " aeiou", line["response"])[metric].fmeasure

    expected = {
        "reward_length": lambda x: -abs(len(x["response"]) - 9) / 9,
        "rouge_2": lambda x: rouge(x, "rouge2"),
        "rouge_l": lambda x: rouge(x, "rougeL"),
        "length": lambda x: len(x["tokens"]),
        "finished": lambda x: x["tokens"][-1] == 1,
    }
    for name, value in expected.items():
        assert metrics[name]["mean"] == pytest.approx(mean_over_prompts(lines, value)), name
        assert metrics[name]["prompts"] == len(PROMPTS)
    total = 2 * metrics["reward_length"]["mean"] + metrics["reward_rm"]["mean"]
    assert metrics["score"]["mean"] == pytest.approx(total)


def test_a_pass_is_a_reward_of_at_least_the_threshold(evaluated):
    folder, results = evaluated
    lines = [x for x in lines_of(folder, "measures") if x["measure"] == "reward_rm"]
    lines = [x for x in lines if x["policy"] == "b" and x["temperature"] == 1.0]
    passes = of_policy(results, "b")["pass_at_k"]
    once = mean_over_prompts(lines, lambda x: x["value"] >= -0.6)
    assert 0 < once < 1
    assert passes["1"]["mean"] == pytest.approx(once)
    assert passes["2"]["mean"] > once


def test_the_best_of_n_rises_and_the_best_of_one_is_the_mean(evaluated):
    _, results = evaluated
    entry = of_policy(results, "b")
    curve = entry["best_of_n"]
    for name in entry["metrics"]:
        assert curve["1"][name]["mean"] == pytest.approx(entry["metrics"][name]["mean"]), name
    means = [curve[n]["score"]["mean"] for n in "123"]
    assert means == sorted(means)
    assert means[0] < means[2]


def test_differences_and_win_rates_are_paired(evaluated):
    folder, results = evaluated
    (entry,) = (x for x in results["comparisons"] if x["temperature"] == 0.6)
    assert (entry["policy"], entry["baseline"]) == ("b", "a")
    ours, theirs = (of_policy(results, x, 0.6)["metrics"] for x in "ba")
    for name, difference in entry["differences"].items():
        if ours[name]["prompts"] == theirs[name]["prompts"] == len(PROMPTS):
            mean = ours[name]["mean"] - theirs[name]["mean"]
            assert difference["mean"] == pytest.approx(mean, abs=1e-9), name
    values = {
        (x["policy"], x["row"], x["sample"]): x["value"]
        for x in lines_of(folder, "measures")
        if x["measure"] == "reward_rm" and x["temperature"] == 0.6
    }
    pairs = [(values[("b", *at)], values[("a", *at)]) for p, *at in values if p == "b"]
    won = entry["win_rates"]["reward_rm"]
    assert won["wins"] == sum(b > a for b, a in pairs)
    assert won["wins"] + won["ties"] + won["losses"] == len(pairs)
    assert won["rate"]["mean"] == pytest.approx((won["wins"] + won["ties"] / 2) / len(pairs))


def test_the_tables_show_what_the_json_holds(evaluated):
    folder, results = evaluated
    text = (folder / "out" / "results.md").read_text()
    mean = of_policy(results, "b", 0.6)["metrics"]["kl"]
    assert f"{mean['mean']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]" in text
    for title in ("Means over 6", "pass@k", "best of n", "Difference to a", "Win rates against a"):
        assert re.search(f"^## .*{title}", text, re.MULTILINE), title


# -- what decides a response ---------------------------------------------------------------------


def responses(folder: Path) -> dict[tuple[Any, ...], list[int]]:
    return {
        (x["policy"], x["temperature"], x["row"], x["sample"]): x["tokens"]
        for x in lines_of(folder, "samples")
    }


def test_batches_and_ranks_do_not_matter(folder):
    results = results_of(folder, reference=str(folder / "b"), rouge_column="summary")
    expected = responses(folder)
    assert len({tuple(tokens) for tokens in expected.values()}) > 12, "responses are all alike"
    shutil.rmtree(folder / "out")
    config = config_for(
        folder, reference=str(folder / "b"), rouge_column="summary", rollout={"batch_size": 24}
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    launch = "-m accelerate.commands.accelerate_cli launch --cpu --num_processes 2"
    launch += " --num_cpu_threads_per_process 1 --main_process_port 0 -m marlhf evaluate"
    done = subprocess.run(
        [warm_python.command(), *launch.split(), str(folder / "config.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Means over") == 1
    assert responses(folder) == expected
    assert len(lines_of(folder, "samples")) == len(expected)
    found = json.loads((folder / "out" / "results.json").read_text())
    assert close(found, results)


def close(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == b or (isinstance(a, float) and a == pytest.approx(b, abs=1e-4))


def test_policies_with_the_same_weights_answer_alike(folder):
    policies = [str(folder / "b"), str(folder / "run")]
    results = results_of(folder, policies=policies)
    found = responses(folder)
    assert all(found[("run", *at)] == tokens for (p, *at), tokens in found.items() if p == "b")
    (entry,) = results["comparisons"]
    assert entry["differences"]["length"]["mean"] == 0
    assert entry["win_rates"]["score"]["rate"]["mean"] == 0.5


def test_top_k_of_one_is_greedy(folder):
    results_of(folder, policies=str(folder / "a"), rollout={"top_k": 1, "responses_per_prompt": 1})
    model = AutoModelForCausalLM.from_pretrained(folder / "a").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "a")
    for line in lines_of(folder, "samples"):
        ids = tokenizer(line["prompt"], return_tensors="pt")["input_ids"]
        for token in line["tokens"]:
            assert int(model(ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_held_out_rows_are_those_of_training(folder):
    results = results_of(folder, data={"eval_rows": 2})
    assert results["prompts"] == 2
    assert {x["prompt"] for x in lines_of(folder, "samples")} == set(PROMPTS[-2:])


def test_a_reward_that_does_not_apply_leaves_its_prompts_out(folder):
    rows = [{"prompt": p, "summary": None if i < 2 else p} for i, p in enumerate(PROMPTS)]
    (folder / "gaps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = results_of(
        folder,
        data={"path": str(folder / "gaps.jsonl")},
        rewards=[{"name": "rouge", "metric": "rouge1"}],
    )
    metrics = of_policy(results, "a")["metrics"]
    assert metrics["reward_rouge"]["prompts"] == metrics["score"]["prompts"] == 4
    assert metrics["length"]["prompts"] == 6
    assert results["comparisons"][0]["win_rates"]["score"]["rate"]["prompts"] == 4


# -- going on ------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_goes_on_where_it_stopped(folder, loads):
    expected = results_of(folder, reference=str(folder / "a"))
    assert loads == ["a", "b", "a"]
    path = folder / "out" / "samples.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]) + lines[-3][: len(lines[-3]) // 2])
    loads.clear()
    assert results_of(folder, reference=str(folder / "a")) == expected
    assert loads == ["b"]
    kept = len(b"".join(lines[:-3]))
    assert path.read_bytes()[:kept] == whole[:kept]
    assert len(path.read_bytes().splitlines()) == len(lines)
    loads.clear()
    assert results_of(folder, reference=str(folder / "a")) == expected
    assert loads == []


def test_ctrl_c_loses_one_batch_at_most(folder, monkeypatch):
    expected = results_of(folder)
    shutil.rmtree(folder / "out")
    batches, generate = [], TransformersEngine.generate

    def interrupted(engine: Any, prompts: Any, *arguments: Any) -> Any:
        batches.append(len(prompts))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return generate(engine, prompts, *arguments)

    monkeypatch.setattr(TransformersEngine, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results_of(folder)
    assert len(lines_of(folder, "samples")) == sum(batches[:2]) == 10
    assert results_of(folder) == expected
    assert sum(batches) == batches[2] + 2 * 2 * len(PROMPTS)


def test_a_run_that_dies_in_a_reward_keeps_its_responses(folder, loads, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "shaky.py").write_text(
        "broken = True\n"
        "def reward(prompts, completions):\n"
        "    if broken and 'x' in prompts: raise OSError('no')\n"
        "    return [1.0] * len(prompts)\n"
    )
    with pytest.raises(Exception, match="reward reward: row"):
        results_of(folder, rewards="shaky.reward")
    assert len(lines_of(folder, "measures")) == 5
    __import__("shaky").broken = False
    loads.clear()
    results = results_of(folder, rewards="shaky.reward")
    assert loads == []
    assert of_policy(results, "b")["metrics"]["score"]["mean"] == 1


def test_more_of_everything_samples_only_what_is_new(folder, loads):
    results_of(folder, policies={"a": str(folder / "a")})
    before = responses(folder)
    loads.clear()
    results_of(folder, temperatures=[1.0, 0.5], rollout={"responses_per_prompt": 3})
    after = responses(folder)
    assert loads == ["a", "b"]
    assert len(lines_of(folder, "samples")) == len(after) == 2 * 2 * 3 * len(PROMPTS)
    assert before.items() <= after.items()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"rollout": {"max_new_tokens": 8}},
        {"data": {"limit": 5, "prompt_column": "summary"}},
    ],
    ids=lambda x: next(iter(x)),
)
def test_other_settings_are_refused_until_told_to_overwrite(changes, folder, loads):
    results_of(folder)
    before = responses(folder)
    loads.clear()
    with pytest.raises(UserError, match=r"output_dir.*overwrite=true"):
        results_of(folder, **changes)
    assert loads == []
    assert responses(folder) == before
    results_of(folder, **changes, overwrite=True)
    assert responses(folder) != before


def test_a_policy_trained_anew_is_noticed(folder):
    results_of(folder)
    (folder / "b").unlink()
    shutil.copytree((folder / "a").resolve(), folder / "b")
    with pytest.raises(UserError, match="responses of 'b' that were sampled by another model"):
        results_of(folder)


def test_a_reward_with_other_settings_is_computed_anew(folder):
    before = results_of(folder)
    reward = {"name": "length", "target": 3, "unit": "characters"}
    after = results_of(folder, rewards=[reward])
    shutil.rmtree(folder / "out")
    assert after == results_of(folder, rewards=[reward])
    assert after != before


def test_a_reward_whose_code_has_changed_is_computed_anew(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    scores = []
    for number in (1.0, 2.0):
        code = f"def score(prompts, completions):\n    return [{number}] * len(prompts)\n"
        (folder / "of_ours.py").write_text(code)
        sys.modules.pop("of_ours", None)
        results = results_of(folder, rewards=["of_ours.score"])
        scores.append(results["policies"][0]["metrics"]["score"]["mean"])
    assert scores == [1.0, 2.0]


@pytest.mark.parametrize(
    "bad",
    ["nonsense", '{"no": 1}', '{"k": ["a", "list"]}', "[" * 100_000, "[]", "\0\0", '{"k": "\udc80'],
    ids=lambda text: ascii(text)[:12],
)
def test_records_are_kept_whatever_else_is_in_the_file(bad, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    line = bad.encode("utf-8", "surrogateescape") + b"\n"
    path.write_bytes(b'{"k": 1}\n' + line + b'{"k": "\xc3\xa9", "v": 2}\n{"k": 2, "v"')
    records = Records(path, ["k"])
    assert list(records.lines) == [(1,), ("é",)]
    assert path.read_bytes() == b'{"k": 1}\n{"k": "\xc3\xa9", "v": 2}\n'
    assert (tmp_path / "x.jsonl.bad").read_bytes() == line
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("line 2 is no record and moved to x.jsonl.bad; all others are kept")
    records.append([{"k": "é", "v": 3}])
    assert Records(path, ["k"]).lines[("é",)] == {"k": "é", "v": 3}


@pytest.mark.parametrize("name", ["samples", "measures"])
def test_a_line_that_is_no_record_costs_that_line_alone(name, folder, loads):
    before = results_of(folder)
    path = folder / "out" / f"{name}.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {"policy": ["a"]})
    lines[4] = json.dumps(json.loads(lines[4]) | {"fingerprint": None})
    path.write_text("".join(line + "\n" for line in lines))
    loads.clear()
    assert results_of(folder) == before
    assert len(lines_of(folder, name)) == len(lines)
    assert len(loads) == (name == "samples")  # one policy, to sample two responses anew


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("policies=[]", "policies: & a list of at least 1"),
        ("policies=nowhere/at/all", "policies: & nowhere/at/all"),
        ("policies={b: nowhere/at/all}", "policies.b: & nowhere/at/all"),
        ("policies=[run, other/run]", "policies: & 'run' & {label: path}"),
        ("policies=rm", "policies: & weights"),
        ("policies=small", "policies: the tokenizer has 259 tokens, the model 64"),
        ("baseline=c", "baseline: given 'c' & a, b"),
        ("policies=a baseline=a", "baseline: needs two policies"),
        ("reference=other", "reference: & other tokens than policies.a"),
        ("best_of=[1,9]", "best_of: given 9 & rollout.responses_per_prompt=2"),
        ("pass_at.k=[3]", "pass_at.k: given 3 & responses_per_prompt=2"),
        ("pass_at.k=[1] rewards=[]", "pass_at.k: needs `rewards`"),
        ("pass_at.reward=rouge", "pass_at.reward: given 'rouge' & length"),
        ("rewards=lenght", "lenght & length"),
        ("rewards={name: rouge, column: absent}", "needs the column 'absent' & summary"),
        ("rouge_column=absent", "needs the column 'absent'"),
        ("temperatures=[1,1.0]", "temperatures: & twice"),
        ("temperatures=[0]", "temperatures & above 0"),
        ("data.shuffle=false", "data.shuffle: given false"),
        ("data.path=null", "data.path: missing"),
        ("data.eval_rows=6", "data.eval_rows: given 6"),
        ("rollout.max_new_tokens=300", "rollout.max_new_tokens: given 300 & 256"),
        ("rollout.min_new_tokens=10", "rollout.min_new_tokens: given 10"),
        ("resamples=5", "resamples: given 5 & at least 100"),
        ("output_dir=data.jsonl", "output_dir: given 'data.jsonl', which is a file"),
        ("output_dir=trained", "output_dir: 'trained' holds a training run"),
        ("policy=a", "policy: unknown key & policies"),
    ],
)
def test_bad_input_is_one_line(words, fragments, folder, monkeypatch, capfd, loads):
    (folder / "trained").mkdir()
    (folder / "trained" / "metrics.jsonl").touch()
    monkeypatch.chdir(folder)
    config = config_to_dict(config_for(folder))
    config |= {"policies": {"a": "a", "b": "b"}, "output_dir": "out"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if words == "policies=rm":
        words = f"policies={folder / 'empty'}"
        (folder / "empty").mkdir()
        shutil.copy(folder / "a" / "config.json", folder / "empty")
    given = re.findall(r"\S+?=(?:\{.*?\}|\[.*?\]|\S+)", words)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "config.yaml", *given])
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("marlhf: ")]
    assert end.value.code == 2
    assert len(lines) == 1, error
    assert "Traceback" not in error
    for fragment in fragments.split(" & "):
        assert fragment in lines[0]
    assert loads == []
    assert not (folder / "out" / "config.yaml").exists()
