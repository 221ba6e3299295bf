"""Servers of vLLM that hold the policy's weights, on real `vllm serve` (`make test-vllm`)."""

from __future__ import annotations

import json
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launches import PROFILES, accelerate, first_error, metrics, ppo_folder
from support.launches import run as run_python
from support.runs import PROMPTS, tiny_config, vowels
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm
from support.vllm_models import SIZES, TOKENS, gap
from support.vllm_servers import VLLMServer, save_model, vllm_servers

from marlhf import PPOTrainer
from marlhf.common.errors import ReportedError, UserError
from marlhf.common.types import Generation
from marlhf.config import ImportanceSettings, LoraSettings, RolloutSettings
from marlhf.distributed import Distributed
from marlhf.models.adapters import add_adapter
from marlhf.models.policy import Policy
from marlhf.rewards.calls import RewardError
from marlhf.rollout.engine import EngineContext, build_engine, start_engine
from marlhf.rollout.policy_weights import policy_weights

pytest.importorskip("vllm", reason="vLLM pins other versions: make test-vllm")

TIED = {"tie_word_embeddings": True}
HANGS = {"timeout_seconds": 6.0}  # a token of these models takes milliseconds, once it is warm


def lm_of(family: str = "llama", **changes: Any) -> Any:
    return tiny_causal_lm(family, BYTES_VOCAB, **{**SIZES, **changes})


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VLLMServer]]:
    """Two with the tied Llama, one with a Qwen3, one with a Gemma."""
    folder = tmp_path_factory.mktemp("servers")
    llama = save_model(lm_of(**TIED), folder / "llama")
    others = [save_model(lm_of(family), folder / family) for family in ("qwen3", "gemma")]
    with vllm_servers(folder, [llama, llama, *others]) as servers:
        yield servers


def spec(servers: list[VLLMServer], **arguments: Any) -> dict[str, Any]:
    addresses = [server.address for server in servers]
    return {"name": "vllm", "address": addresses, **arguments}


def started(policy: Policy, servers: list[VLLMServer], **arguments: Any) -> Any:
    context = EngineContext(policy, byte_tokenizer(add_bos=True), Distributed(), 120)
    engine = start_engine(build_engine(spec(servers, **arguments)), context)
    engine.update_weights(policy_weights(policy))
    return engine


def sampled(engine: Any, prompts: Any = TOKENS, **settings: Any) -> Generation:
    seeds = list(range(len(prompts)))
    return engine.generate(prompts, seeds, RolloutSettings(**{"max_new_tokens": 24, **settings}))


def tokens_of(server: VLLMServer) -> float:
    """Tokens that a server has sampled since its start."""
    with urllib.request.urlopen(f"{server.address}/metrics") as answer:
        text = answer.read().decode()
    return float(re.findall(r"^vllm:generation_tokens_total\S* (\S+)$", text, re.M)[0])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["tied", "qwen3", "gemma"])
def test_log_probabilities_agree_after_every_update(
    servers: list[VLLMServer], family: str, lora: bool
) -> None:
    lm = lm_of(**TIED) if family == "tied" else lm_of(family)
    of_family = {"tied": servers[:2], "qwen3": servers[2:3], "gemma": servers[3:]}[family]
    policy = Policy(lm, eos_ids=[1])
    if family == "gemma":  # which scales its embeddings, so that every token would predict itself
        policy.model.get_input_embeddings().weight.data.mul_(0.2)
    if lora:
        policy.model = add_adapter(policy.model, LoraSettings(r=4), "policy")
        policy.adapter = "policy"
    engine = started(policy, of_family)
    before = [tokens_of(server) for server in of_family]
    for _ in range(3):
        generation = sampled(engine, temperature=0.8)
        assert gap(policy, generation, 0.8) < 1e-4
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        assert gap(policy, generation, 0.8) > 1e-2  # servers that lag behind would be seen
        engine.update_weights(policy_weights(policy))
    engine.close()
    after = [tokens_of(server) for server in of_family]
    assert all(b > a for a, b in zip(before, after, strict=True))  # all had a share


