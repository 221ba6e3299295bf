"""Reward models by path: scores against an oracle of one row at a time, whatever the padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.tiny_models import (
    BYTES_VOCAB,
    CHATML,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_sequence_classifier,
)
from transformers import AutoConfig

from marlhf.common.types import UserError
from marlhf.config import ModelSettings
from marlhf.models.loading import load_model_config
from marlhf.models.reward_classifier import build_classifier
from marlhf.rewards import RewardModel, build_rewards
from marlhf.rewards.learned import encode_for_reward, reward_texts, right_pad, sequence_scores

PROMPTS = ["Summarize: a long text", "", "x", "Say héllo"]
COMPLETIONS = [" it is short", "yes", "", " 😀"]
DECODERS = ["llama", "gpt2", "gemma", "qwen2"]


@pytest.fixture
def save(tmp_path):
    """Write a reward model's directory; returns its path, model and tokenizer."""

    def write(family="llama", offset=None, name="rm", tokenizer=None, **changes):
        model = tiny_sequence_classifier(family, BYTES_VOCAB, **changes)
        if offset is not None:
            model.config.score_offset = offset
        tokenizer = tokenizer or byte_tokenizer()
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name), model, tokenizer

    return write


@torch.no_grad()
def oracle(model, ids):
    """One row without padding; a decoder's score is that of its very last token."""
    inputs = torch.tensor([ids])
    if hasattr(model, "score"):
        return model.score(model.base_model(inputs).last_hidden_state)[0, -1, 0].item()
    return model(inputs).logits[0, 0].item()


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_do_not_depend_on_padding_or_batch_size(save, family, batch_size):
    path, model, tokenizer = save(family)
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = [oracle(model, tokenizer(text)["input_ids"]) for text in texts]
    assert max(expected) - min(expected) > 0.1, "scores that do not differ prove nothing"
    scores = RewardModel(path, batch_size=batch_size)(PROMPTS, COMPLETIONS)
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("offset", ["x", [1], 10**400, float("nan"), 1e39])
def test_an_offset_that_is_no_number(save, offset):
    path = save()[0]
    file = Path(path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"score_offset": offset}))
    with pytest.raises(UserError, match=r"score_offset .*, must be a finite number"):
        build_rewards(path)(["a"], ["b"])
    file.write_text(json.dumps(json.loads(file.read_text()) | {"score_offset": None}))
    assert RewardModel(path)(["a"], ["b"]) == RewardModel(save()[0])(["a"], ["b"])


