"""What a chat template leaves out of a prompt is said before training, whoever reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.tiny_models import byte_tokenizer
from test_chat_templates import NO_SYSTEM, PLAIN, chat, reward_model, sft, trainer

from marlhf.common.errors import UserError
from marlhf.config import DataSettings, ModelSettings, PairDataSettings, RewardConfig
from marlhf.data.conversations import text_or_messages
from marlhf.data.pairs import load_preferences
from marlhf.data.prompts import load_rows, render

SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
RESULT = {"role": "tool", "content": '{"sum":\n 4}'}
SKIPS = "{{% for m in messages if {} %}}<{{{{ m.role }}}}>{{{{ m.content }}}}</s>{{% endfor %}}"
NO_TURNS_OF_SYSTEM = SKIPS.format("m.role != 'system'")
CALLS = "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
WRITES_CALLS = PLAIN.replace("{{ m.content }}", "{{ m.content }}" + CALLS)
AS_JSON = PLAIN.replace("{{ m.content }}", "{{ m.content | tojson }}")
LISTS_TOOLS = PLAIN + "{% for tool in tools or [] %}{{ tool }}{% endfor %}"

# template, conversation, and the turn that is said to be missing
OMISSIONS: list[tuple[str, list[dict[str, Any]], str]] = [
    (PLAIN, [SYSTEM, *chat("2+2?")], ""),
    (NO_TURNS_OF_SYSTEM, [SYSTEM, *chat("2+2?")], "system: be brief"),
    (NO_TURNS_OF_SYSTEM, chat("2+2?"), ""),
    (SKIPS.format("m.role in ('user', 'assistant')"), [*chat("2+2?"), RESULT], "tool: "),
    (SKIPS.format("m.content != 'hello'"), chat("hello", "yes?", "2+2?"), "user: hello"),
    (PLAIN.replace("m.content", "m.content.split('</think>')[-1]"),
     chat("hi", "<think>why</think>yes?", "2+2?"), ""),
    (PLAIN.replace("m.content", "m.content | trim"), chat(" 2+2? "), ""),
    (PLAIN.replace("m.content", "m.content[0]['text']"), chat("2+2?"), "user: 2+2?"),
    (AS_JSON, [*chat("2+2?"), RESULT], ""),
    (WRITES_CALLS, [*chat("2+2?"), CALL, RESULT], ""),
    (PLAIN, [*chat("2+2?"), CALL, RESULT], "assistant: add"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "messages", "missing"), OMISSIONS)
def test_a_turn_left_out_of_a_prompt_is_named_in_every_job(
    template: str, messages: Any, missing: str, tmp_path: Path
) -> None:
    def lines(notes: Any) -> list[str]:
        return [line for line in notes if "leaves out" in line and "of the prompt" in line]

    notes = [lines(trainer(tmp_path, lambda prompts, completions: [0.0] * len(prompts),
                           [messages] * 2, template).notes)]  # fmt: skip
    notes.append(lines(sft([{"prompt": messages, "completion": "four"}] * 2, template)[0]))
    for found in notes:
        assert len(found) == bool(missing), found
        assert all("data: row 0" in line and missing in line for line in found)


def preferences(folder: Path, template: str, **row: Any) -> list[str]:
    rows = [{"chosen": "four", "rejected": "five", **row}] * 3
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PairDataSettings(path=str(folder / "pairs.jsonl"), eval_rows=0)
    config = RewardConfig(model=ModelSettings(path="x"), data=data)
    return list(load_preferences(config, byte_tokenizer(chat_template=template)).notes)


def test_a_turn_left_out_of_a_pair_is_named(tmp_path: Path) -> None:
    (line,) = preferences(tmp_path, NO_TURNS_OF_SYSTEM, prompt=[SYSTEM, *chat("2+2?")])
    assert line.startswith("data: row 0 (and 2 more rows): the chat template leaves out a turn")
    assert preferences(tmp_path, PLAIN, prompt=[SYSTEM, *chat("2+2?")]) == []


def test_tools_that_no_template_is_given_are_named(tmp_path: Path) -> None:
    row = {"prompt": chat("2+2?"), "tools": [{"name": "add"}]}
    reward = reward_model(tmp_path / "rm", PLAIN)
    for template, expected in ((PLAIN, 0), (LISTS_TOOLS, 1)):
        for notes in (
            trainer(tmp_path, reward, [row] * 2, template).notes,
            sft([{**row, "completion": "four"}] * 2, template)[0],
            preferences(tmp_path, template, **row),
        ):
            assert sum("the column 'tools' is not given" in line for line in notes) == expected


def test_a_turn_that_only_calls_a_tool_has_no_text(tmp_path: Path) -> None:
    messages = [*chat("2+2?"), CALL, RESULT, *chat("so?", "four")]
    for content in ("", None):
        messages[1] = {**CALL, "content": content}
        notes, (trained,) = sft([{"text": messages}], WRITES_CALLS, text_column="text")
        assert notes == []
        assert trained.startswith('[{"function": {"name": "add"}}]</s>four')
        assert preferences(tmp_path, WRITES_CALLS, prompt=messages[:-1]) == []
        (line,), _ = sft([{"text": messages}], PLAIN, text_column="text")
        assert "leaves out a part of the answer: 'add'" in line
    with pytest.raises(UserError, match="message 0"):
        text_or_messages([{"role": "assistant", "content": None}], "data: row 0")


def test_keys_that_parquet_fills_in_are_no_text_of_a_conversation(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": [2]}}]
    turns = [[*chat("2+2?"), {**CALL, "tool_calls": [call]}, RESULT] for call in calls]
    rows = [{"prompt": messages, "fact": {"a": None}} for messages in turns]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    prompts, _ = load_rows(DataSettings(path=str(tmp_path / "p.parquet"), eval_rows=0))
    for prompt, call in zip(prompts, calls, strict=True):
        text = render(prompt, byte_tokenizer(chat_template=WRITES_CALLS))
        (written,) = re.findall(r"<assistant>\[(.*?)\]</s>", text)
        assert json.loads(written) == call  # Arrow may order its keys
        assert prompt.columns["fact"] == {"a": None}


def test_a_template_that_writes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data: row 0: the chat template writes nothing for"):
        trainer(tmp_path, reward_model(tmp_path / "rm", PLAIN), [chat("2+2?")] * 2, "{# #}")
    with pytest.raises(UserError, match="no row has a token to train on"):
        sft([{"prompt": chat("2+2?"), "completion": "four"}], "{# #}")


def test_messages_with_other_keys_are_another_kind(tmp_path: Path) -> None:
    """A template may need a key that few rows lack."""
    needs_name = NO_SYSTEM.replace("{{ m.role }}", "{{ m.role + m.name }}")
    named = [{"role": "user", "content": "2+2?", "name": "Ann"}]
    reward = {"name": "length", "target": 5}
    with pytest.raises(UserError, match="data: row 6: the chat template refuses"):
        trainer(tmp_path, reward, [named] * 6 + [chat("2+2?")] * 2, needs_name)
