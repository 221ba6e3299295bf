"""A text has one beginning, whoever reads it: policy, critic, reward model, whatever the tokenizer
puts before a text and whatever the text brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import fast
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_sequence_classifier
from tokenizers import processors

from marlhf.config import ModelSettings, SFTConfig, SFTDataSettings
from marlhf.data.demonstrations import as_examples
from marlhf.data.encoding import encode
from marlhf.data.template_checks import strip_bos_for_rewards
from marlhf.rewards import RewardModel, build_rewards
from marlhf.rewards.learned import encode_for_reward
from marlhf.training.ptx import text_ids

CHAT = "<s>{% for m in messages %}{{ m['content'] }}|{% endfor %}"


def tokenizer_that_adds(template: str, **options: Any):
    """A byte tokenizer with a template of special tokens around a text `$A`."""
    tokenizer = byte_tokenizer(**options)
    ids = [(name, i) for i, name in enumerate(("<s>", "</s>", "<pad>"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=ids
    )
    return tokenizer


def for_reward(tokenizer: Any, text: str, templated: bool = False, limit: int | None = None):
    return encode_for_reward(tokenizer, [text], [templated], limit)[0]


def sft_config(**data: Any) -> SFTConfig:
    return SFTConfig(model=ModelSettings(path="given"), data=SFTDataSettings(**data))


KINDS = ["<s> $A", "<s> $A </s>", "<s> <pad> $A", "$A", "$A </s>"]


@fast
@given(st.sampled_from(KINDS), st.sampled_from(["", "<s>"]), st.sampled_from(["ab", "<s>ab"]))
def test_policy_and_reward_model_begin_alike(template: str, brought: str, text: str):
    tokenizer = tokenizer_that_adds(template)
    (read,), _ = encode([brought + text], tokenizer, 99)
    scored = for_reward(tokenizer, brought + text)
    assert scored[: len(read)] == read
    assert scored[len(read) :] in ([], [1])
    assert read[:2] != [0, 0]
    assert read.count(0) <= 1


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("template", KINDS)
def test_what_a_text_brings_is_not_added(template: str, bos: str | None):
    """Also where the tokenizer calls it no BOS (CLS), or puts two tokens before a text."""
    tokenizer = tokenizer_that_adds(template, bos=bos)
    plain = for_reward(tokenizer, "ab")
    before, _, after = template.partition("$A")
    assert for_reward(tokenizer, before.replace(" ", "") + "ab") == plain
    assert for_reward(tokenizer, before.replace(" ", "") + "ab" + after.strip()) == plain
    assert len(plain) == len("ab") + len(template.split()) - 1


def test_a_reward_model_scores_a_prompt_with_bos_as_without(tmp_path: Path):
    tokenizer = byte_tokenizer(add_bos=True)
    tiny_sequence_classifier("llama", BYTES_VOCAB).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = RewardModel(str(tmp_path), batch_size=1)
    with_bos, without, other = model(["<s>tell me", "tell me", "tell"], [" yes"] * 3)
    assert with_bos == without != other


@pytest.mark.parametrize("bos", ["<bos>", "<s>"])
def test_the_policys_bos_is_no_text_for_a_reward_model_of_other_tokens(bos: str, tmp_path: Path):
    tokenizer = byte_tokenizer(add_bos=True)
    tiny_sequence_classifier("llama", BYTES_VOCAB).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, policy = RewardModel(str(tmp_path)), byte_tokenizer()
    policy.add_special_tokens({"bos_token": bos})
    with_bos = [f"{bos}tell me", f"{bos}{bos}tell me"]
    plain, late = model(["tell me", f"tell{bos} me"], ["x"] * 2)
    if bos != "<s>":
        assert plain != pytest.approx(model(with_bos, ["x"] * 2)[0], abs=1e-4)
    strip_bos_for_rewards(build_rewards(model), policy)
    read = model([*with_bos, "tell me", f"tell{bos} me"], ["x"] * 4)
    assert read == pytest.approx([plain] * 3 + [late], abs=1e-6)


def test_a_conversation_that_begins_with_bos_has_one():
    """Written by the template, and by the first message."""
    tokenizer = byte_tokenizer(chat_template=CHAT)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "<s>ab"}, {"role": "assistant", "content": "c"}],
        tokenize=False,
    )
    assert text.startswith("<s><s>")
    once = tokenizer(text.removeprefix("<s>"), add_special_tokens=False)["input_ids"]
    assert for_reward(tokenizer, text, templated=True) == once
    assert encode([text], tokenizer, 99, special=False)[0] == [once]
    rows = [{"messages": [{"role": "user", "content": "<s>ab"}], "completion": "c"}]
    (example,) = as_examples(rows, sft_config(prompt_column="messages"), tokenizer).rows
    assert example.ids[: len(once)] == once


@pytest.mark.parametrize("text", ["bc", "bc</s>"])
def test_every_job_reads_one_end(text: str):
    tokenizer = byte_tokenizer(add_bos=True)
    wanted = tokenizer("abc</s>")["input_ids"]
    rows = [{"prompt": "a", "completion": text, "text": f"a{text}"}]
    (example,) = as_examples(rows, sft_config(), tokenizer).rows
    (plain,) = as_examples(rows, sft_config(text_column="text"), tokenizer).rows
    assert example.ids == plain.ids == wanted
    assert text_ids("a", text, tokenizer, 99)[0] == wanted
    assert text_ids(None, f"a{text}", tokenizer, 99)[0] == wanted
    tokenizer.eos_token = None
    assert text_ids("a", "bc", tokenizer, 99)[0] == wanted[:-1]


@pytest.mark.parametrize("text", ["abcdef", "<s>abcdef"])
def test_every_job_reads_the_same_beginning(text: str):
    tokenizer = byte_tokenizer(add_bos=True, add_eos=True)
    whole = tokenizer("abcdef")["input_ids"]
    row = {"prompt": text, "completion": "x", "text": text}
    (sft,) = as_examples([row], sft_config(), tokenizer).rows
    (plain,) = as_examples([row], sft_config(text_column="text"), tokenizer).rows
    assert sft.ids[:7] == plain.ids[:7] == whole[:7]
    assert text_ids(None, text, tokenizer, 99)[0] == whole
    assert text_ids(text, "x", tokenizer, 99)[0][:7] == whole[:7]
    assert encode([text], tokenizer, 99)[0] == [whole[:7]]
    assert for_reward(tokenizer, text) == whole


@pytest.mark.parametrize("templated", [False, True])
@pytest.mark.parametrize("limit", range(1, 9))
def test_a_long_text_keeps_its_beginning_once(limit: int, templated: bool):
    """The rule of prompts: the last tokens, behind BOS."""
    tokenizer = byte_tokenizer(add_bos=True)
    (prompt,), _ = encode(["<s>abcdef"], tokenizer, limit, special=not templated)
    assert for_reward(tokenizer, "<s>abcdef", templated, limit) == prompt
