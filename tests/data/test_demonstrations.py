"""Rows -> token ids to train on: what is trained, what is cut, what is refused."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import CHATML, byte_tokenizer
from support.tokenizer_families import byte_level, sentencepiece_bpe

from marlhf.common.errors import UserError
from marlhf.common.tokenization import continuation_ids
from marlhf.config import ModelSettings, SFTConfig, SFTDataSettings
from marlhf.data.demonstrations import (
    SFTExample,
    SFTExamples,
    as_examples,
    load_examples,
)
from marlhf.data.packing import pack

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]
TRIMS_EARLIER_TURNS = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] if loop.last else '...' }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def examples(rows: list[Any], tokenizer: Any = None, **keys: Any) -> SFTExamples:
    """The rows' examples with a byte tokenizer; keys of `data` or of the configuration."""
    own = {k: keys.pop(k) for k in list(keys) if k in SFTDataSettings.__dataclass_fields__}
    config = SFTConfig(model=ModelSettings(path="x"), data=SFTDataSettings(**own), **keys)
    chat = byte_tokenizer(add_bos=True, chat_template=CHATML)
    return as_examples(rows, config, tokenizer or chat)


def shown(example: SFTExample, tokenizer: Any = None) -> str:
    """The example's text, what is trained in brackets."""
    tokenizer = tokenizer or byte_tokenizer()
    pieces, inside = [], False
    for token, trained in zip(example.ids, example.trained, strict=True):
        pieces += ["[" if trained else "]"] if trained != inside else []
        pieces.append(tokenizer.decode([token]))
        inside = trained
    return "".join(pieces) + ("]" if inside else "")


@pytest.mark.parametrize(
    ("row", "keys", "wanted"),
    [
        ({"prompt": "ab", "completion": " cd"}, {}, "<s>ab[ cd</s>]"),
        ({"prompt": "ab", "completion": " cd"}, {"loss_on": "all"}, "<s>[ab cd</s>]"),
        ({"prompt": "ab", "answer": "c"}, {"completion_column": "answer"}, "<s>ab[c</s>]"),
        (
            {"document": "ab", "summary": "c"},
            {"prompt_template": "{document}:", "completion_template": " {summary}!"},
            "<s>ab:[ c!</s>]",
        ),
        (
            {"prompt": "ab", "completion": "c"},
            {"apply_chat_template": True},
            "<s>user\nab</s>\n<s>assistant\n[c</s>]",
        ),
        (
            {"prompt": CHAT[:3], "completion": "no"},
            {},
            "<s>user\nhi</s>\n<s>assistant\nyes?</s>\n<s>user\nmore</s>\n<s>assistant\n[no</s>]",
        ),
        (
            {"prompt": CHAT[:3], "completion": CHAT[3:]},
            {},
            "<s>user\nhi</s>\n<s>assistant\nyes?</s>\n<s>user\nmore</s>\n<s>assistant\n[no</s>]",
        ),
        (
            {"prompt": CHAT[:2], "completion": " Really?"},
            {},
            "<s>user\nhi</s>\n<s>assistant\nyes?[ Really?</s>]",
        ),
        (
            {"messages": CHAT},
            {"text_column": "messages"},
            "<s>user\nhi</s>\n<s>assistant\n[yes?</s>]\n<s>user\nmore</s>\n<s>assistant\n[no</s>]",
        ),
        (
            {"messages": CHAT[:2]},
            {"text_column": "messages", "loss_on": "all"},
            "<s>[user\nhi</s>\n<s>assistant\nyes?</s>]",
        ),
        ({"text": "ab"}, {"text_column": "text"}, "<s>[ab</s>]"),
        # the text names its EOS
        ({"text": "ab</s>"}, {"text_column": "text"}, "<s>[ab</s>]"),
        ({"text": "ab</s>\n"}, {"text_column": "text"}, "<s>[ab</s>]"),
        ({"text": "a</s> b"}, {"text_column": "text"}, "<s>[a</s> b</s>]"),
        ({"prompt": "ab", "completion": " cd</s> \n</s>\n"}, {}, "<s>ab[ cd</s>]"),
        (
            {"prompt": [{"role": "user", "content": "ab"}], "completion": "c</s>\n"},
            {},
            "<s>user\nab</s>\n<s>assistant\n[c</s>]",
        ),
    ],
)
def test_what_is_trained(row, keys, wanted):
    (example,) = examples([row], **keys).rows
    assert shown(example) == wanted
    assert not example.trained[0]


def test_a_tokenizer_without_bos_trains_a_text_from_its_second_token():
    (example,) = examples([{"text": "ab"}], byte_tokenizer(), text_column="text").rows
    assert shown(example) == "a[b</s>]"


def test_a_template_without_eos_gets_one():
    template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}a:{% endif %}"
    tokenizer = byte_tokenizer(chat_template=template)
    (example,) = examples([{"messages": CHAT}], tokenizer, text_column="messages").rows
    assert shown(example) == "u:hi\na:[yes?\n]u:more\na:[no\n</s>]"


