"""Prompts to token ids: special tokens, cuts, and texts of no tokens."""

import pytest
from support.tiny_models import byte_tokenizer

from marlhf.common.errors import UserError
from marlhf.data.encoding import encode
from marlhf.rewards.learned import encode_for_reward


def test_special_tokens():
    tokenizer = byte_tokenizer(add_bos=True, add_eos=True)
    h, i = byte_tokenizer()("hi")["input_ids"]
    assert encode(["hi", "h"], tokenizer, 9) == ([[0, h, i], [0, h]], [False, False])
    assert encode(["hi", "<s>hi"], tokenizer, 9, [True, False])[0] == [[0, h, i], [0, h, i]]
    assert encode(["<s>hi"], tokenizer, 9)[0] == [[0, h, i]], "no second BOS"
    assert encode(["hi</s>"], tokenizer, 9, False)[0] == [[h, i, 1]], "the template's own EOS"
    assert encode(["hi</s>"], byte_tokenizer(), 9)[0] == [[h, i, 1]], "the user's own EOS"
    eos_only = byte_tokenizer(add_eos=True)
    assert encode(["hi</s>", "hi"], eos_only, 9)[0][1] == [h, i]


def test_long_prompts_keep_their_end_and_bos():
    ids = byte_tokenizer()("abcdef")["input_ids"]
    assert encode(["abcdef", "def"], byte_tokenizer(), 3) == ([ids[3:], ids[3:]], [True, False])
    assert encode(["abcdef"], byte_tokenizer(add_bos=True), 3) == ([[0, *ids[4:]]], [True])
    assert encode(["abcdef"], byte_tokenizer(add_bos=True), 1) == ([ids[5:]], [True])
    assert encode(["abcdef"], byte_tokenizer(add_bos=True), 7) == ([[0, *ids]], [False])


def test_no_tokens_at_all():
    assert encode([""], byte_tokenizer(), 5) == ([[0]], [False])
    assert encode([], byte_tokenizer(), 5) == ([], [])
    with pytest.raises(UserError, match="has no tokens, and the tokenizer has no BOS"):
        encode([""], byte_tokenizer(bos=None), 5)


@pytest.mark.parametrize("text", ["hi", "hi</s>", "hi</s>\n", "hi </s>  </s>"])
def test_a_text_that_names_its_eos_is_given_no_second_one(text):
    tokenizer = byte_tokenizer(add_eos=True)
    ids = encode_for_reward(tokenizer, [text], [False])[0]
    assert tokenizer.decode(ids).replace(" ", "") == "hi</s>"
