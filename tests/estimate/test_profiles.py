"""Memory of every launch profile, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_models import (
    tiny_causal_lm,
)

from marlhf.distributed.ranks import _BUFFERS
from marlhf.estimate.memory_model import (
    _BUCKET,
    _PREFETCHED,
    _REUSED,
    PROFILES,
    Interval,
    RunSizes,
    SamplingBytes,
    Training,
    Weights,
    estimate,
)

BYTES = 4


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


def _run(count: int) -> RunSizes:
    """A policy alone, whose training needs ten times its weights, gradients included."""
    size = Weights(0, count, count, count)
    passes = Training([Interval(10 * BYTES * count, BYTES * count, BYTES * count)], False)
    return RunSizes(
        {"policy": size}, {"policy": passes}, {"policy": 0}, SamplingBytes(0, 0, BYTES * count)
    )


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
    reference = Weights(1000, 0, 1000, 10, halves=600)
    half = replace(run, models={**run.models, "reference": reference})
    found_half = {p: estimate(half, p, 4) for p in PROFILES}
    saved = {p: (found[p].weights - e.weights, e.host) for p, e in found_half.items()}
    assert saved["single"] == (1200, 0)
    assert saved["zero3"] == (300, 0)
    assert saved["zero3_offload"] == (0, found["zero3_offload"].host - 300)
    assert {(e.loading - e.weights, e.reading) for e in found.values()} == {(4000, 4000)}
    assert estimate(replace(run, unmapped=9000), "zero3", 4).reading == 9000
    assert estimate(replace(run, saved=500), "single", 4).saving == 500
    zero3 = estimate(replace(run, saved=500), "zero3", 4)  # gathered in fp32 before that
    assert (zero3.saving, zero3.host_peak) == (4500, 4500)


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
    intervals = [Interval(size, size, size) for size in sizes]
    size = Weights(0, count, 0, HUNDRED // BYTES // 4)
    run = RunSizes(
        {"policy": size},
        {"policy": Training(intervals, False)},
        {"policy": 0},
        SamplingBytes(0, 0, 0),
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