@pytest.mark.parametrize(
    ("length", "wanted", "keys"),
    [
        (8, "<s>abc[ x</s>]", {}),
        (7, "<s>abc[ x</s>]", {}),
        (6, "<s>bc[ x</s>]", {}),
        (5, "<s>c[ x</s>]", {}),
        (4, "c[ x</s>]", {}),  # one token of the prompt stays
        (3, "c[ x]", {}),
        (6, "<s>[bc x</s>]", {"loss_on": "all"}),
        (6, "<s>[abc x]", {"text_column": "text"}),
    ],
)
def test_too_long_an_example_loses_its_prompt_first(length, wanted, keys):
    row = {"prompt": "abc", "completion": " x", "text": "abc x"}
    made = examples([row], max_length=length, **keys)
    assert [shown(e) for e in made.rows] == [wanted]
    assert made.truncated == (length < 7)


def test_rows_of_which_nothing_is_left_are_counted():
    rows = [{"text": CHAT[:2]}, {"text": [{**CHAT[0], "content": "hi " * 50}, CHAT[1], *CHAT]}]
    made = examples(rows, text_column="text", max_length=60)
    assert (len(made.rows), made.truncated, made.left_out) == (1, 1, 1)


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece_bpe()], ids=["bytes", "spm"])
@pytest.mark.parametrize("text", [" the dog", "the dog", "dog\n\n", "\n\nok", "👍🏽", "1. First"])
def test_a_completion_is_tokenised_as_what_follows(tokenizer, text):
    ids = continuation_ids(text, tokenizer)
    before = tokenizer("jumps over:", add_special_tokens=False)["input_ids"]
    joined = tokenizer.decode([*before, *ids], skip_special_tokens=True)
    assert joined == tokenizer.decode(before, skip_special_tokens=True) + text


@pytest.mark.parametrize(
    ("rows", "keys", "fault"),
    [
        ([{"prompt": "a"}], {}, "data.completion_column: no column is called 'completion'"),
        ([{"prompt": "a", "completion": " "}], {}, "data: row 0: the completion is empty"),
        ([{"prompt": "a", "completion": None}], {}, "row 0: the completion is null"),
        ([{"prompt": "a", "completion": 3}], {}, "row 0: the completion is int"),
        ([{"prompt": "a", "completion": []}], {}, "row 0: the completion is empty"),
        ([{"prompt": " ", "completion": "a"}], {}, "row 0: the prompt is empty"),
        (
            [{"prompt": "a", "completion": "b"}],
            {"completion_template": "{x}"},
            "data.completion_template: no column is called 'x'",
        ),
        ([{"text": "a"}], {"text_column": "texts"}, "data.text_column: no column is called"),
        ([{"text": ""}], {"text_column": "text"}, "row 0: the text is empty"),
        ([{"text": CHAT[:1]}], {"text_column": "text"}, "has no turn of the assistant"),
        ([{"text": CHAT[1:]}], {"text_column": "text"}, "begins with a turn of the assistant"),
        (
            [{"text": CHAT}],
            {"text_column": "text", "max_length": 5},
            "no row has a token to train on within max_length=5",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(rows, keys, fault):
    with pytest.raises(UserError, match="data"):
        examples(rows, **keys)
    with pytest.raises(UserError) as error:
        examples(rows, **keys)
    assert fault in str(error.value)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = byte_tokenizer(chat_template=TRIMS_EARLIER_TURNS)
    with pytest.raises(UserError, match=r"row 0: the template writes the beginning"):
        examples([{"text": CHAT}], tokenizer, text_column="text")
    (whole,) = examples([{"text": CHAT}], tokenizer, text_column="text", loss_on="all").rows
    assert shown(whole).endswith("no</s>]")


def test_held_out_rows_keep_their_numbers(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\na,b\nc,d\ne, \n")
    data = SFTDataSettings(path=str(path), eval_rows=1)
    config = SFTConfig(model=ModelSettings(path="x"), data=data)
    with pytest.raises(UserError, match="held-out data: row 2: the completion is"):
        load_examples(config, byte_tokenizer())
    without_eos = byte_tokenizer()
    without_eos.eos_token = None
    with pytest.raises(UserError, match=r"model\.path: the tokenizer has no EOS token"):
        load_examples(config, without_eos)


def plainly_packed(lengths: list[int], size: int) -> list[int]:
    """Best-fit decreasing, by looking at every group for every example."""
    rooms: list[int] = []
    groups = [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [(room, group) for group, room in enumerate(rooms) if room >= lengths[index]]
        group = min(fits)[1] if fits else len(rooms)
        rooms += [] if fits else [size]
        rooms[group] -= lengths[index]
        groups[index] = group
    return groups


@given(st.lists(st.integers(1, 30), max_size=60))
def test_packing_is_best_fit_decreasing(lengths):
    assert pack(np.array(lengths, int), 30).tolist() == plainly_packed(lengths, 30)


def test_packing_wastes_little():
    draw = random.Random(0)
    lengths = np.array([draw.randint(1, 30) for _ in range(300)])
    filled = np.bincount(pack(lengths, 64), lengths)
    assert filled.max() <= 64
    assert filled.min() > 0
    assert len(filled) <= 1.05 * lengths.sum() / 64
