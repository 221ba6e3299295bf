"""What passes allocate, what ranks keep, and `marlhf estimate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.tiny_models import (
    byte_tokenizer,
    tiny_causal_lm,
    tiny_config,
    tiny_sequence_classifier,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from marlhf.cli import main
from marlhf.config import KLSettings, LoraSettings, ModelSettings, PPOConfig, RolloutSettings
from marlhf.config.loading import config_from_dict
from marlhf.distributed import Distributed
from marlhf.estimate.allocations import (
    LiveBytes,
    PassCounter,
    _forward,
    _tokens,
    backward_intervals,
)
from marlhf.estimate.command import counter_of, estimates
from marlhf.estimate.fake_models import fake_models
from marlhf.estimate.memory_model import (
    PROFILES,
    Interval,
    RunSizes,
    SamplingBytes,
    Weights,
    estimate,
)
from marlhf.estimate.shapes import Batch
from marlhf.models import building
from marlhf.models.loading import load_model_config
from marlhf.models.policy import backbone_forward, backbone_of
from marlhf.rewards import RewardModel, reward_models

BYTES = 4
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 160}


def config(folder: Path, **model: Any) -> PPOConfig:
    rollout = RolloutSettings(batch_size=16, max_prompt_length=24, max_new_tokens=16)
    return PPOConfig(model=ModelSettings(path=str(folder), **model), rollout=rollout)


def counted(folder: Path, **model: Any) -> RunSizes:
    given = config(folder, **model)
    return PassCounter(given, fake_models(given)).run(2)


def sampling_of(run: RunSizes) -> SamplingBytes:
    assert run.sampling is not None
    return run.sampling


@pytest.fixture(scope="module")
def plain(folder: Path) -> RunSizes:
    return counted(folder)


@pytest.fixture(scope="module")
def with_adapters(folder: Path) -> RunSizes:
    return counted(folder, lora=LoraSettings(r=2, target_modules=["q_proj"]))


# -- counting --------------------------------------------------------------------------------------


def test_storages_are_counted_once_and_while_they_live():
    known = torch.zeros(100)
    with LiveBytes([known]) as count:
        kept = torch.ones(10)
        views = kept.view(2, 5)[0], known[3:]  # nothing new
        gone = torch.ones(1000) + 1  # two at a time
        del gone
    assert (count.live, count.peak) == (10 * BYTES, 2010 * BYTES)
    assert views[0].sum() == 5
    del kept, views
    assert count.live == 0


def peak_of(intervals: Sequence[Interval]) -> int:
    return max(interval.peak for interval in intervals)


def test_linear_layers_by_hand():
    """tanh(x W V): the most is alive where the gradient [N,7] of what the layer above read is made,
    from that and the gradient [N,5] of its product. It alone goes on to the layer below."""
    N = 1000
    below, above = nn.Linear(3, 7, bias=False), nn.Linear(7, 5, bias=False)
    x = torch.zeros(N, 3)

    def loss() -> torch.Tensor:
        return torch.tanh(above(below(x))).sum()

    parameters = [*below.parameters(), *above.parameters()]
    intervals = backward_intervals(parameters, [x, *parameters], loss)
    assert [interval.gradient for interval in intervals] == [5 * 7 * BYTES, 7 * 3 * BYTES]
    assert intervals[0].peak == pytest.approx(N * (7 + 5 + 7) * BYTES, rel=0.01)
    assert intervals[1].peak == pytest.approx(N * 7 * BYTES, rel=0.01)
    assert intervals[1].live < 100 * BYTES
    assert below.weight.grad is None
    assert above.weight.grad is None


def test_a_tensor_kept_for_the_backward_pass_counts(monkeypatch):
    """Negative control of the last: what autograd saves is alive though no name is left."""
    x = torch.zeros(1000, requires_grad=True)
    with LiveBytes([x]) as count:
        y = x.exp()  # saves its result
        z = y.sum()
        del y
        assert count.live == 1001 * BYTES
        z.backward()
        del z
        assert count.live == 1000 * BYTES  # the gradient
    assert count.peak >= 2001 * BYTES


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_fake_tensors_count_as_real_ones(family):
    def peak(ids: torch.Tensor, mask: torch.Tensor) -> int:
        model = tiny_causal_lm(family).train()
        known = [*model.parameters(), *model.buffers(), ids, mask]
        backbone = backbone_of(model)
        return peak_of(
            backward_intervals(
                backbone.parameters(), known, lambda: backbone_forward(backbone, ids, mask).sum()
            )
        )

    ids, mask = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3] = False  # without any padding transformers makes no mask
    real = peak(ids, mask)
    with FakeTensorMode() as mode:
        fake = peak(mode.from_tensor(ids), mode.from_tensor(mask))
    assert fake == pytest.approx(real, rel=0.01)
    assert real > 100_000


# -- a run -----------------------------------------------------------------------------------------


def test_models_of_a_run_have_the_sizes_that_loading_gives_them(folder, plain, with_adapters):
    full = sum(p.numel() for p in tiny_causal_lm("llama", 300, **SHAPE).parameters())
    head = 300 * 64
    run = plain
    assert run.models["policy"] == Weights(0, full, full, head)
    assert run.models["reference"] == Weights(full, 0, full, head)
    without = replace(config(folder), kl=KLSettings(coef=0.0))
    assert "reference" not in PassCounter(without, fake_models(without)).run(2).models
    reading = replace(without, segmenter="perplexity")
    assert "reference" in PassCounter(reading, fake_models(reading)).run(2).models
    assert run.models["critic"].trained == full - head + 64  # a scalar head instead

    adapters = with_adapters.models
    each = 2 * 2 * (64 + 4 * 8)  # layers x rank x (in + out)
    assert adapters["policy"].frozen == full
    assert adapters["policy"].trained == each
    assert (adapters["critic"].frozen, adapters["critic"].trained) == (0, each + 64)
    assert "reference" not in adapters


def test_a_reward_model_is_counted_and_starts_the_critic(folder, tmp_path):
    tiny_config("llama", 300, num_labels=1, **SHAPE | {"num_hidden_layers": 1}).save_pretrained(
        tmp_path
    )
    given = config(folder)
    given = replace(given, reward=replace(given.reward, models=str(tmp_path)))
    run = PassCounter(given, fake_models(given)).run(2)
    assert run.models["reward model"].frozen == run.models["critic"].trained
    assert run.models["critic"].trained < run.models["policy"].trained * 0.7
    assert set(run.scoring) == {"policy", "critic", "reward model"}


def test_an_adapter_on_the_policys_base_adds_no_second_base(folder, tmp_path):
    saved = LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path=str(folder))
    saved.save_pretrained(tmp_path)
    tiny_config("llama", 300, num_labels=1, **SHAPE).save_pretrained(tmp_path)
    given = config(folder, lora=LoraSettings(r=2, target_modules=["q_proj"]))
    given = replace(given, reward=replace(given.reward, models=str(tmp_path)))
    run = PassCounter(given, fake_models(given)).run(2)
    assert run.models["reward model"].frozen < 1000
    assert run.models["critic"].frozen == 0
    assert run.models["critic"].trained == run.models["policy"].trained + 64
    assert run.scoring["reward model"] > 0


def test_generation_keeps_keys_and_values_of_every_row(plain):
    rows, length = 8, 24 + 16 - 1  # the last token is not read again
    keys_and_values = 2 * 2 * rows * length * (2 * 8) * BYTES  # layers, key-value heads x head size
    assert sampling_of(plain).cache == keys_and_values
    assert sampling_of(plain).other > rows * 300 * (3 * 4 + 2 * 8)  # logits in fp32, noise in fp64


def test_sampling_in_bf16_keeps_keys_values_and_gathered_matrices_in_it(folder, plain):
    given = config(folder, precision="bf16")
    counter = PassCounter(given, fake_models(given))
    whole, sharded = (sampling_of(counter.run(2, sharded)) for sharded in (False, True))
    assert whole.cache == sharded.cache == sampling_of(plain).cache / 2
    rows = 300 * 64 + (2 * 2 + 1) * 64  # embeddings and norms stay in fp32
    matrices = plain.models["policy"].trained - rows
    assert sampling_of(plain).gathered == BYTES * (rows + matrices)
    assert sharded.gathered == BYTES * rows + 2 * matrices
    assert sharded.other < whole.other  # autocast keeps no copies


def test_checkpointing_and_smaller_micro_batches_need_less(folder, plain):
    whole = plain.training["policy"]
    checkpointing = counted(folder, gradient_checkpointing=True).training["policy"]
    assert peak_of(checkpointing.intervals) < 0.8 * peak_of(whole.intervals)
    given = config(folder)
    small = replace(given, optimizer=replace(given.optimizer, micro_batch_size=2))
    fewer = PassCounter(small, fake_models(small)).run(2).training["policy"]
    assert fewer.accumulates
    assert not whole.accumulates
    assert peak_of(fewer.intervals) < 0.5 * peak_of(whole.intervals)
    assert (
        sum(interval.gradient for interval in whole.intervals)
        == BYTES * plain.models["policy"].trained
    )
    engine = {"name": "transformers", "batch_size": 2}
    in_parts = replace(given, rollout=replace(given.rollout, engine=engine))
    responses = given.rollout.batch_size // 2
    sampled = sampling_of(PassCounter(in_parts, fake_models(in_parts)).run(2))
    assert sampled.cache * responses == sampling_of(plain).cache * 2


# -- copies of the originals -----------------------------------------------------------------------


def shapes(model: nn.Module | None) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shape of each parameter, and whether it trains."""
    named = [] if model is None else model.named_parameters()
    return {name: (tuple(p.shape), p.requires_grad) for name, p in named}


