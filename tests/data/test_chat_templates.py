"""Chat templates of a run: the day they see, what they make of answers, prompts that come twice."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import warm_python
from support.runs import tiny_config
from support.tiny_models import (
    BYTES_VOCAB,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_sequence_classifier,
)

from marlhf import cli
from marlhf.common.errors import UserError
from marlhf.config import (
    EvaluateConfig,
    ModelSettings,
    PairDataSettings,
    RewardConfig,
    SFTConfig,
    SFTDataSettings,
)
from marlhf.config.loading import config_from_dict
from marlhf.data import template_checks
from marlhf.data.demonstrations import as_examples
from marlhf.data.pairs import load_preferences
from marlhf.distributed import Distributed
from marlhf.rewards import RewardModel
from marlhf.runs.metrics import Timer
from marlhf.training.ppo import PPOTrainer

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# as DeepSeek-R1's: what an answer says up to </think> is dropped
FORGETS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
# the answer's reasoning is written anew, but only if both tags are there
SPLITS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and not ('<think>' in m.content and '</think>' in m.content) %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
NO_HEADER = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
)
DATED = (
    "{% if strftime_now is defined %}Today is {{ strftime_now('%d %B %Y') }}.{% endif %}" + PLAIN
)
THOUGHT = "<think>two and two</think>four"


def chat(*turns: str) -> list[dict[str, str]]:
    """Turns of user and assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]


def reward_model(folder: Path, template: str | None) -> str:
    tiny_sequence_classifier("llama", BYTES_VOCAB).save_pretrained(folder)
    byte_tokenizer(chat_template=template).save_pretrained(folder)
    return str(folder)


def trainer(folder: Path, reward: Any, data: list[Any], template: str) -> PPOTrainer:
    return PPOTrainer(
        tiny_config(folder / "run", steps=1, rollout={"batch_size": 2, "max_prompt_length": 200}),
        reward=reward,
        train_dataset=data,
        model=tiny_causal_lm("llama", BYTES_VOCAB),
        tokenizer=byte_tokenizer(chat_template=template),
    )


def test_a_role_that_a_reward_model_does_not_take_is_found_before_training(tmp_path: Path) -> None:
    reward = reward_model(tmp_path / "rm", NO_SYSTEM)
    data: list[Any] = [chat("say one")] * 8
    data[7] = [{"role": "system", "content": "be brief"}, *chat("say two")]
    for spec in (reward, {"name": "per_segment", "reward": reward}):
        with pytest.raises(UserError, match=r"reward .*: data: row 7: .* system, user, assistant"):
            trainer(tmp_path, spec, data, PLAIN)


@pytest.mark.parametrize(
    ("policy", "reward", "says"),
    [
        (PLAIN, PLAIN, []),
        (PLAIN, NO_HEADER, []),
        (FORGETS, FORGETS, ["reward rm: its chat template leaves out 'a thought. </think>'"]),
        (
            PLAIN,
            FORGETS,
            ["reward rm: its chat template leaves out '<think> This is a thought. </think>'"],
        ),
        (SPLITS, SPLITS, ["reward rm: the chat template, which is the policy's, gives it"]),
        (NO_HEADER, PLAIN, ["add_generation_prompt adds nothing"]),
    ],
)
def test_a_template_that_changes_answers_is_named(
    policy: str, reward: str, says: list[str], tmp_path: Path
) -> None:
    run = trainer(tmp_path, reward_model(tmp_path / "rm", reward), [chat("2+2?")] * 2, policy)
    lines = [line for line in run.notes if not line.startswith("critic.init")]
    assert len(lines) == len(says)
    assert all(part in line for part, line in zip(says, lines, strict=True))


def test_the_lines_are_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, reward_model(tmp_path / "rm", FORGETS), [chat("2+2?")] * 2, PLAIN)
    run.train()
    assert "marlhf: reward rm: its chat template leaves out" in capsys.readouterr().err
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "# reward rm: its chat template leaves out" in text
    assert "# critic.init: auto: the critic starts from the reward model" in text
    assert yaml.safe_load(text)["steps"] == 1


def sft(rows: list[dict[str, Any]], template: str, loss_on: str = "completion", **data: Any) -> Any:
    settings = SFTDataSettings(path="given", **data)
    config = SFTConfig(model=ModelSettings(path="x"), data=settings, loss_on=loss_on)
    tokenizer = byte_tokenizer(chat_template=template)
    examples = as_examples(rows, config, tokenizer)
    trained = [
        tokenizer.decode([i for i, t in zip(e.ids, e.trained, strict=True) if t])
        for e in examples.rows
    ]
    return list(examples.notes), trained


