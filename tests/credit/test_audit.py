"""`marlhf audit` on a policy whose responses can be listed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.audits import audit, build_model, letters, train
from support.browser import browser, faults
from transformers import AutoModelForSequenceClassification

from marlhf.cli import main
from marlhf.config import PPOConfig
from marlhf.config.loading import load_config
from marlhf.credit import results
from marlhf.credit.arms import arm_config, arm_of
from marlhf.credit.audit import rollout_of
from marlhf.credit.gradients import inner_products, prompt_gradient, sketch
from marlhf.credit.results import Evidence
from marlhf.credit.trained_run import TrainedRun, chosen_checkpoint, held_out_prompts, load_run
from marlhf.credit.truth import Part, ReturnStore
from marlhf.runs.metrics import Timer
from marlhf.runs.rollouts import KeptRollout, read_part, read_rollout
from marlhf.segmenters import build_segmenter

ARMS = {
    "token": "segmenter=token ppo.lam=1",
    "rloo": "ppo.estimator=rloo",
    "monte_carlo": "ppo.estimator=monte_carlo",
    "outsider": "ppo.estimator=support.audits.return_to_go",
}
WORDS = ["--prompts", "12", "--responses", "2"]
ALL = [*WORDS, *[word for arm in ARMS.values() for word in ("--arm", arm)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return train(folder, log={"rollouts_every": 1})


@pytest.fixture(scope="module")
def audited(run: Path) -> dict[str, Any]:
    return audit(run, *ALL)


@pytest.fixture(scope="module")
def loaded(run: Path) -> TrainedRun:
    config = arm_config(run, [], {"rollout": {"responses_per_prompt": 2}})
    return load_run(config, chosen_checkpoint(run, None), held_out_prompts(config, None, 12))


def kept_of(run: Path) -> KeptRollout:
    return read_part(run / "audit" / "rollouts" / "part-0.safetensors")


def part_of(run: Path, loaded: TrainedRun) -> Part:
    prompts = [p for p in loaded.prompts[:8] for _ in range(2)]
    return Part(prompts, rollout_of(kept_of(run), prompts, loaded.worker), 0)


def evidence_of(run: Path, loaded: TrainedRun) -> Evidence:
    """That of the first eight prompts, at all tokens."""
    kept, part = kept_of(run), part_of(run, loaded)
    places = kept.tensors["response_mask"]
    store = ReturnStore.of(run / "audit", loaded.worker, loaded.kl_coef)
    returns = store.returns(part, places, 0, 8)
    return Evidence(kept, 2, places, returns, loaded.kl_coef, loaded.config.ppo.gamma)


@torch.no_grad()
def value_of(loaded: TrainedRun, prompt: list[int], begun: list[int]) -> float:
    """Expected reward, less the KL penalty of the tokens to come, by listing them."""
    worker: Any = loaded.worker
    if len(begun) == 4:
        return letters([], [worker.tokenizer.decode(begun)])[0]
    logits = []
    policies: tuple[Any, ...] = worker.policy, worker.reference
    for policy in policies:
        row = policy.model(input_ids=torch.tensor([prompt + begun])).logits[0, -1].double()
        row[worker.policy.eos_ids] = -torch.inf
        logits.append(row)
    of_policy, of_reference = (x.log_softmax(0) for x in logits)
    top = logits[0].topk(2)
    value = 0.0
    for p, token in zip(top.values.softmax(0).tolist(), top.indices.tolist(), strict=True):
        penalty = loaded.kl_coef * float(of_policy[token] - of_reference[token])
        value += p * (value_of(loaded, prompt, [*begun, token]) - penalty)
    return value


@pytest.fixture(scope="module")
def exact(audited: dict[str, Any], run: Path, loaded: TrainedRun) -> torch.Tensor:
    """[B,T] values of the prefixes of the first eight prompts' responses."""
    generation = part_of(run, loaded).rollout.generation
    known: dict[tuple[int, ...], float] = {}
    values = torch.zeros(generation.response_ids.shape, dtype=torch.float64)
    for b, (prompt, response) in enumerate(
        zip(generation.prompts, generation.responses, strict=True)
    ):
        for t in range(len(response)):
            key = (*prompt, -1, *response[:t])
            if key not in known:
                known[key] = value_of(loaded, prompt, response[:t])
            values[b, t] = known[key]
    return values