LORA = {"lora": {"r": 2, "target_modules": ["q_proj", "down_proj"]}}


@pytest.mark.parametrize(
    ("model", "sections"),
    [
        ({}, {}),
        ({}, {"reward": {"models": "reward"}}),
        ({}, {"critic": {"path": "reward"}}),
        ({}, {"critic": {"backbone": "policy"}}),
        ({}, {"ppo": {"estimator": "reinforce"}}),
        (LORA, {}),
        (LORA, {"critic": {"backbone": "policy"}}),
        (LORA, {"critic": {"path": "reward"}}),
        (LORA, {"reward": {"models": "adapter"}}),
    ],
)
def test_models_without_weights_are_those_that_a_run_builds(saved, model, sections, monkeypatch):
    monkeypatch.chdir(saved)
    model = {"path": "policy", "gradient_checkpointing": True, **model}
    config = config_from_dict(PPOConfig, {"model": model, **sections})
    tokenizer, paths = byte_tokenizer(), [m["path"] for m in reward_models(config.reward.models)]
    lm_config = load_model_config(config.model)
    start = building.critic_start(config, lm_config, tokenizer, next(iter(paths), None))
    policy, critic, _ = building.build_models(config, tokenizer, start)
    fakes = fake_models(config)
    adapters = {name for name in shapes(fakes.policy) if ".reward_0." in name}
    assert {k: v for k, v in shapes(fakes.policy).items() if k not in adapters} == shapes(policy)
    fake_critic = shapes(fakes.trained.get("critic"))
    assert {k: v for k, v in fake_critic.items() if ".reward_0." not in k} == shapes(critic)
    assert bool(adapters) == ("adapter" in paths)