def test_sft_says_what_a_template_makes_of_a_completion() -> None:
    rows = [{"prompt": chat("2+2?"), "completion": THOUGHT}] * 2
    assert sft(rows, PLAIN) == ([], [THOUGHT + "</s>"] * 2)
    (line,), trained = sft(rows, NO_HEADER)
    assert "(and 0 more" not in line
    assert "puts text before the answer" in line
    assert "'assistant: '" in line
    assert trained[0].startswith("assistant: ")
    forgets = FORGETS.replace("<think>\n{% endif", "{% endif")
    (line,), _ = sft(rows, forgets)
    assert "leaves out a part of the answer" in line
    assert "two and two" in line
    reasoned = [{"role": "assistant", "content": "four", "reasoning_content": "two and two"}]
    (line,), _ = sft([{"prompt": chat("2+2?"), "completion": reasoned}], PLAIN)
    assert "two and two" in line


def test_sft_advises_nothing_that_trains_without_the_reasoning() -> None:
    with pytest.raises(UserError) as fault:
        sft([{"prompt": chat("2+2?"), "completion": THOUGHT}], FORGETS)
    assert "text_column" not in str(fault.value)
    assert "two and two" in str(fault.value)
    last_only = PLAIN.replace("m.content }}", "m.content if loop.last else m.content[:1] }}")
    turns = [{"text": chat("a", "be brief", "c", "d")}]
    with pytest.raises(UserError) as fault:
        sft(turns, last_only, text_column="text")
    assert "text_column" not in str(fault.value)
    harmless = PLAIN + "{{ messages | length }}"
    with pytest.raises(UserError, match=r"text_column and loss_on=all"):
        sft(turns, harmless, text_column="text")
    (line,), _ = sft([{"text": chat("2+2?", THOUGHT)}], FORGETS, "all", text_column="text")
    assert "two and two" in line


SYSTEM = {"role": "system", "content": "brief"}
REPEATED: list[tuple[Any, Any]] = [
    ("say 1", chat("say 1", "yes")),
    (chat("say 1"), chat("say 1", "yes")),
    (chat("say 1"), chat("say 1 ", "yes")),
    (chat("a", "b", "say 1"), chat("a", "b", "say 1", "yes")),
    ([SYSTEM, *chat("say 1")], chat("say 1", "yes")),
    (chat("say 1"), [SYSTEM, *chat("say 1", "yes")]),
    (chat("say 1", "ye"), chat("say 1", "yes")),
    # the last question of a longer conversation
    ("say 1", chat("a", "b", "say 1", "yes")),
    (chat("c", "d", "say 1"), chat("a", "b", "c", "d", "say 1", "yes")),
    ([SYSTEM, *chat("say 1")], chat("a", "b", "say 1", "yes")),
    (chat("say 1"), [SYSTEM, *chat("a", "b", "say 1", "yes")]),
    (chat("say 1", "ye"), chat("a", "b", "say 1", "yes")),
]


