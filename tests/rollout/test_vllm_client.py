"""The client of vLLM's servers against a small server of its endpoints.

That real servers have these endpoints is for `test_vllm_servers`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from support.small_vllm import SmallVLLM, facts_of_a_good_server, small_vllm
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm

from marlhf.common.errors import ReportedError, UserError
from marlhf.config import RolloutSettings
from marlhf.distributed import Distributed
from marlhf.models.policy import Policy
from marlhf.rollout import vllm_servers
from marlhf.rollout.engine import EngineContext, build_engine, start_engine
from marlhf.rollout.policy_weights import policy_weights

PROMPTS = [[5, 6], [7], [8, 9, 10], [11]]
SEEDS = [3, 1, 4, 15]


@pytest.fixture(scope="module")
def policy() -> Policy:
    lm: Any = tiny_causal_lm("llama", BYTES_VOCAB, tie_word_embeddings=True)
    lm.model.norm.to(torch.bfloat16)
    return Policy(lm, eos_ids=[1])


@pytest.fixture
def pair() -> Iterator[list[SmallVLLM]]:
    with ExitStack() as stack:
        yield [stack.enter_context(small_vllm()) for _ in range(2)]


def started(servers: list[SmallVLLM], policy: Policy, longest: int = 64, **arguments: Any) -> Any:
    addresses = [server.address for server in servers]
    spec = {"name": "vllm", "address": addresses, "timeout_seconds": 30.0, **arguments}
    context = EngineContext(policy, byte_tokenizer(), Distributed(), longest)
    return start_engine(build_engine(spec), context)


def ready(servers: list[SmallVLLM], policy: Policy, **arguments: Any) -> Any:
    engine = started(servers, policy, **arguments)
    engine.update_weights(policy_weights(policy))
    return engine


def sampled(engine: Any) -> list[list[int]]:
    generation = engine.generate(PROMPTS, SEEDS, RolloutSettings())
    assert generation.prompts == PROMPTS
    assert generation.finished.all()
    assert generation.logprobs.tolist() == [[-0.5 * x, -0.5 * (x + 1)] for x in SEEDS]
    return generation.responses


EXPECTED = [[seed, seed + 1] for seed in SEEDS]


def test_all_servers_get_the_weights_and_a_share_of_the_prompts(
    pair: list[SmallVLLM], policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_servers, "_BUCKET", 2000)  # several buckets
    engine = ready(pair, policy)
    assert sampled(engine) == EXPECTED
    shares = [sorted(body["token_ids"] for body in server.asked) for server in pair]
    assert shares == [PROMPTS[:2], sorted(PROMPTS[2:])]
    expected = dict(policy_weights(policy))
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"]  # the tied head
    for server in pair:
        assert server.calls.count("update_weights") > 2
        assert server.calls[-2:] == ["finish_weight_update", "reset_prefix_cache"]
        assert server.weights.keys() == expected.keys()
        for name, weight in expected.items():
            assert server.weights[name].dtype == weight.dtype
            assert torch.equal(server.weights[name], weight)
    engine.close()
    assert pair[0].calls[-1] == "shutdown_weight_transfer_engine"


def spoil(server: SmallVLLM, fault: str) -> None:
    """Make a server fail from now on; an empty fault makes it answer again."""
    server.does = fault if fault in ("hang", "die") else "answer"
    server.fails = {"/inference/v1/generate": "EngineDeadError"} if fault == "status" else {}
    server.reason = "abort" if fault == "broken off" else "stop"
    server.version = "default" if fault == "restarted" else server.version


@pytest.mark.parametrize("fault", ["hang", "die", "status", "broken off", "restarted"])
def test_a_server_that_fails_is_named_and_the_others_continue(
    fault: str, pair: list[SmallVLLM], policy: Policy, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = pair[1]
    line = {
        "hang": "hangs: no token within timeout_seconds=2",
        "die": "does not answer (Server disconnected without sending a response.)",
        "status": "answers /inference/v1/generate with status 500: EngineDeadError",
        "broken off": "broke a response off (finish_reason abort)",
        "restarted": "sampled with other weights than the run's",
    }[fault]
    seconds = {"timeout_seconds": 2.0} if fault == "hang" else {}
    stopping = ready(pair, policy, **seconds)
    spoil(bad, fault)
    begin = time.monotonic()
    with pytest.raises(ReportedError) as error:
        sampled(stopping)
    assert time.monotonic() - begin < 20
    assert f"rollout.engine: the server {bad.address} {line}" in str(error.value)
    assert "start it again and resume, or set on_failure: continue" in str(error.value)
    spoil(bad, "")
    continuing = ready(pair, policy, on_failure="continue", **seconds)
    spoil(bad, fault)
    assert sampled(continuing) == EXPECTED
    said = capsys.readouterr().err
    assert f"marlhf: rollout.engine: the server {bad.address} {line}" in said
    assert said.strip().endswith("the run continues with the other 1")
    spoil(bad, "")
    count = len(bad.asked)
    assert sampled(continuing) == EXPECTED
    assert len(bad.asked) == count  # it is not asked again


def test_a_server_that_takes_no_weights_is_named_with_its_reason(
    pair: list[SmallVLLM], policy: Policy
) -> None:
    pair[0].fails = {"/update_weights": "size mismatch for lm_head"}
    engine = started(pair, policy)
    weights = list(policy_weights(policy))
    taken = []
    with pytest.raises(ReportedError, match=r"status 500: size mismatch for lm_head; start it"):
        engine.update_weights(taken.append(name) or (name, x) for name, x in weights)
    assert len(taken) == len(weights)  # as ranks that gather them need
    continuing = ready(pair, policy, on_failure="continue")
    assert sampled(continuing) == EXPECTED
    assert not pair[0].asked
    pair[1].fails = pair[0].fails
    with pytest.raises(ReportedError, match="it was the last of 2"):
        continuing.update_weights(iter(weights))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"address": "localhost:8000"}, "address: given 'localhost:8000', must be that of a serv"),
        ({"address": "http://localhost:8000/v1"}, "without a path, such as http://localhost:8000"),
        ({"address": "http://localhost:port"}, "must be that of a server"),
        ({"address": []}, "address: must hold at least one server"),
        ({"address": ["http://a", "http://a/"]}, "each only once"),
        ({"address": "http://127.0.0.1:9"}, "127.0.0.1:9 does not answer (Connection refused)"),
        ({"address": "http://a", "cache_gb": 2.0}, "cache_gb: is of vllm without address; leave"),
        ({"address": "http://a", "on_failure": "go"}, "on_failure: given 'go', must be"),
        ({"address": "http://a", "timeout_seconds": 0.0}, "timeout_seconds: given 0, must be"),
        ({"timeout_seconds": 5.0}, "timeout_seconds: needs address; leave it out"),
        ({"tensor_parallel": 0}, "tensor_parallel: given 0, must be at least 1"),
        ({"address": "http://a", "tensor_parallel": 2}, "tensor_parallel: is of vllm without addr"),
        ({"options": {"tensor_parallel_size": 2}}, "leave it out, and set tensor_parallel"),
    ],
)
def test_what_cannot_be_servers_is_one_line(arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        build_engine({"name": "vllm", **arguments})
    assert str(error.value).startswith("engine vllm: ")
    assert line in str(error.value)


def without(**changes: Any) -> dict[str, Any]:
    facts = facts_of_a_good_server()
    facts["model_config"] |= changes.pop("model", {})
    return {**facts, **changes}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"facts": None}, "is none of vLLM in development mode: start VLLM_SERVER_DEV_MODE=1"),
        ({"facts": without(model={"logprobs_mode": "raw"})}, "--logprobs-mode processed_logprobs:"),
        ({"scale_out": False}, "was started without --enable-scale-out: VLLM_SERVER_DEV_MODE=1"),
        ({"facts": without(weight_transfer_config=None)}, "without --weight-transfer-config '"),
        (
            {"facts": without(weight_transfer_config={"backend": "ipc"})},
            "has --weight-transfer-config with backend 'ipc'; possible: marlhf_tcp, nccl",
        ),
        (
            {"facts": without(weight_transfer_config={"backend": "nccl"})},
            "takes weights over nccl, for which the trainer needs a GPU",
        ),
        ({"facts": without(model={"max_model_len": 63})}, "start it with --max-model-len 64"),
    ],
)
def test_a_server_that_was_started_otherwise_is_one_line(
    settings: dict[str, Any], line: str, policy: Policy
) -> None:
    with small_vllm(**settings) as server, pytest.raises(UserError) as error:
        started([server], policy)
    assert server.address in str(error.value)
    assert line in str(error.value)