@pytest.mark.parametrize(("model", "is_merged"), [({}, True), (LORA, False)])
def test_an_adapter_that_is_merged_needs_its_base_on_the_host(saved, model, is_merged, monkeypatch):
    monkeypatch.chdir(saved)
    sections = {"model": {"path": "policy", **model}, "reward": {"models": "adapter"}}
    config = config_from_dict(PPOConfig, sections)
    run = PassCounter(config, fake_models(config)).run(1)
    merged = sum(p.nbytes for p in tiny_sequence_classifier("llama", 300).parameters())
    assert run.unmapped == (merged if is_merged else 0)


def test_frozen_weights_have_the_bytes_that_a_run_gives_them(saved, monkeypatch):
    monkeypatch.chdir(saved)
    model = {"path": "policy", "precision": "bf16"}
    config = config_from_dict(PPOConfig, {"model": model, "reward": {"models": "reward"}})
    placement = Distributed("bf16").placement()
    start = building.CriticStart()
    built = building.build_models(config, byte_tokenizer(), start, placement=placement)
    reward = RewardModel("reward")
    reward.use_placement(placement)
    run = PassCounter(config, fake_models(config)).run(1)
    assert built.reference is not None
    for name, module in (("reference", built.reference), ("reward model", reward.model)):
        counted = run.models[name]
        size = BYTES * counted.frozen - 2 * counted.halves
        assert size == sum(p.nbytes for p in module.parameters()), name
        assert counted.halves > 0


