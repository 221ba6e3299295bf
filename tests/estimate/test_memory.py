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
from support.tiny_models import tiny_causal_lm, tiny_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from marlhf.cli import main
from marlhf.config import KLSettings, LoraSettings, ModelSettings, PPOConfig, RolloutSettings
from marlhf.distributed.ranks import _BUFFERS
from marlhf.estimate.allocations import LiveBytes, PassCounter, backward_moments, fake_models
from marlhf.estimate.memory_model import (
    _BUCKET,
    _PREFETCHED,
    _REUSED,
    PROFILES,
    Generation,
    Moment,
    Run,
    Training,
    Weights,
    estimate,
)
from marlhf.models.policy import backbone_forward, backbone_of

BYTES = 4
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 160}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's config.json, and nothing else of it."""
    folder = tmp_path_factory.mktemp("shape")
    tiny_config("llama", 300, **SHAPE).save_pretrained(folder)
    return folder


def config(folder: Path, **model: Any) -> PPOConfig:
    rollout = RolloutSettings(batch_size=16, max_prompt_length=24, max_new_tokens=16)
    return PPOConfig(model=ModelSettings(path=str(folder), **model), rollout=rollout)


def counted(folder: Path, **model: Any) -> Run:
    given = config(folder, **model)
    return PassCounter(given, fake_models(given)).run(2)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Run:
    return counted(folder)


@pytest.fixture(scope="module")
def with_adapters(folder: Path) -> Run:
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


def peak_of(moments: Sequence[Moment]) -> int:
    return max(moment.peak for moment in moments)


def test_linear_layers_by_hand():
    """tanh(x W V): the most is alive where the gradient [N,7] of what the layer above read is made,
    from that and the gradient [N,5] of its product. It alone goes on to the layer below."""
    N = 1000
    below, above = nn.Linear(3, 7, bias=False), nn.Linear(7, 5, bias=False)
    x = torch.zeros(N, 3)

    def loss() -> torch.Tensor:
        return torch.tanh(above(below(x))).sum()

    parameters = [*below.parameters(), *above.parameters()]
    moments = backward_moments(parameters, [x, *parameters], loss)
    assert [moment.gradient for moment in moments] == [5 * 7 * BYTES, 7 * 3 * BYTES]
    assert moments[0].peak == pytest.approx(N * (7 + 5 + 7) * BYTES, rel=0.01)
    assert moments[1].peak == pytest.approx(N * 7 * BYTES, rel=0.01)
    assert moments[1].live < 100 * BYTES
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