def test_seeds_decide_and_settings_are_honoured(servers: list[VLLMServer]) -> None:
    engine = started(Policy(lm_of(**TIED), eos_ids=[1]), servers[:2])
    first, again, alone = sampled(engine), sampled(engine), sampled(engine, TOKENS[:1])
    assert first.response_ids.tolist() == again.response_ids.tolist()
    assert alone.responses == first.responses[:1]
    stop = byte_tokenizer(add_bos=True).decode(first.responses[2][3:4])
    stopped = sampled(engine, stop_strings=[stop], min_new_tokens=4)
    assert 4 <= len(stopped.responses[2]) <= 24
    greedy = sampled(engine, top_k=1)
    assert greedy.logprobs is not None
    assert float(greedy.logprobs.abs().max()) == 0  # those of the tokens that are left
    engine.close()


def test_an_update_that_was_broken_off_is_begun_again(servers: list[VLLMServer]) -> None:
    """As by a trainer that was killed; the next one uses the same servers."""
    policy = Policy(lm_of(**TIED), eos_ids=[1])
    started(policy, servers[:1])
    start = f"{servers[0].address}/start_weight_update"
    urllib.request.urlopen(urllib.request.Request(start, method="POST")).close()
    engine = started(policy, servers[:1])
    assert gap(policy, sampled(engine)) < 1e-3
    engine.close()


def test_two_runs_on_one_server_are_noticed(servers: list[VLLMServer]) -> None:
    first = started(Policy(lm_of(**TIED), eos_ids=[1]), servers[:1])
    second = started(Policy(lm_of(**TIED), eos_ids=[1]), servers[:1])
    with pytest.raises(ReportedError, match="sampled with other weights than the run's"):
        sampled(first)
    second.close()


def test_what_does_not_fit_is_a_line_at_the_start(servers: list[VLLMServer]) -> None:
    address = re.escape(servers[0].address)
    other = Policy(lm_of(**TIED, num_hidden_layers=3), eos_ids=[1])
    line = f"rollout.engine: the server {address} has another model, .*num_hidden_layers 2, the po"
    with pytest.raises(UserError, match=line):
        started(other, servers[:1])
    context = EngineContext(Policy(lm_of(**TIED)), byte_tokenizer(), Distributed(), 129)
    with pytest.raises(UserError, match=r"has max_model_len=128, but .* --max-model-len 129"):
        start_engine(build_engine(spec(servers[:1])), context)


def run(folder: Path, servers: list[VLLMServer], die_at: int | None = None, **sections: Any) -> Any:
    """Rows of metrics without what a clock or the machine says, from a run of four updates.

    die_at   raise in this update
    """
    calls: list[int] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        calls.append(len(prompts))
        if len(calls) == die_at:
            raise RuntimeError("the end")
        return vowels(prompts, completions)

    rollout = {"ahead": 1, "importance": ImportanceSettings(), "engine": spec(servers)}
    config = tiny_config(
        folder,
        steps=4,
        overwrite=False,
        checkpoint={"every": 1},
        optimizer={"learning_rate": 0.0003},
        rollout=rollout | sections.pop("rollout", {}),
        **sections,
    )
    PPOTrainer(
        config,
        reward=reward,
        train_dataset=PROMPTS,
        model=lm_of(**TIED),
        tokenizer=byte_tokenizer(add_bos=True),
    ).train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("_seconds", "_per_second", "_gb")
    return [{k: v for k, v in row.items() if not k.endswith(measured)} for row in rows]


def test_sampling_ahead_resumes_at_the_boundary(servers: list[VLLMServer], tmp_path: Path) -> None:
    complete = run(tmp_path / "complete", servers[:2])
    assert [row["sampling_lag"] for row in complete] == [0, 1, 1, 1]
    assert complete[0]["engine_kl"] < 1e-6 < min(row["engine_kl"] for row in complete[1:])
    assert max(row["engine_kl"] for row in complete) < 0.1
    with pytest.raises(RewardError, match="the end"):
        run(tmp_path / "stopped", servers[:2], die_at=3)
    resumed = run(tmp_path / "stopped", servers[1::-1], resume="auto")
    assert_close(resumed, complete)


def assert_close(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """The same metrics, but for rounding."""
    for row, other in zip(rows, others, strict=True):
        numbers = {name: value for name, value in other.items() if value is not None}
        assert {name for name, value in row.items() if value is not None} == numbers.keys()
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-4)


