"""Broken models, data and output directories: a clear line each, status 2."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.bad_input import Refusals, build_world, cases

from marlhf.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def refused(world: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> Refusals:
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Refusals(world, capfd, monkeypatch)


MODELS = """
model.path=./nowhere -> model.path: given './nowhere', which does not exist & a hub name such as
model.path=/no/where/else -> model.path: given '/no/where/else', which does not exist
model.path=data.jsonl -> model.path: given 'data.jsonl', which is a file; must be the
model.path=empty_folder -> 'empty_folder' must hold & exactly one .gguf file; found neither
model.path=adapter_alone -> holds an adapter alone & `marlhf merge adapter_alone OUT`
model.path=org/no-such-model -> model.path: cannot load & 'org/no-such-model'
model.path=t5 -> model.path: 't5' is no causal language model
model.path=small_lm -> model.path: the tokenizer has 259 tokens, the model 64
model.revision=main -> model.revision: given 'main', but 'lm' is local and has no revisions
model.lora.target_modules=[nothing] -> model.lora.target_modules: given 'nothing'
model.lora.target_modules="[(" -> model.lora: unterminated character set
model.lora.target_modules=[] -> model.lora: No `target_modules` passed
model.lora.extra={use_rslroa: true} -> model.lora.extra.use_rslroa: & did you mean 'use_rslora'?
model.lora.extra={rank: 3} -> model.lora.extra.rank: peft.LoraConfig has no such key
model.lora.extra={r: 3} -> model.lora.extra.r: must be given as model.lora.r
model.lora.extra={lora_dropout: 0.1} -> model.lora.extra.lora_dropout: must stay 0
model.lora.extra={bias: some} -> model.lora.extra.bias: must stay none
critic.path=./nowhere -> critic.path: given './nowhere', which does not exist
critic.path=empty_folder -> critic.path: directory 'empty_folder' must hold
critic.path=labels_rm -> critic.path: 'labels_rm' has 2 labels, must have 1
critic.path=lm -> critic.path: 'lm' is a LlamaForCausalLM, has 2 labels, must have 1 (a sequence
critic.path=other_rm -> critic.path: 'other_rm' & a vocabulary of 259 tokens, the policy 260
critic.path=other_rm ;; model.lora.r=2 -> a vocabulary of 259 tokens, the policy 260
reward.models=other_rm ;; critic.init=reward -> critic.init: given 'reward' & 259 tokens
reward.models=labels_rm -> 'labels_rm' has 2 labels, must have 1
reward.models=lm -> reward lm: path: 'lm' is a LlamaForCausalLM, has 2 labels, must have 1
reward.models=small_rm -> reward small_rm: path: the tokenizer has 259 tokens, the model 64
reward.models=empty_folder -> reward empty_folder: path: directory 'empty_folder'
reward.models=org/no-such-model -> reward org/no-such-model: path: cannot load 'org/no-such-model'
reward.models={name: rm, batchsize: 1} -> its parameters are path, batch_size, max_length
reward.models={name: rm, batch_size: 0} -> reward rm: batch_size: given 0, must be at least 1
reward.models={name: rm, max_length: 999} -> reward rm: max_length: given 999, must be 1 to 256
data.apply_chat_template=true -> model.chat_template: must be given, because
data.apply_chat_template=true ;; model.chat_template="{% for" -> model.chat_template: & refuses
"""


@pytest.mark.parametrize(("overrides", "fragments"), cases(MODELS))
def test_a_wrong_model(overrides, fragments, refused):
    Path("t5").mkdir(exist_ok=True)
    shutil.copytree("lm", "t5", dirs_exist_ok=True)
    Path("t5/config.json").write_text('{"model_type": "t5", "vocab_size": 300}')
    Path("adapter_alone").mkdir(exist_ok=True)
    Path("adapter_alone/adapter_config.json").write_text("{}")
    line = refused.of(*overrides)
    for fragment in fragments:
        assert fragment in line


def written(name: str, content: str | bytes) -> Callable[[Path], Any]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def configured(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def without_last_bytes(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1000])


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def second_gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "a.gguf").write_text("x")
    (folder / "b.gguf").write_text("x")


def broken_gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "a.gguf").write_text("no such magic")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config.json is no JSON": (written("config.json", "{"), "not a valid JSON"),
    "config.json is empty": (written("config.json", ""), "not a valid JSON"),
    "config.json is a list": (written("config.json", "[]"), "cannot load"),
    "config.json says nothing": (written("config.json", "{}"), "`model_type` key"),
    "an unknown type": (configured(model_type="gpt9"), "model type `gpt9`"),
    "heads do not divide": (configured(num_attention_heads=5), "not a multiple"),
    "a size is a text": (configured(hidden_size="big"), "expected int, got str"),
    "code of its own": (
        configured(model_type="own", auto_map={"AutoConfig": "code.Own"}),
        "contains custom code",
    ),
    "no weights": (without_weights, "has a config.json but no weights"),
    "weights are no weights": (written("model.safetensors", "abc"), "model.safetensors'"),
    "weights are empty": (written("model.safetensors", ""), "model.safetensors'"),
    "weights are cut short": (without_last_bytes, "not fully covered"),
    "no tokenizer": (without_tokenizer, "cannot load the tokenizer"),
    "the tokenizer is no JSON": (written("tokenizer.json", "{"), "cannot load the tokenizer"),
    "the tokenizer is a list": (written("tokenizer.json", "[]"), "cannot load the tokenizer"),
    "its settings are no JSON": (
        written("tokenizer_config.json", "{"),
        "cannot load the tokenizer",
    ),
    "two GGUF files": (second_gguf, "exactly one .gguf file; found a.gguf, b.gguf"),
    "a GGUF file that is none": (broken_gguf, "GGUF magic"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_broken_model_folder(name, refused):
    change, fragment = FOLDERS[name]
    folder = refused.copy("lm", change)
    line = refused.of(f"model.path={folder.name}")
    assert line.startswith("marlhf: model.path: ")
    assert fragment in line
    assert folder.name in line


@pytest.mark.parametrize("override", ["critic.path=", "reward.models="])
def test_a_second_model_without_weights_is_found_before_the_first_is_loaded(override, refused):
    folder = refused.copy("rm", without_weights)
    assert "has a config.json but no weights" in refused.of(override + folder.name)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (configured(num_hidden_layers=3), "9 are missing or of another shape, model.layers.2"),
        (configured(intermediate_size=48), "6 are missing or of another shape"),
    ],
)
def test_weights_that_do_not_fit_are_not_made_up(change, fragment, refused, tmp_path):
    folder = refused.copy("lm", change)
    line = refused.of(f"model.path={folder.name}", f"output_dir={tmp_path}", weights=True)
    assert "the weights in 'changed_lm' do not make a LlamaForCausalLM" in line
    assert fragment in line


def test_a_reward_model_from_which_the_critic_starts_is_named_by_its_own_key(refused, tmp_path):
    folder = refused.copy("rm", configured(num_hidden_layers=3))
    line = refused.of(f"reward.models={folder.name}", f"output_dir={tmp_path}", weights=True)
    assert line.startswith("marlhf: reward.models: the weights in 'changed_rm' do not make a")


def test_a_classifier_is_no_policy(refused, tmp_path):
    line = refused.of("model.path=rm", f"output_dir={tmp_path}", weights=True)
    assert "model.path: the weights in 'rm'" in line
    assert "lm_head.weight" in line


DATA: dict[str, tuple[str, str | bytes, str]] = {
    "no such suffix": ("a.txt", "x", "must end in .csv, .json, .jsonl, .parquet, .tsv"),
    "no suffix": ("prompts", "x", "must end in .csv, .json, .jsonl, .parquet, .tsv"),
    "empty": ("a.jsonl", "", "data.path: 'a.jsonl' has no rows"),
    "empty lines": ("a.jsonl", "\n\n", "data.path: 'a.jsonl' has no rows"),
    "a broken line": ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": \n', "a.jsonl, line 3: not valid"),
    "a row is a list": ("a.jsonl", '["x"]\n', "line 1: holds a list, must be an object"),
    "a row is a text": ("a.jsonl", '"x"\n', "line 1: holds a str, must be an object"),
    "too deep": ("a.jsonl", '{"prompt": ' + "[" * 100_000, "a.jsonl, line 1: cannot be read"),
    "UTF-16": ("a.jsonl", '{"prompt": "x"}'.encode("utf-16"), "a.jsonl is not UTF-8 text"),
    "no columns": ("a.jsonl", "{}\n", "no column is called 'prompt'; the data has none"),
    "another column": (
        "a.jsonl",
        '{"text": "x"}\n',
        "no column is called 'prompt'; the data has t",
    ),
    "a row without it": ("a.jsonl", '{"prompt": "x"}\n{"text": "x"}', "row 1: the prompt is null"),
    "null": ("a.jsonl", '{"prompt": null}', "data: row 0: the prompt is null"),
    "empty prompt": ("a.jsonl", '{"prompt": "x"}\n{"prompt": " "}', "row 1: the prompt is empty"),
    "a number": ("a.jsonl", '{"prompt": 3}', "row 0: the prompt is int, must be text"),
    "a mapping": ("a.jsonl", '{"prompt": {"a": 1}}', "row 0: the prompt is dict, must be text"),
    "no messages": ("a.jsonl", '{"prompt": []}', "row 0: the prompt is empty"),
    "texts as messages": ("a.jsonl", '{"prompt": ["x"]}', "row 0: message 0 is 'x', must be"),
    "a message without content": (
        "a.jsonl",
        '{"prompt": [{"role": "user", "content": "x"}, {"role": "user"}]}',
        "row 0: message 1 is {'role': 'user'}",
    ),
    "a role that is a number": (
        "a.jsonl",
        '{"prompt": [{"role": 3, "content": "x"}]}',
        "row 0: message 0 is",
    ),
    "conversations, no template": (
        "a.jsonl",
        '{"prompt": [{"role": "user", "content": "x"}]}',
        "model.chat_template: must be given, because the prompts are conversations",
    ),
    "open brace": ("a.json", "{", "a.json, line 1: not valid JSON"),
    "empty JSON": ("a.json", "", "a.json, line 1: not valid JSON"),
    "empty list": ("a.json", "[]", "'a.json' has no rows"),
    "a list of texts": ("a.json", '["x"]', "a.json must hold a list of objects"),
    "a lone number": ("a.json", "3", "a.json must hold a list of objects"),
    "rows under a key": ("a.json", '{"data": [{"prompt": "x"}]}', "the data has data"),
    "empty CSV": ("a.csv", "", "'a.csv' has no rows"),
    "a header alone": ("a.csv", "prompt\n", "'a.csv' has no rows"),
    "a short row": ("a.csv", "prompt,x\na,b\nc\n", "line 3: has 1 cells, the header has 2"),
    "a long row": ("a.csv", 'prompt,x\n"a\nb",b\nc,d,e\n', "line 4: has 3 cells"),
    "an open quote": ("a.csv", 'prompt,x\na,b\n"c,d\ne,f\n', "line 3: a quotation mark that is"),
    "text after a quote": ("a.csv", 'prompt,x\na,b\n"c"d,e\n', "line 3: ',' expected after '\"'"),
    "a column twice": ("a.csv", "prompt,x,prompt\na,b,c\n", "line 1: the column 'prompt' is given"),
    "a TSV column twice": ("a.tsv", "prompt\tx\tx\na\tb\tc\n", "the column 'x' is given twice"),
    "a key twice": (
        "a.jsonl",
        '{"prompt": "x"}\n{"prompt": "a", "prompt": "b"}',
        "line 2: cannot be read: the key 'prompt' is given twice",
    ),
    "a key twice inside": ("a.json", '[{"a": {"b": [{"c": 1, "c": 1}]}}]', "the key 'c' is given"),
    "a long number": ("a.jsonl", '{"prompt": "x"}\n{"n": ' + "1" * 5000 + "}", "line 2: cannot be"),
    "a long number in JSON": ("a.json", '[{"n":\n-' + "1" * 5000 + "}]", "a.json, line 2: cannot"),
    "cp1252": ("a.csv", b"prompt,x\na,b\nc\xe9,d\n", "is not UTF-8 text: & in line 3"),
    "cp1252 elsewhere": ("a.csv", b"prompt,x\na,b\nc,d\xe9\n", "is not UTF-8 text: & in line 3"),
    "cp1252 in JSONL": (
        "a.jsonl",
        b'{"prompt": "x"}\n{"x": "\xe9"}',
        "not UTF-8 text: & in line 2",
    ),
    "cp1252 and gzip": ("a.tsv.gz", gzip.compress(b"prompt\n\xe9\n"), "UTF-8 text: & in line 2"),
    "UTF-16 CSV": ("a.csv", "prompt\nx\n".encode("utf-16"), "a.csv is not UTF-8 text"),
    "no gzip": ("a.jsonl.gz", "x", "a.jsonl.gz cannot be read: Not a gzipped file"),
    "gzip cut short": ("a.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], "a.jsonl.gz cannot be read"),
    "no xz": ("a.csv.xz", "x", "a.csv.xz cannot be read: "),
    "no bzip2": ("a.json.bz2", b"", "a.json.bz2"),
    "no zstd": ("a.jsonl.zst", "x", "a.jsonl.zst cannot be read: ZSTD decompress"),
    "another packing": ("a.jsonl.zip", "x", "a.jsonl.zip' is packed in a way that is not read"),
    "another file, packed": ("a.txt.gz", "x", "a.txt.gz'; a file must end in"),
    "another CSV column": ("a.csv", "text\nx\n", "no column is called 'prompt'; the data has text"),
    "no Parquet": ("a.parquet", "x", "a.parquet cannot be read: Parquet file size is 1 byte"),
    "empty Parquet": ("a.parquet", "", "a.parquet cannot be read"),
    "cut Parquet": ("a.parquet", b"PAR1PAR1", "a.parquet cannot be read"),
}


@pytest.mark.parametrize("name", DATA)
def test_broken_data(name, refused):
    file, content, fragment = DATA[name]
    Path(file).write_bytes(content.encode() if isinstance(content, str) else content)
    line = refused.of(f"data.path={file}")
    for part in fragment.split(" & "):
        assert part in line


DATA_KEYS = """
data.path=null -> data.path: missing; must be a file, a folder or a hub name
data.path="" -> data.path: is empty, must be a file, a folder or a hub name
data.path=nowhere.jsonl -> data.path: given 'nowhere.jsonl', which does not exist
data.path=org/no-such-data -> data.path: given 'org/no-such-data' & hub cannot be reached
data.path=empty_folder -> 'empty_folder' is no `save_to_disk` folder and has no file that ends in
data.path=saved -> data.path: 'saved' cannot be read
data.split=test -> data.split: given 'test', but 'data.jsonl' has train alone
data.name=small -> data.name: given 'small', but 'data.jsonl' is local
data.prompt_column=text -> data.prompt_column: no column is called 'text'; the data has
data.prompt_template="{text}" -> data.prompt_template: no column is called 'text'
data.prompt_template="Write." -> data.prompt_template: names no column & prompt, summary
data.prompt_template="{0}" -> data.prompt_template: names no column
data.prompt_template="{summary}" ;; data.prompt_column=prompts -> prompt_column: given 'prompts'
data.columns={prompt: text} -> data.columns.prompt: no column is called 'text'; the data has prompt
data.columns={prompt: summary} -> data.columns.prompt: the data already has a column of that name
data.eval_rows=8 -> data.eval_rows: given 8, must be less than the 8 rows & 0 for none
data.limit=2 ;; data.eval_rows=2 -> data.eval_rows: given 2, must be less than the 2 rows
data.eval_path=nowhere.jsonl -> data.eval_path: given 'nowhere.jsonl', which does not exist
data.eval_path=empty.jsonl -> data.eval_path: 'empty.jsonl' has no rows
data.eval_path=texts.jsonl ;; data.eval_rows=2 -> held-out data has text
data.eval_split=test -> data.eval_split: given 'test', but 'data.jsonl' has train alone
output_dir=data.jsonl -> output_dir: given 'data.jsonl', which is a file
output_dir=data.jsonl/run -> output_dir: cannot write 'data.jsonl/run': Not a directory
output_dir=/proc/run -> output_dir: cannot write '/proc/run'
output_dir=old -> output_dir: 'old' already holds a run; choose another, or set resume=auto
"""


@pytest.mark.parametrize(("overrides", "fragments"), cases(DATA_KEYS))
def test_wrong_keys_of_data_and_output(overrides, fragments, refused):
    for folder in ("saved", "old"):
        Path(folder).mkdir(exist_ok=True)
    Path("saved/state.json").write_text("{}")
    Path("old/metrics.jsonl").write_text("{}\n")
    Path("empty.jsonl").write_text("")
    Path("texts.jsonl").write_text('{"text": "x"}\n')
    line = refused.of(*overrides)
    for fragment in fragments:
        assert fragment in line


def test_a_run_that_is_refused_deletes_nothing(refused):
    Path("kept").mkdir()
    Path("kept/metrics.jsonl").write_text("old\n")
    words = ("output_dir=kept", "overwrite=true")
    refused.of(*words, "model.path=small_lm")
    assert Path("kept/metrics.jsonl").read_text() == "old\n"


def test_a_run_that_overwrites_deletes_its_own_files_alone(world, monkeypatch):
    monkeypatch.chdir(world)
    Path("again").mkdir()
    for name in ("metrics.jsonl", "samples.jsonl", "notes.txt"):
        Path("again", name).write_text("old\n")
    main(["ppo", "config.yaml", "output_dir=again", "overwrite=true"])
    assert Path("again/notes.txt").read_text() == "old\n"
    assert "old" not in Path("again/metrics.jsonl").read_text()
    assert Path("again/samples.jsonl").read_text() == ""


VALUES = {
    "numbers": ({"summary": 3}, {"name": "rouge"}, "column 'summary' holds int in row 1"),
    "a list": ({"summary": ["x"]}, {"name": "rouge"}, "column 'summary' holds list in row 1"),
    "tests": ({"summary": "{"}, {"name": "code", "tests_column": "summary"}, "row 1: column 'summ"),
    "inside": (
        {"summary": 3},
        {"name": "per_segment", "reward": {"name": "rouge"}, "boundary": "x"},
        "column 'summary' holds int in row 1",
    ),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("job", ["ppo", "evaluate"])
def test_columns_that_a_reward_cannot_read_are_found_before_a_model_is_loaded(name, job, refused):
    row, spec, fragment = VALUES[name]
    rows = [{"prompt": "x", "summary": None}, {"prompt": "y"} | row]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {"reward": {"models": spec}} if job == "ppo" else {"rewards": spec, "policies": "lm"}
    base = {"data": {"path": "a.jsonl", "eval_rows": 0}} | models
    if job == "ppo":
        base["model"] = {"path": "lm"}
    Path("job.yaml").write_text(json.dumps(base))
    assert fragment in refused(job, "job.yaml", "output_dir=run")