@pytest.mark.parametrize("family", DECODERS)
def test_pad_that_equals_eos(save, family):
    """transformers itself would pool before the EOS that ends the text."""
    tokenizer = byte_tokenizer(add_eos=True, pad="</s>")
    path, model, _ = save(family, tokenizer=tokenizer, pad_token_id=1)
    prompts, completions = ["ab", "abc"], ["c", "defgh"]
    ids = [tokenizer(p + c)["input_ids"] for p, c in zip(prompts, completions, strict=True)]
    assert [row[-1] for row in ids] == [1, 1]
    expected = [oracle(model, row) for row in ids]
    scores = RewardModel(path)(prompts, completions)
    assert scores == pytest.approx(expected, abs=1e-5)
    input_ids, mask = right_pad(ids)
    with torch.no_grad():
        stock = model(input_ids.where(mask, 1), attention_mask=mask.long()).logits[:, 0].tolist()
    assert stock != pytest.approx(expected, abs=1e-2), "the negative control"


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_padding_tokens_do_not_matter(family):
    model = tiny_sequence_classifier(family, BYTES_VOCAB)
    input_ids, mask = right_pad([[5, 6, 7], [8], [9, 10]])
    with torch.no_grad():
        scores = sequence_scores(model, input_ids, mask)
        garbled = sequence_scores(model, input_ids.where(mask, 42), mask)
    assert scores.shape == (3,)
    torch.testing.assert_close(scores, garbled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_score_offset_is_subtracted(save, family):
    path, model, tokenizer = save(family, offset=2.5)
    assert json.loads(Path(path, "config.json").read_text())["score_offset"] == 2.5
    expected = oracle(model, tokenizer("abcd")["input_ids"]) - 2.5
    assert RewardModel(path)(["ab"], ["cd"]) == pytest.approx([expected], abs=1e-5)


def test_a_half_precision_checkpoint_is_scored_in_fp32(save):
    path, model, tokenizer = save("gpt2")
    model.to(torch.bfloat16).save_pretrained(path)
    reward = RewardModel(path)
    assert reward.model.dtype == torch.float32
    expected = oracle(model.to(torch.float32), tokenizer("abcd")["input_ids"])
    assert reward(["ab"], ["cd"]) == pytest.approx([expected], abs=1e-5)


def test_conversations_go_through_the_models_own_template(save):
    tokenizer = byte_tokenizer(add_bos=True, chat_template=CHATML)
    path, model, _ = save(tokenizer=tokenizer)
    messages = [
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        None,
        [{"role": "user", "content": "U"}, {"role": "assistant", "content": "so "}],
    ]
    prompts, completions = ["<policy>S U", "plain ", "<policy>"], ["one", "two", "far"]
    texts = [
        "<s>system\nS</s>\n<s>user\nU</s>\n<s>assistant\none</s>\n",
        "plain two",
        "<s>user\nU</s>\n<s>assistant\nso far</s>\n",
    ]
    assert reward_texts(tokenizer, prompts, completions, messages) == (texts, [True, False, True])
    ids = encode_for_reward(tokenizer, texts, [True, False, True])
    assert [row.count(0) for row in ids] == [3, 1, 2], "the template's BOS is not doubled"
    expected = [oracle(model, row) for row in ids]
    scores = RewardModel(path)(prompts, completions, messages=messages)
    assert scores == pytest.approx(expected, abs=1e-5)


def test_conversations_without_a_template_lose_the_policys_markup():
    messages = [[{"role": "user", "content": "Q?"}], None]
    texts, templated = reward_texts(byte_tokenizer(), ["<|user|>Q?", "p "], ["A.", "c"], messages)
    assert texts == ["Q?\n\nA.", "p c"]
    assert templated == [False, False]


def test_long_texts_lose_their_start_and_keep_special_tokens(save):
    tokenizer = byte_tokenizer(add_bos=True, add_eos=True)
    completion = "the end"
    (ids,) = encode_for_reward(tokenizer, ["x" * 90 + completion], [False], max_length=12)
    assert ids == [0, *tokenizer("xxx" + completion, add_special_tokens=False)["input_ids"], 1]
    (ids,) = encode_for_reward(tokenizer, ["x" * 90 + completion], [True], max_length=7)
    assert tokenizer.decode(ids) == completion
    path, model, _ = save(tokenizer=tokenizer)
    scores = RewardModel(path, max_length=12)(["x" * 90, "y" * 500], [completion] * 2)
    one = oracle(model, [0, *tokenizer("xxx" + completion)["input_ids"][1:-1], 1])
    other = oracle(model, [0, *tokenizer("yyy" + completion)["input_ids"][1:-1], 1])
    assert scores == pytest.approx([one, other], abs=1e-5)


def test_texts_beyond_the_models_positions_are_cut_by_default(save):
    path, model, tokenizer = save("gpt2", n_positions=32)
    expected = oracle(model, tokenizer("x" * 28 + "done")["input_ids"])
    assert RewardModel(path)(["x" * 100], ["done"]) == pytest.approx([expected], abs=1e-5)


def test_an_empty_text_has_a_score(save):
    path, model, _ = save()
    assert RewardModel(path)([""], [""]) == pytest.approx([oracle(model, [0])], abs=1e-5)


def test_weights_are_read_at_first_use_and_moved(save):
    path, _, _ = save()
    reward = RewardModel(path)
    assert not reward.is_loaded
    assert reward.to("cpu") is reward
    combined = build_rewards({"name": path, "weight": 2.0, "batch_size": 2})
    assert combined.load().to(torch.device("cpu")) is combined
    assert combined.rewards[0].function.is_loaded
    result = combined(["a", "b", "c"], ["x", "y", "z"], {"other": [1, 2, 3]})
    plain = reward(["a", "b", "c"], ["x", "y", "z"])
    assert result.scores == pytest.approx([2 * s for s in plain], abs=1e-5)
    assert list(result.by_name) == ["rm"]
    assert not any(p.requires_grad for p in reward.model.parameters())


def test_bad_models_are_one_line_before_weights_are_read(save, tmp_path, monkeypatch):
    import transformers

    def fail(*args, **kwargs):
        raise AssertionError("weights were read")

    two_labels, _, _ = save(name="two", num_labels=2)
    good, _, _ = save(name="good")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", fail)
    for spec, fault in (
        (two_labels, "has 2 labels, must have 1"),
        (str(tmp_path / "empty"), "must hold a config.json"),
        ({"name": good, "batch_size": 0}, "batch_size: given 0"),
        ({"name": good, "max_length": 0}, "max_length: given 0, must be at least 1"),
        ({"name": good, "max_length": 300}, "max_length: given 300, must be 1 to 256"),
        ({"name": good, "batchsize": 1}, "its parameters are path, batch_size, max_length"),
    ):
        with pytest.raises(UserError, match=fault) as error:
            build_rewards(spec)
        assert "\n" not in str(error.value)


def test_a_model_without_a_tokenizer_is_one_line(save, tmp_path):
    tiny_sequence_classifier("llama", BYTES_VOCAB).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="tokenizer") as error:
        RewardModel(str(tmp_path / "bare"))
    assert "\n" not in str(error.value)