def test_two_ranks_share_the_servers(servers: list[VLLMServer], tmp_path: Path) -> None:
    """Under ZeRO-2, by the profile for servers, one update ahead: as one process does."""
    rollout = {"ahead": 1, "importance": {"cap": 2.0}, "engine": spec(servers[:2])}
    ppo_folder(
        tmp_path,
        "def score(prompts, completions): return [float(len(set(c))) for c in completions]",
        steps=3,
        rollout={"batch_size": 4, "max_prompt_length": 16, "max_new_tokens": 8, **rollout},
        data={"path": "prompts.jsonl", "eval_rows": 3},
        log={"tensorboard": False, "progress": False, "eval_every": 1},
        optimizer={"eps": 0.1},
    )
    lm_of(**TIED).save_pretrained(tmp_path / "model")
    two = [*accelerate(PROFILES / "servers.yaml"), "--num_processes", "2"]
    for name, command in (("one", []), ("two", two)):
        arguments = ["-m", "marlhf", "ppo", "my_run.yaml", f"output_dir={name}"]
        done = run_python([*command, *arguments], folder=tmp_path, warm=False)
        assert done.returncode == 0, first_error(done)
    one, both = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [row.get("sampling_lag") for row in one] == [None, 0, 1, 1]
    assert_close(both, one)


LONG = RolloutSettings(max_new_tokens=110, min_new_tokens=110)
MANY = [TOKENS[i % 4] for i in range(128)]


def signalled(engine: Any, server: VLLMServer, number: int, whole: bool = True) -> list[list[int]]:
    """Many responses, a signal being sent to a server, or its engine, in the middle of them."""
    before = tokens_of(server)
    wait = engine.begin(MANY, range(len(MANY)), LONG)
    while tokens_of(server) < before + 100:
        time.sleep(0.01)
    (server.signal if whole else server.signal_engine)(number)
    return wait().responses


def test_a_server_that_hangs_is_named_and_the_run_stops_or_continues(
    servers: list[VLLMServer], capsys: pytest.CaptureFixture[str]
) -> None:
    policy = Policy(lm_of(**TIED), eos_ids=[1])
    stopping = started(policy, servers[:2], **HANGS)
    usual = stopping.generate(MANY, range(len(MANY)), LONG).responses
    first = servers[0]
    line = f"the server {re.escape(first.address)} hangs: no token within timeout_seconds=6"
    begin = time.monotonic()
    with pytest.raises(ReportedError, match=line):
        signalled(stopping, first, signal.SIGSTOP)
    assert time.monotonic() - begin < 60
    first.signal(signal.SIGCONT)
    continuing = started(policy, servers[:2], on_failure="continue", **HANGS)
    responses = signalled(continuing, first, signal.SIGSTOP, whole=False)
    assert responses == usual  # none is lost
    assert re.search(
        f"marlhf: rollout.engine: {line}.*continues with the other 1", capsys.readouterr().err
    )
    continuing.update_weights(policy_weights(policy))
    assert gap(policy, sampled(continuing)) < 1e-3
    first.signal(signal.SIGCONT)


def test_a_server_that_hangs_in_an_update_is_named(servers: list[VLLMServer]) -> None:
    policy = Policy(lm_of(**TIED), eos_ids=[1])
    engine = started(policy, servers[:2], on_failure="continue", **HANGS)
    servers[0].signal(signal.SIGSTOP)
    engine.update_weights(policy_weights(policy))
    servers[0].signal(signal.SIGCONT)
    assert gap(policy, sampled(engine)) < 1e-3
    engine.close()


def test_a_server_that_is_killed_is_named_and_the_run_continues(
    servers: list[VLLMServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last test: its servers are gone."""
    policy = Policy(lm_of(**TIED), eos_ids=[1])
    engine = started(policy, servers[:2], on_failure="continue", **HANGS)
    usual = engine.generate(MANY, range(len(MANY)), LONG).responses
    assert signalled(engine, servers[1], signal.SIGKILL) == usual
    assert re.search(f"the server {servers[1].address} does not answer", capsys.readouterr().err)
    line = r"does not answer \(Connection refused\)"
    with pytest.raises(UserError, match=f"address: the server {servers[1].address} {line}"):
        build_engine(spec(servers[:2]))
    servers[0].signal(signal.SIGKILL)
    with pytest.raises(ReportedError, match="it was the last of 2"):
        sampled(engine)