# --- the truth


def test_the_truth_is_that_of_an_enumeration(
    exact: torch.Tensor, run: Path, loaded: TrainedRun
) -> None:
    evidence = evidence_of(run, loaded)
    returns, wanted = evidence.returns_BTK[evidence.places], exact[evidence.places]
    z = (returns.mean(1) - wanted) / (returns.var(1).mean() / 8).sqrt()  # one noise for all
    assert float(z.abs().max()) < 5
    assert float((z**2).mean()) < 2
    for row in results.by_position(evidence):
        of_position = exact[:, row["first"] : row["last"] + 1]
        assert row["truth"]["low"] < float(of_position.mean()) < row["truth"]["high"]


def test_a_perfect_critic_is_not_accused_and_a_spoilt_one_is(
    exact: torch.Tensor, run: Path, loaded: TrainedRun
) -> None:
    evidence = evidence_of(run, loaded)

    def with_critic(values: torch.Tensor) -> dict[str, Any]:
        kept = replace(evidence.kept, tensors=evidence.kept.tensors | {"values": values})
        numbers = results.of_critic(replace(evidence, kept=kept))
        assert numbers is not None
        return numbers

    perfect = with_critic(exact)
    assert perfect["verdict"] == "better than a constant"
    assert perfect["bias"]["low"] < 0 < perfect["bias"]["high"]
    assert perfect["explained"]["high"] > 0.99
    high = with_critic(exact + 1)
    assert high["bias"]["low"] > 0.5
    assert high["verdict"] == "better than a constant"
    generator = torch.Generator().manual_seed(0)
    noise = exact.mean() + exact.std() * torch.randn(exact.shape, generator=generator)
    assert with_critic(noise)["verdict"] == "worse than a constant"
    shuffled = exact[torch.randperm(len(exact), generator=generator)]
    assert with_critic(shuffled)["verdict"] != "better than a constant"


def test_a_run_whose_critic_is_noise_is_found_out(folder: Path) -> None:
    def spoil(trainer: Any) -> None:
        torch.manual_seed(0)
        trainer.critic.model.head.weight.normal_()

    numbers = audit(train(folder, "noise", spoil), *WORDS)
    assert numbers["critic"]["verdict"] == "worse than a constant"
    assert numbers["critic"]["error"]["low"] > 1