@pytest.mark.parametrize(("prompt", "conversation"), REPEATED)
def test_a_prompt_that_comes_twice_is_taken_once(
    prompt: Any, conversation: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": prompt, "chosen": conversation, "rejected": [*conversation[:-1], NO]}] * 3
    (tmp_path / "u.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PairDataSettings(path=str(tmp_path / "u.jsonl"), eval_rows=0)
    config = RewardConfig(model=ModelSettings(path="x"), data=data)
    tokenizer = byte_tokenizer(chat_template=PLAIN)
    found = load_preferences(config, tokenizer)
    text = tokenizer.decode(found.pairs[0].chosen)
    assert text.count("say 1") == 1
    assert text.endswith(
        "<user>say 1</s><assistant>yes</s>".replace("say 1<", f"{said(conversation)}<")
    )
    (line,) = found.notes
    assert "data: row 0 (and 2 more rows)" in line
    assert "taken once" in line
    rows = [{"prompt": prompt, "completion": conversation}]
    (line,), (trained,) = sft(rows, PLAIN)
    assert trained == "yes</s>"
    assert "taken once" in line


NO = {"role": "assistant", "content": "no"}


def said(conversation: list[dict[str, str]]) -> str:
    return conversation[-2]["content"]


def test_a_user_who_says_the_same_again_is_not_taken_for_the_prompt() -> None:
    turns = [{"role": "assistant", "content": "what?"}, *chat("say 1", "yes")]
    notes, (trained,) = sft([{"prompt": chat("say 1"), "completion": turns}], PLAIN)
    assert notes == []
    assert trained == "what?</s>yes</s>"


DAYS = """
import datetime, sys
import marlhf.data.template_checks as checks
import transformers.utils.chat_template_utils as templates
class Day(datetime.date):
    @classmethod
    def today(cls): return cls(2031, 5, int(sys.argv[1]))
class Now(datetime.datetime):
    @classmethod
    def now(cls, tz=None): return cls(2031, 5, int(sys.argv[1]), 9)
checks.date, templates.datetime = Day, Now
from marlhf.cli import main
main(sys.argv[2:])
"""  # a machine whose clock shows another day


def on_day(day: int, *words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [warm_python.command(), "-c", DAYS, str(day), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def evaluation(folder: Path) -> dict[str, Any]:
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(folder / "lm")
    byte_tokenizer(chat_template=DATED).save_pretrained(folder / "lm")
    row = json.dumps({"prompt": chat("say 1")}) + "\n"
    (folder / "p.jsonl").write_text(row * 2)
    return {
        "policies": {"a": str(folder / "lm")},
        "data": {"path": str(folder / "p.jsonl"), "eval_rows": 0},
        "rewards": [reward_model(folder / "rm", DATED)],
        "rollout": {"max_new_tokens": 4, "max_prompt_length": 200},
        "output_dir": str(folder / "out"),
    }


def test_an_evaluation_goes_on_on_another_day(tmp_path: Path) -> None:
    config = evaluation(tmp_path)
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump(config))
    on_day(3, "evaluate", str(file))
    samples = (tmp_path / "out" / "samples.jsonl").read_text()
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    lines = samples.splitlines(keepends=True)
    (tmp_path / "out" / "samples.jsonl").write_text(lines[0])  # as if it had been stopped there
    on_day(4, "evaluate", str(file))
    assert (tmp_path / "out" / "samples.jsonl").read_text() == samples
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == first
    recorded = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert recorded["data"]["template_date"] == "2031-05-03"


@pytest.mark.parametrize("resume", ["auto", "checkpoints/step-1"])
def test_a_run_goes_on_on_another_day(
    resume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_of(day: int, **sections: Any) -> PPOTrainer:
        class Day(date):
            @classmethod
            def today(cls) -> Day:
                return cls(2031, 5, day)

        monkeypatch.setattr(template_checks, "date", Day)
        sections |= {"checkpoint": {"every": 1}, "overwrite": False}
        sections |= {"rollout": {"batch_size": 2, "max_prompt_length": 200}}
        return PPOTrainer(
            tiny_config(tmp_path / "run", **sections),
            reward=lambda prompts, completions: [1.0] * len(prompts),
            train_dataset=[chat("say 1")] * 2,
            model=tiny_causal_lm("llama", BYTES_VOCAB),
            tokenizer=byte_tokenizer(chat_template=DATED),
        )

    run_of(3, steps=1).train()
    later = run_of(
        4, steps=2, resume=resume if resume == "auto" else str(tmp_path / "run" / resume)
    )
    assert later.step_count == 1
    assert later.config.data.template_date == "2031-05-03"
    rollout = later.worker(list(later.stream.prompts), [0, 1], 0, Timer())
    (text, _) = later.tokenizer.batch_decode(rollout.generation.prompt_ids)
    assert "Today is 03 May 2031." in text


@pytest.mark.parametrize(
    "text",
    ["[]", "7", "[" * 10_000, "data: 5", "data: [1]", "data: {template_date: 7}"],
    ids=lambda text: text[:24],
)
def test_a_spoilt_record_of_the_day_is_none(text: str, tmp_path: Path) -> None:
    config = config_from_dict(EvaluateConfig, evaluation(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text(text)
    found = template_checks.dated(config, Distributed("fp32"))
    assert found.data.template_date == date.today().isoformat()


def test_policy_and_reward_model_see_the_day_that_is_given(tmp_path: Path) -> None:
    path = reward_model(tmp_path / "rm", DATED)
    config = tiny_config(
        tmp_path / "run",
        data={"template_date": "2020-01-02"},
        rollout={"batch_size": 2, "max_prompt_length": 200},
    )
    run = PPOTrainer(
        config,
        reward=path,
        train_dataset=[chat("say 1")] * 2,
        model=tiny_causal_lm("llama", BYTES_VOCAB),
        tokenizer=byte_tokenizer(chat_template=DATED),
    )
    written = "Today is 02 January 2020.<user>say 1</s><assistant>"
    rollout = run.worker(list(run.stream.prompts), [0, 1], 0, Timer())
    assert run.tokenizer.decode(rollout.generation.prompt_ids[0].tolist()).endswith(written)
    plain = RewardModel(reward_model(tmp_path / "plain", None))
    (scored,) = run.reward.rewards
    assert scored.function(["-"], ["yes"], messages=[chat("say 1")]) == pytest.approx(
        plain([written], ["yes</s>"]), abs=1e-5
    )


def test_a_day_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(yaml.safe_dump({**evaluation(tmp_path), "data": {"template_date": "May 3"}}))
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", str(file)])
    assert end.value.code == 2
    assert "data.template_date: given 'May 3', must be a date" in capsys.readouterr().err
