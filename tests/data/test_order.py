"""The order of prompts: every pass holds every prompt once, and a resumed run needs no state."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlhf.common.errors import UserError
from marlhf.data.order import PromptStream
from marlhf.data.prompts import Prompt


def texts(prompts):
    return [prompt.text for prompt in prompts]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 12), size=st.integers(1, 9), seed=st.integers(-3, 2**63), data=st.data()
)
def test_every_pass_holds_every_prompt_once_whatever_the_batches(count, size, seed, data):
    prompts = [Prompt(str(i)) for i in range(count)]
    stream = PromptStream(prompts, seed)
    steps = -(-3 * count // size)
    drawn = [p.text for step in range(steps) for p in stream.batch(step, size)]
    for epoch in range(3):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == sorted(texts(prompts))
    step = data.draw(st.integers(0, steps - 1))
    resumed = PromptStream(prompts, seed).batch(step, size)
    assert texts(resumed) == drawn[step * size : (step + 1) * size]


def test_orders_differ_between_passes_and_seeds():
    prompts = [Prompt(str(i)) for i in range(40)]
    orders = [texts(PromptStream(prompts, seed).batch(e, 40)) for seed in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in [*orders, texts(prompts)]}) == 5


def test_the_order_never_changes_between_versions():
    stream = PromptStream([Prompt(str(i)) for i in range(8)], seed=3)
    assert texts(stream.batch(0, 8)) == list("67214530")


def test_shuffle_off_keeps_the_order():
    stream = PromptStream([Prompt(str(i)) for i in range(3)], seed=1, shuffle=False)
    assert texts(stream.batch(0, 2) + stream.batch(1, 2)) == ["0", "1", "2", "0"]
    with pytest.raises(UserError, match="no prompts to train on"):
        PromptStream([])