def test_gradients_flow_through_sequence_scores():
    model = tiny_sequence_classifier("llama", BYTES_VOCAB)
    input_ids, mask = right_pad([[5, 6, 7], [8]])
    sequence_scores(model, input_ids, mask).sum().backward()
    assert model.score.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [tiny_sequence_classifier, tiny_causal_lm])
def test_an_encoder_cannot_be_a_policy_s_reward_model(make, tmp_path):
    make("bert", BYTES_VOCAB).save_pretrained(tmp_path)
    settings = ModelSettings(path=str(tmp_path))
    with pytest.raises(UserError, match="no linear `score` head"):
        build_classifier(settings, load_model_config(settings), byte_tokenizer())


def test_a_family_without_classifiers_is_refused_before_its_weights_are_read(
    tmp_path: Path,
) -> None:
    settings = ModelSettings(path=str(tmp_path))
    config = AutoConfig.for_model("lfm2", vocab_size=BYTES_VOCAB, hidden_size=32)
    with pytest.raises(UserError, match="its family, lfm2, has no sequence classifier"):
        build_classifier(settings, config, byte_tokenizer())


SIZES = {
    "t5": {"d_ff": 64, "d_kv": 8, "num_decoder_layers": 1},
    "bart": {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_layers": 1},
}


@pytest.mark.parametrize("family", SIZES)
def test_an_encoder_decoder_reads_its_score_off_eos_or_is_refused_when_loaded(family, save):
    """The fault would else show in the first batch only, after the first sampling."""
    sizes = {**SIZES[family], "decoder_start_token_id": 0, "pad_token_id": 2}
    path, _, _ = save(family, tokenizer=byte_tokenizer(), **sizes)
    with pytest.raises(UserError, match=r"path: .*ForSequenceClassification cannot score a text"):
        RewardModel(path).load()
    path, model, tokenizer = save(family, tokenizer=byte_tokenizer(add_eos=True), **sizes)
    texts = [tokenizer(text)["input_ids"] for text in ("ab", "abcde")]
    expected = [oracle(model, ids) for ids in texts]
    assert RewardModel(path)(["a", "ab"], ["b", "cde"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("template", "completion", "expected"),
    [
        ("[{role}] {content}", " yes", "[user] hi[assistant] yes"),  # the template writes a space
        ("[{role}]{content}", " yes", "[user]hi[assistant] yes"),
        ("[{role}]\n{content}", " yes", "[user]\nhi[assistant]\n yes"),
        ("[{role}] {content}", "yes", "[user] hi[assistant] yes"),
        ("[{role}] {content}", "  yes", "[user] hi[assistant]  yes"),
    ],
)
def test_a_space_is_read_once_where_template_and_policy_write_it(template, completion, expected):
    before, after = template.replace("{role}", "{{ m['role'] }}").split("{content}")
    opening = before.replace("{{ m['role'] }}", "assistant").rstrip(" ")
    tokenizer = byte_tokenizer(
        chat_template=f"{{% for m in messages %}}{before}{{{{ m['content'] }}}}{after}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    )
    messages = [[{"role": "user", "content": "hi"}]]
    assert reward_texts(tokenizer, ["hi"], [completion], messages) == ([expected], [True])