def test_another_critic_is_judged_in_place_of_the_runs(
    audited: dict[str, Any],
    folder: Path,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    noise = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    torch.manual_seed(0)
    with torch.no_grad():
        noise.score.weight.normal_()
    noise.save_pretrained(tmp_path / "noise")
    words = [*WORDS, "--critic", str(tmp_path / "noise"), "--arm", ARMS["rloo"]]
    with pytest.raises(SystemExit):
        main(["audit", str(run), *words])
    assert "holds an audit of another checkpoint, critic or prompts" in capsys.readouterr().err

    words += ["--output", str(tmp_path / "audit")]
    numbers = audit(run, *words)
    assert "noise: worse than a constant." in capsys.readouterr().out.replace("\n", "")
    of_noise = {arm["label"]: arm for arm in numbers["arms"]}
    of_run = {arm["label"]: arm for arm in audited["arms"]}
    assert of_noise["the run"]["values"]["error"]["low"] > 1
    assert of_noise[ARMS["rloo"]]["rank"] == of_run[ARMS["rloo"]]["rank"]  # the same responses
    with torch.no_grad():
        noise.score.weight.normal_()
    noise.save_pretrained(tmp_path / "noise")
    with pytest.raises(SystemExit):
        main(["audit", str(run), *words])


def test_arms_are_told_apart(audited: dict[str, Any]) -> None:
    arms = {arm["label"]: arm for arm in audited["arms"]}
    assert list(arms) == ["the run", *ARMS.values()]
    sampled, rloo = arms[ARMS["monte_carlo"]], arms[ARMS["rloo"]]
    assert sampled["values"]["verdict"] == "better than a constant"
    assert sampled["rank"]["corrected"]["low"] > rloo["rank"]["corrected"]["high"]
    assert rloo["values"] is None
    assert arms[ARMS["token"]]["macro_actions"] == 2 * arms["the run"]["macro_actions"] == 96
    for arm in arms.values():
        assert 0 < arm["rank"]["reliability"]["value"] <= 1
        assert arm["gradient"]["variance"] > 0
    assert audited["prefixes"] == 96
    assert arms[ARMS["token"]]["finest"] == arms[ARMS["token"]]["rank"]


def test_finest_agreement_is_that_of_tokens_and_their_macro_actions(
    audited: dict[str, Any], run: Path, loaded: TrainedRun
) -> None:
    """By loops, over the 64 tokens of the first eight prompts."""
    evidence = evidence_of(run, loaded)
    config = arm_config(run, [], {"rollout": {"responses_per_prompt": 2}})
    arm = arm_of("the run", evidence.kept, config, loaded.worker.tokenizer, own_kl=True)
    starts = arm.batch.segment_ids.diff(dim=1, prepend=torch.tensor([[-1]] * 16)) != 0
    numbers = results.of_advantages(evidence, arm, starts)
    assert numbers["macro_actions"] == 32
    tokens = evidence.kept.token_data(evidence.kl_coef)
    rewards = (tokens.kl_rewards + tokens.task_rewards).tolist()
    values = evidence.returns_BTK.mean(2).tolist()
    x, truth = [], []
    for b in range(16):
        for t in range(4):
            after = values[b][t + 1] if t < 3 else 0.0
            truth.append(rewards[b][t] + after - values[b][t])
            x.append(float(arm.batch.advantages_BM[b, t // 2]))

    ranks = torch.tensor([midranks(x), midranks(truth)], dtype=torch.float64)
    wanted = torch.corrcoef(ranks)[0, 1]
    assert numbers["finest"]["measured"]["value"] == pytest.approx(float(wanted), abs=1e-9)
    assert numbers["finest"]["measured"] != numbers["rank"]["measured"]


def test_with_fewer_places_stretches_between_them_are_compared(
    run: Path, loaded: TrainedRun, audited: dict[str, Any]
) -> None:
    """By loops, over stretches of two tokens; token-level PPO gives each of them two advantages."""
    evidence = evidence_of(run, loaded)
    places = evidence.places & (torch.arange(4) % 2 == 0)
    config = arm_config(run, ["segmenter=token"], {"rollout": {"responses_per_prompt": 2}})
    arm = arm_of("token", evidence.kept, config, loaded.worker.tokenizer, own_kl=True)
    few = replace(evidence, places=places)
    numbers = results.of_advantages(few, arm, evidence.places)
    tokens = evidence.kept.token_data(evidence.kl_coef)
    rewards = (tokens.kl_rewards + tokens.task_rewards).tolist()
    values, of_arm = evidence.returns_BTK.mean(2).tolist(), arm.batch.advantages_BM.tolist()
    x, truth = [], []
    for b in range(16):
        for t in (0, 2):
            after = values[b][t + 2] if t == 0 else 0.0
            truth.append(rewards[b][t] + rewards[b][t + 1] + after - values[b][t])
            x.append((of_arm[b][t] + of_arm[b][t + 1]) / 2)
    wanted = float(torch.corrcoef(torch.tensor([midranks(x), midranks(truth)]))[0, 1])
    assert numbers["finest"]["measured"]["value"] == pytest.approx(wanted, abs=1e-6)
    assert numbers["rank"] == dict.fromkeys(["measured", "corrected", "reliability"])
    assert numbers["sign"] == numbers["rank"]
    of_values = results.of_arm_values(few, arm, evidence.places, None)
    assert of_values is not None
    critic = results.of_critic(few)
    assert critic is not None
    for name in ("bias", "error", "explained"):
        assert of_values[name] == pytest.approx(critic[name], abs=1e-9)

    output = run / "audit-of-few"
    sampled = audit(run, *ALL, "--places", "2", "--output", str(output))
    assert sampled["prefixes"] == audited["prefixes"] / 2
    arms = {arm["label"]: arm for arm in sampled["arms"]}
    assert arms["the run"]["rank"] == arms["the run"]["finest"]  # it begins at the places
    assert arms[ARMS["token"]]["rank"]["measured"] is None
    of_all = {arm["label"]: arm for arm in audited["arms"]}
    for label in ("the run", ARMS["rloo"]):
        for name, estimate in of_all[label]["rank"].items():
            assert arms[label]["rank"][name] == pytest.approx(estimate, abs=1e-6)


def midranks(y: list[float]) -> list[float]:
    """Ranks, equal ones of which share their mean."""
    return [sum(v < w for v in y) + sum(v == w for v in y) / 2 for w in y]


# --- arms


@pytest.mark.parametrize("name", ["token", "rloo", "outsider"])
def test_arms_are_those_of_replay(name: str, run: Path, loaded: TrainedRun) -> None:
    """On a rollout that both can read; but for responses to compare, which the run has not."""
    kept, words = read_rollout(run, 1), ARMS[name].split()
    fixed = {"rollout": {"responses_per_prompt": 2}}
    tokenizer = loaded.worker.tokenizer
    arm = arm_of(name, kept, arm_config(run, words, fixed), tokenizer, own_kl=True)
    unused = ["critic.init=auto"] if name != "token" else []
    config = load_config(
        PPOConfig, run / "config.yaml", [*words, *unused, "rollout.responses_per_prompt=2"]
    )
    wanted = arm_of(name, kept, config, tokenizer, own_kl=True)
    assert torch.equal(arm.batch.advantages_BT, wanted.batch.advantages_BT)
    assert arm.batch.mask_BM.sum() > 0


def test_a_grid_of_arms(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["--grid", "segmenter=[token, {name: ngram, n: 2}]", "--grid", "ppo.lam=[0.5, 1]"]
    main(["replay", str(run), *grid])
    shown = capsys.readouterr().out
    assert shown.count("ppo.lam=0.5") >= 2
    assert shown.count("segmenter=token") >= 2


# --- the models of a checkpoint

KINDS: dict[str, dict[str, Any]] = {
    "adapters, an adapted KL": {
        "model": {"lora": {"r": 4}},
        "kl": {"target": 1e-3, "horizon": 8},
    },
    "a head on the policy": {"critic": {"init": "auto", "backbone": "policy"}},
    "a segmenter that learns": {"segmenter": {"name": "phrases", "min_count": 1}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_are_those_of_the_checkpoint(kind: str, folder: Path) -> None:
    seen: dict[str, Any] = {}

    def score(worker: Any, prompts: Any) -> Any:
        return worker(prompts, list(range(4)), -1, Timer(), held_out=True)

    def look(trainer: Any) -> None:
        seen["rollout"] = score(trainer.worker, trainer.eval_prompts[:4])
        learn = getattr(trainer.segmenter, "learn", lambda _: None)
        learn(seen["rollout"].responses.unpadded)
        seen["starts"] = trainer.segmenter(seen["rollout"].responses)
        seen["kl_coef"] = trainer.kl.in_rewards_coef

    run = train(folder, "kinds", look, overwrite=True, **KINDS[kind])
    config = arm_config(run, [])
    prompts = held_out_prompts(config, None, 4)
    loaded = load_run(config, chosen_checkpoint(run, None), prompts)
    rollout = score(loaded.worker, loaded.prompts)
    wanted = seen["rollout"]
    for x, y in (
        (rollout.responses.token_ids, wanted.responses.token_ids),
        (rollout.responses.logprobs, wanted.responses.logprobs),
        (rollout.responses.ref_logprobs, wanted.responses.ref_logprobs),
        (rollout.values, wanted.values),
        (loaded.segmenter(rollout.responses), seen["starts"]),
    ):
        assert torch.allclose(x, y, atol=1e-5)
    assert loaded.kl_coef == seen["kl_coef"]
    assert (loaded.kl_coef != 0.1) == ("kl" in KINDS[kind])
    assert float(wanted.log_ratio.abs().max()) > 0
    if "segmenter" in KINDS[kind]:
        assert not torch.equal(build_segmenter(config.segmenter)(wanted.responses), seen["starts"])


# --- gradients


def test_a_sketch_has_the_products_of_the_gradients(run: Path, loaded: TrainedRun) -> None:
    sequences = part_of(run, loaded).rollout.sequences
    generator = torch.Generator().manual_seed(0)
    exact, sketches = [], []
    for begin in (0, 2, 4):
        of_prompt = sequences.select(torch.arange(begin, begin + 2))
        credit = torch.randn(of_prompt.response_mask.shape, generator=generator)
        worker = loaded.worker
        gradient = prompt_gradient(
            worker.policy, loaded.trained, of_prompt, credit, loaded.config, worker.distributed
        )
        logprobs, _ = worker.policy(
            of_prompt.input_ids,
            of_prompt.attention_mask,
            of_prompt.response_mask,
            **loaded.config.logprob_settings,
        )
        wanted = torch.autograd.grad((logprobs * credit).sum(), loaded.trained)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gradient, wanted, strict=True))
        exact.append(torch.cat([g.reshape(-1) for g in wanted]).double())
        sketches.append(sketch(gradient))
    wanted = inner_products(exact)
    scale = wanted.diagonal().sqrt()
    errors = (inner_products(sketches) - wanted) / (scale[:, None] * scale)
    assert float(errors.abs().max()) < 5 * (2 / 4099) ** 0.5
    few = [g[:4000] for g in exact]  # each has a bucket of its own
    assert torch.allclose(inner_products([sketch([g]) for g in few]), inner_products(few))
    parts = [sketch(g.split(777)) for g in exact]
    assert torch.allclose(parts[0], sketch([exact[0]]))


# --- resuming


def test_an_interrupted_audit_continues_and_gives_the_same(
    audited: dict[str, Any], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "audit", copy)
    (copy / "rollouts" / "part-1.safetensors").unlink()
    file = copy / "returns.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["response"] < 16]
    file.write_text("".join(kept[:-3]) + kept[-3][:20])
    again = audit(run, *ALL, "--output", str(copy))
    for numbers in (again, audited):
        numbers.pop("seconds")
    assert again == audited
    assert sorted(file.read_text().splitlines()) == sorted(map(str.strip, lines))
    before = (copy / "audit.html").read_text()
    capsys.readouterr()
    audit(run, *ALL, "--arm", "ppo.lam=0", "--output", str(copy))
    assert "continuations" not in capsys.readouterr().err
    assert (copy / "audit.html").read_text() != before


def test_the_cost_is_shown_before_it_is_spent(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompts", "2", "--continuations", "2", "--output", str(tmp_path)]
    numbers = audit(run, *words)
    out, err = capsys.readouterr()
    # one prompt's responses: 2 tokens each after the second prefix, 4 after the first
    assert "continuations: 4 distinct prefixes of 2 responses, 8 samples, about 24 tokens" in err
    assert "2 responses to 2 held-out prompts; the truth" in " ".join(out.split())
    assert "2 prompts: intervals over so few are too narrow" in out
    assert numbers["responses"] == 2


# --- what is shown


def test_other_prompts_are_not_called_held_out(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "data.jsonl", "--prompts", "2", "--output", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        audit(run, *words)
    assert "2 responses to 2 prompts of data.jsonl; the truth" in " ".join(
        capsys.readouterr().out.split()
    )


def test_prefixes_are_counted_and_distinct_ones_as_they_are_continued(
    audited: dict[str, Any], run: Path
) -> None:
    lines = map(json.loads, (run / "audit" / "returns.jsonl").read_text().splitlines())
    assert sum(line["first"] == 0 for line in lines) == audited["distinct_prefixes"]
    assert audited["distinct_prefixes"] < audited["prefixes"] == 96


def test_tables_fit_80_columns_and_the_page_is_complete(
    audited: dict[str, Any],
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    audit(run, *ALL)
    shown = capsys.readouterr().out
    tables = [line for line in shown.splitlines() if not line.startswith(("Wrote", str(run)))]
    assert max(map(len, tables)) <= 80
    assert "…" not in shown
    for head in ("rank", "finest", "noise scale", "explained", "before", "token  "):
        assert head in shown
    page = (run / "audit" / "audit.html").read_text()
    assert page.count("<svg") >= 3
    assert page.count("<h3>the truth</h3>") == 3
    assert all(f"<h3>{arm}</h3>" in page for arm in ARMS.values())


def test_the_page_in_a_browser(audited: dict[str, Any], run: Path) -> None:
    with browser() as page:
        assert faults(page, run / "audit" / "audit.html") == []