def test_fake_tensors_count_as_real_ones():
    def peak(ids: torch.Tensor, mask: torch.Tensor) -> int:
        model = tiny_causal_lm("llama").train()
        known = [*model.parameters(), *model.buffers(), ids, mask]
        backbone = backbone_of(model)
        return peak_of(
            backward_moments(
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
    assert plain.generation.cache == keys_and_values
    assert plain.generation.rest > rows * 300 * (3 * 4 + 2 * 8)  # logits in fp32, noise in fp64


def test_sampling_in_bf16_keeps_keys_values_and_gathered_matrices_in_it(folder, plain):
    given = config(folder, precision="bf16")
    counter = PassCounter(given, fake_models(given))
    whole, sharded = counter.run(2).generation, counter.run(2, sharded=True).generation
    assert whole.cache == sharded.cache == plain.generation.cache / 2
    rows = 300 * 64 + (2 * 2 + 1) * 64  # embeddings and norms stay in fp32
    matrices = plain.models["policy"].trained - rows
    assert plain.generation.gathered == BYTES * (rows + matrices)
    assert sharded.gathered == BYTES * rows + 2 * matrices
    assert sharded.rest < whole.rest  # autocast keeps no copies


def test_checkpointing_and_smaller_micro_batches_need_less(folder, plain):
    whole = plain.training["policy"]
    checkpointing = counted(folder, gradient_checkpointing=True).training["policy"]
    assert peak_of(checkpointing.moments) < 0.8 * peak_of(whole.moments)
    given = config(folder)
    small = replace(given, optimizer=replace(given.optimizer, micro_batch_size=2))
    fewer = PassCounter(small, fake_models(small)).run(2).training["policy"]
    assert fewer.accumulates
    assert not whole.accumulates
    assert peak_of(fewer.moments) < 0.5 * peak_of(whole.moments)
    assert (
        sum(moment.gradient for moment in whole.moments) == BYTES * plain.models["policy"].trained
    )


# -- ranks -----------------------------------------------------------------------------------------


def test_states_are_those_of_torch():
    model = tiny_causal_lm("llama")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    states = sum(
        x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim() > 0
    )
    weights = sum(p.nbytes for p in model.parameters())
    found = estimate(_run(weights // BYTES), "single", 1)
    assert (found.weights, found.optimizer) == (weights, states)
    assert found.peak == weights + states + 10 * weights


def _run(count: int) -> Run:
    """A policy alone, whose training needs ten times its weights, gradients included."""
    size = Weights(0, count, count, count)
    passes = Training([Moment(10 * BYTES * count, BYTES * count, BYTES * count)], False)
    return Run({"policy": size}, {"policy": passes}, {"policy": 0}, Generation(0, 0, BYTES * count))


def test_bytes_a_parameter_of_every_profile():
    """The table in the module's docstring, for 1000 trained and 1000 frozen parameters."""
    run = _run(1000)
    run = replace(run, models={**run.models, "reference": Weights(1000, 0, 1000, 10)})
    found = {p: estimate(run, p, 4) for p in PROFILES}
    stays = {p: (e.weights, e.optimizer, e.buffers, e.host) for p, e in found.items()}
    assert stays == {
        "single": (8000, 8000, 0, 0),
        "ddp": (8000, 8000, 4000, 0),
        "zero1": (8000, 3000, 0, 0),
        "zero2": (8000, 3000, 0, 0),
        "zero3": (2000, 2000, 1000 + 4000, 0),  # a bucket that the model does not fill
        "zero3_offload": (0, 0, 4000, 1000 + 6000),
    }
    assert [e.phases["generate"].gathered for e in found.values()] == [0, 0, 0, 0, 4000, 4000]


HUNDRED = 100_000_000


@pytest.mark.parametrize(
    ("profile", "gradients", "wanted"),
    [
        ("single", [1, 1, 1], 3),
        ("ddp", [1, 1, 1], 3),
        # all, a bucket of two, and what this one of three ranks keeps
        ("zero1", [1, 1, 1], 3 + 2 + 1),
        # the third finds a full bucket, of which a copy is sent; what is kept is made
        ("zero2", [1, 1, 1], 1 + 2 + 2 + 1),
        # bucket and kept part are there all the time
        ("zero3", [1, 1, 1], 2 + 1),
        # one that does not fit in the bucket waits outside, and is copied when the next one comes
        ("zero3", [3, 1], 3 + 3 + 1),
        ("zero2", [3, 3], 2 + 3 + 3 + 3),
    ],
)
def test_gradients_of_every_profile_by_hand(profile, gradients, wanted):
    """In hundreds of MB, which makes a bucket 2; there is nothing but gradients."""
    sizes = [HUNDRED * gradient for gradient in gradients]
    count = sum(sizes) // BYTES
    moments = [Moment(size, size, size) for size in sizes]
    size = Weights(0, count, 0, HUNDRED // BYTES // 4)
    run = Run(
        {"policy": size}, {"policy": Training(moments, False)}, {"policy": 0}, Generation(0, 0, 0)
    )
    phase = estimate(run, profile, 3).phases["train policy"]
    assert phase.gradients + phase.activations == pytest.approx(HUNDRED * wanted)


def test_buffers_are_those_that_deepspeed_is_given():
    buffers = _BUFFERS["reduce_bucket_size"], _BUFFERS["stage3_max_reuse_distance"]
    assert (*buffers, _BUFFERS["stage3_prefetch_bucket_size"]) == (
        _BUCKET // BYTES,
        _REUSED // BYTES,
        _PREFETCHED // BYTES,
    )


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
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(PROFILES)}
    assert set(rows) == set(PROFILES)
    assert all(row[-2] == "yes" for row in rows.values())
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


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--gpu-memory", "0"], "--gpu-memory: given 0, must be a number above 0"),
        (["--gpu-memory", "80GB"], "--gpu-memory: given 80GB, must be a number"),
        (["--gpu-memory", "80", "--gpus", "0"], "--gpus: given 0, must be a whole number"),
        (["--gpu-memory", "80", "--what"], "unrecognized arguments: --what"),
        ([], "required: --gpu-memory"),
        (["--gpu-memory", "80", "model.pth=x"], "model.pth: unknown key"),
        (["--gpu-memory", "80", "epochs=2"], "(estimate takes a config of marlhf ppo)"),
        (["--gpu-memory", "80", "model.path=./no/model"], "model.path: given './no/model', which"),
        (["--gpu-memory", "80", "reward.models=./none"], "reward: given './none', which is not"),
        (["--gpu-memory", "80", "model.lora.target_modules=nope"], "model.lora: "),
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
