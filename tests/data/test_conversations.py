"""What counts as a conversation, wherever messages are read, and what is refused in one line."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from support.tiny_models import CHATML, byte_tokenizer

from marlhf.common.types import UserError
from marlhf.config import (
    DataSettings,
    ModelSettings,
    PairDataSettings,
    RewardConfig,
    SFTConfig,
    SFTDataSettings,
)
from marlhf.data.conversations import text_or_messages
from marlhf.data.demonstrations import as_examples
from marlhf.data.pairs import load_preferences
from marlhf.data.prompts import Prompt, as_prompts, load_rows

USER, ASSISTANT = {"role": "user", "content": "abcd"}, {"role": "assistant", "content": "efgh"}
LM = ModelSettings(path="lm")


@pytest.fixture
def tokenizer():
    found = byte_tokenizer()
    found.chat_template = CHATML
    return found


@pytest.mark.parametrize(
    "value",
    [
        [USER],
        USER,  # texts of one length were read as a conversation of their letters
        (USER,),
        np.array([USER], dtype=object),
        {"role": ["user"], "content": ["abcd"]},
        {"role": np.array(["user"]), "content": ("abcd",), "name": None},
        USER | {"name": None, "tools": None},
        json.dumps(USER),
        f" {json.dumps([USER])}\n",
        json.dumps([USER], indent=2),
    ],
    ids=str,
)
def test_one_message(value):
    assert text_or_messages(value, "row 0") == ("abcd", [USER])


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"role": "user", "content": None}, "message 0 is {'role': 'user', 'content': None}"),
        ({"role": 1, "content": 2}, "message 0 is {'role': 1"),
        ({"role": "user", "content": ["abcd"]}, "message 0 is"),
        ({"role": ["user", "x"], "content": ["abcd"]}, "message 0 is"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "message 0 is"),
        ({"role": "user"}, "the prompt is dict, must be text or a list of messages"),
        ({"content": "x"}, "the prompt is dict"),
        ([[USER]], "message 0 is [{'role'"),
        ([USER, "x"], "message 1 is 'x'"),
        ([{"content": "x"}], "message 0 is {'content': 'x'}"),
        ([], "the prompt is empty"),
        ({"role": [], "content": []}, "the prompt is empty"),
        (np.array([]), "the prompt is empty"),
        ([USER | {"content": " "}], "the prompt is empty"),
        (str([USER]), "which is no JSON; messages written as text must be JSON"),
        ('[{"role": "user"}]', "message 0 is {'role': 'user'}"),
        (np.float64(3), "the prompt is float64"),
        (b"x", "the prompt is bytes"),
    ],
    ids=str,
)
def test_what_is_no_conversation(value, fault):
    with pytest.raises(UserError) as error:
        text_or_messages(value, "row 0")
    assert str(error.value).startswith("row 0: ")
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "[1] see below",
        '{"role": "user", "content": "x"} is a message',
        '{"role": "x"}',
        '[{"content": 1}]',
        "[]",
    ],
)
def test_other_texts_stay_texts(text):
    assert text_or_messages(text, "row 0") == (text, None)


def test_prompts_from_python():
    frame = pd.DataFrame({"prompt": [[USER], USER, "x"]})
    found = [Prompt("abcd", [USER]), Prompt("abcd", [USER]), Prompt("x")]
    assert as_prompts(frame) == found
    assert as_prompts([{"prompt": np.array([USER], dtype=object)}, [USER], "x"]) == found
    given: list = [Prompt("a", USER), Prompt("a", [USER])]  # pyright: ignore[reportArgumentType]
    assert as_prompts(given) == [Prompt("a", [USER])] * 2


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        (Prompt("a", [{"role": "user"}]), "row 0: message 0 is"),
        (Prompt("a", []), "row 0: the prompt is empty"),
        (Prompt(None), "row 0: the text of the Prompt is NoneType"),  # pyright: ignore
    ],
)
def test_malformed_prompt_objects(prompt, fault):
    with pytest.raises(UserError, match=fault):
        as_prompts([prompt])


def test_a_data_frame_with_a_column_twice():
    frame = pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"])
    with pytest.raises(UserError, match="data: the column 'prompt' is given twice"):
        as_prompts(frame)


def test_conversations_in_csv(tmp_path):
    cell = json.dumps([USER, ASSISTANT]).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'prompt\n"{cell}"\nplain\n')
    prompts, _ = load_rows(DataSettings(path=str(tmp_path / "a.csv"), eval_rows=0))
    assert list(prompts) == [Prompt("abcd\n\nefgh", [USER, ASSISTANT]), Prompt("plain")]
    as_text = DataSettings(path=str(tmp_path / "a.csv"), eval_rows=0, prompt_template="{prompt}")
    assert load_rows(as_text)[0][0].messages is None


def test_single_messages_to_imitate(tokenizer):
    rows = [
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": USER, "completion": ASSISTANT},
    ]
    config = SFTConfig(model=LM, data=SFTDataSettings(eval_rows=0))
    listed, single = as_examples(rows, config, tokenizer).rows
    assert listed == single


def test_single_messages_in_pairs(tokenizer, tmp_path):
    rejected = ASSISTANT | {"content": "ijkl"}
    rows = [
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [rejected]},
        {"prompt": USER, "chosen": ASSISTANT, "rejected": rejected},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PairDataSettings(path=str(tmp_path / "a.jsonl"), eval_rows=0)
    listed, single = load_preferences(RewardConfig(model=LM, data=data), tokenizer).pairs
    assert listed == single


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": "b", "role": "user", "content": "x"}]',
        '{"name": "b", "content": "x", "role": "user"}',
        '[{"tool_calls": null, "role": "user", "content": "x"}]',
    ],
)
def test_messages_written_as_text_may_begin_with_any_key(text):
    assert text_or_messages(text, "row 0")[0] == "x"


def test_text_with_such_words_in_braces_stays_text():
    code = 'if (a) { send({"role": "user", "content": b}); }'
    for text in (code, code[7:], '{"a": 1, "role": x, "content": y}'):
        assert text_or_messages(text, "row 0") == (text, None)


def test_a_key_given_twice_in_messages_written_as_text_is_refused():
    with pytest.raises(UserError, match="the key 'content' is given twice"):
        text_or_messages('[{"role": "user", "content": "a", "content": "b"}]', "row 0")