def test_chunks_of_logits_are_those_of_the_gpu(tmp_path):
    """A chunk of 2**24 logits on a small one, all 2**25 of the batch on a large one.

    With the entropy there are three arrays of a chunk.
    """
    tiny_config("llama", 2**18, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    run = replace(
        config(tmp_path),
        rollout=RolloutSettings(batch_size=2, max_prompt_length=8, max_new_tokens=64),
    )
    scoring = [
        PassCounter(run, fake_models(run), memory).run(1).scoring["policy"]
        for memory in (8 * 10**9, 80 * 10**9, None)
    ]
    assert scoring[0] == scoring[2]
    assert scoring[1] - scoring[0] == pytest.approx(3 * BYTES * 2**24, rel=0.05)


def test_what_is_offloaded_is_on_the_device_in_its_phase_alone(saved, monkeypatch):
    monkeypatch.chdir(saved)
    sections = {"model": {"path": "policy"}, "reward": {"models": "reward"}}
    offload = {"offload": ["reference", "reward", "optimizer"]}
    counters = [
        counter_of(config_from_dict(PPOConfig, {**sections, **more})) for more in ({}, offload)
    ]
    plain, moved = (estimates(counter, 2) for counter in counters)
    assert moved.keys() == plain.keys() - {"zero3", "zero3_offload"}  # which refuse it
    sizes = counters[0].run(1).models
    frozen = [BYTES * sizes[name].frozen for name in ("reference", "reward model")]
    trained = sizes["policy"].trained + sizes["critic"].trained
    for profile, share in (("single", 1.0), ("ddp", 1.0), ("zero2", 0.5)):
        before, after = plain[profile], moved[profile]
        moments = 8 * trained * share
        assert before.weights - after.weights == sum(frozen)
        assert before.optimizer - after.optimizer == pytest.approx(moments)
        assert after.host - before.host == pytest.approx(sum(frozen) + moments)
        assert after.loading == before.loading
        for name in ("train policy", "train critic"):
            more = after.phases[name].total - before.phases[name].total
            assert more == pytest.approx(moments)
        assert after.phases["generate"] == before.phases["generate"]
        assert 0 < after.phases["score"].total - before.phases["score"].total <= max(frozen)
        assert after.peak < before.peak


@pytest.mark.parametrize("critic", [{}, {"backbone": "policy"}])
def test_the_pass_that_is_counted_is_the_original(saved, critic):
    """Equal in numbers, and in the peak but for what the choice by a mask copies."""
    sections = {"rollout": {"temperature": 0.7}, "critic": critic}
    config = config_from_dict(PPOConfig, {"model": {"path": str(saved / "policy")}, **sections})
    policy, value_model, _ = building.build_models(config, byte_tokenizer())
    for model in filter(None, (policy, value_model)):
        if model.head is not None:  # 0 at the start, as the values would all be
            nn.init.normal_(model.head.weight)
    ids, mask = _tokens(4, 20)
    known = [*policy.parameters(), *policy.buffers(), ids, mask]
    extras = ["entropy", *(["values"] if critic else [])]
    with torch.no_grad(), LiveBytes(known) as original:
        output = policy(ids, mask, mask[:, -8:], 0.7, extras=extras)
    with torch.no_grad(), LiveBytes(known) as counted:
        logprobs, *values = _forward(policy, Batch(4, 20, 8), 0.7, ["entropy"])
    assert torch.equal(logprobs, output.logprobs.flatten())
    assert counted.peak == pytest.approx(original.peak, rel=0.05)
    if value_model is None:
        assert torch.equal(values[0][:, :-1], output.extras["values"])
    else:
        passed = value_model(ids, mask, mask[:, -8:])
        assert all(map(torch.equal, _forward(value_model, Batch(4, 20, 8), 0.7), passed))


# -- ranks -----------------------------------------------------------------------------------------


def test_more_ranks_never_need_more_of_each(plain, with_adapters):
    for run in (plain, with_adapters):
        for profile in PROFILES:
            peaks = [estimate(run, profile, ranks).peak for ranks in (2, 3, 4, 8, 64)]
            assert peaks == sorted(peaks, reverse=True)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def given(folder: Path, tmp_path: Path) -> list[str]:
    """The words of a command for a config."""
    text = {"model": {"path": str(folder)}, "rollout": {"batch_size": 16, "max_new_tokens": 16}}
    (tmp_path / "c.yaml").write_text(json.dumps(text))
    return ["estimate", str(tmp_path / "c.yaml"), "rollout.max_prompt_length=24", "--gpus", "2"]


def test_the_command_prints_every_profile_and_what_fits(given, capsys):
    main([*given, "--gpu-memory", "80"])
    out = capsys.readouterr().out
    lines = out.partition("host memory")[0].splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(PROFILES)}
    assert set(rows) == set(PROFILES)
    assert all(row[-1] == "yes" for row in rows.values())
    host = out.partition("host memory:")[2].splitlines()
    assert [line.split()[0] for line in host[1:7]] == list(PROFILES)
    assert "Fits: single, ddp, zero1, zero2, zero3, zero3_offload." in out


def test_the_command_says_what_would_help(given, capsys):
    on = ["model.gradient_checkpointing=true", "model.lora.target_modules=[q_proj]"]
    main([*given, *on, "--gpu-memory", "0.0012"])
    out = capsys.readouterr().out
    assert "Nothing fits in 0.0012 GB" in out
    helped = out.partition("What would help")[2]
    assert "gradient_checkpointing" not in helped  # it is on
    assert "optimizer.micro_batch_size=1" in helped
    assert "--gpus 16" in helped
    assert "fits" in helped


def test_a_model_that_no_gpu_can_load_is_said_to_be_one(given, capsys):
    main([*given, "--gpu-memory", "0.0005"])
    out = capsys.readouterr().out.partition("host memory")[0]
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(PROFILES)}
    assert rows["single"].endswith("cannot load")
    assert rows["zero3_offload"].endswith("no")  # one tensor at a time passes through the GPU


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--gpu-memory", "0"], "--gpu-memory: given 0, must be a number above 0"),
        (["--gpu-memory", "80GB"], "--gpu-memory: given 80GB, must be a number"),
        (["--gpu-memory", "80", "--gpus", "0"], "--gpus: given 0, must be a whole number"),
        (["--gpu-memory", "80", "--what"], "unrecognized arguments: --what"),
        ([], "required: --gpu-memory"),
        (["--gpu-memory", "80", "model.pth=x"], "model.pth: unknown key"),
        (["--gpu-memory", "80", "epochs=2"], "(read as a config of marlhf ppo; --job is for sft,"),
        (["--gpu-memory", "80", "--job", "merge"], "--job: invalid choice: 'merge'"),
        (["--gpu-memory", "80", "model.path=./no/model"], "model.path: given './no/model', which"),
        (["--gpu-memory", "80", "reward.models=./none"], "reward: given './none', which is not"),
        (["--gpu-memory", "80", "reward.models=lenth"], "reward: no reward is called 'lenth'; did"),
        (["--gpu-memory", "80", "model.lora.target_modules=nope"], "model.lora.target_modules: "),
    ],
)
def test_bad_words_are_one_line(given, words, complaint, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*given, *words])
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert complaint in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.out == ""
