"""Whatever cannot be a path, or is closed, is one line that names the key: config and commands."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
from support.bad_input import Refusals, build_world

from marlhf.cli import main
from marlhf.common.paths import local_path, path_fault
from marlhf.common.signals import time_limit
from marlhf.common.types import UserError

LONG = "a text where a path belongs, " * 10

EVALUATE = """\
policies: lm
data: {path: data.jsonl, eval_rows: 0}
rollout: {batch_size: 4, max_new_tokens: 5, max_prompt_length: 16}
rewards: {name: length, target: 3}
output_dir: evaluation
"""
SFT = "model: {path: lm}\ndata: {path: data.jsonl}\noutput_dir: run\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_world(tmp_path_factory.mktemp("world"))
    (folder / "evaluate.yaml").write_text(EVALUATE)
    (folder / "sft.yaml").write_text(SFT)
    return folder


@pytest.fixture
def refused(world: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> Refusals:
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Refusals(world, capfd, monkeypatch)


KEYS = [
    *("model.path", "data.path", "data.eval_path", "output_dir", "resume", "critic.path"),
    *("reward.models", "ptx.path"),
]
OTHERS = [
    ("sft", "sft.yaml", "resume"),
    ("reward", "sft.yaml", "data.demonstrations_path"),
    ("evaluate", "evaluate.yaml", "policies"),
    ("evaluate", "evaluate.yaml", "reference"),
    ("evaluate", "evaluate.yaml", "output_dir"),
    ("evaluate", "evaluate.yaml", "rewards"),
    ("estimate", "config.yaml", "model.path"),
]
UNFIT = {
    "long": (LONG, "a name has at most 255 bytes"),
    "null": ("a\0b", "a null character"),
    "user": ("~no-such-user/x", "names no user"),
}


@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.parametrize(
    ("job", "config", "key"), [*[("ppo", "config.yaml", key) for key in KEYS], *OTHERS]
)
def test_what_cannot_be_a_path_in_a_config(kind, job, config, key, refused):
    text, fault = UNFIT[kind]
    more = ["--gpus=1", "--gpu-memory=1"] if job == "estimate" else []
    line = refused(job, config, f"{key}={json.dumps(text)}", *more)
    assert line.startswith(f"marlhf: {key.removesuffix('.models').removesuffix('s')}")
    assert fault in line


@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.parametrize(
    "key", ["policies=[lm, {}]", "policies={{x: {}}}", "raters={{ratings: [{}]}}"]
)
def test_paths_in_lists_and_mappings(kind, key, refused):
    text, fault = UNFIT[kind]
    line = refused("evaluate", "evaluate.yaml", key.format(json.dumps(text)))
    assert line.startswith(f"marlhf: {key.partition('=')[0]}")
    assert fault in line


COMMANDS = [
    ("segment", "a text", "--tokenizer=lm", "--html"),
    ("segment", "a text", "--tokenizer"),
    ("segment", "--tokenizer=lm", "--file"),
    ("segment", "--tokenizer=lm", "--column=x", "--data"),
    ("report",),
    ("report", "run", "--output"),
    ("merge", "--base=lm", "lm"),
    ("merge", "lm", "merged", "--base"),
    ("quickstart", "--model=lm", "--output"),
    ("quickstart", "--model"),
]


@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_what_cannot_be_a_path_on_the_command_line(kind, words, refused):
    Path("run").mkdir(exist_ok=True)
    Path("run/metrics.jsonl").write_text('{"step": 1}\n')
    text, fault = UNFIT[kind]
    try:
        # a run in the way is what `Refusals` looks for, but here it is the command's own
        refused.folder = Path("nowhere")
        assert fault in refused(*words, text)
    finally:
        Path("run/metrics.jsonl").unlink()


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[0] in ("merge", "quickstart")])
def test_a_model_has_a_name_in_utf_8(words, refused):
    assert "half of a character" in refused(*words, "a\udcff")
    assert "half of a character" in refused("segment", "a text", "--tokenizer=a\udcff")


def test_half_of_a_character(refused):
    assert "half of a character" in refused("segment", "a \udcff b", "--tokenizer=lm")
    assert "unacceptable character" in refused.of("output_dir=a\udcff")
    assert "half of a character" in refused.of('output_dir="a\\udcff"')
    assert "half of a character" in str(path_fault("a\ud800"))


def test_paths_that_are_no_fault(tmp_path):
    assert path_fault("a" * 255) is None
    assert path_fault("é" * 128) is not None
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent/x", "lm", "org/name"):
        assert local_path(path, "key") == Path(path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=r"key: cannot read .*loop.*: Too many levels"):
        local_path(tmp_path / "loop", "key")


PIPES = [
    ("config file", "ppo", "PIPE"),
    ("config file", "sft", "PIPE", "steps=1"),
    ("config file", "sweep", "PIPE"),
    ("config file", "sweep", "sweep.yaml"),
    ("config file", "evaluate", "PIPE"),
    ("config file", "estimate", "PIPE", "--gpus=1", "--gpu-memory=1"),
    ("--file", "segment", "--tokenizer=lm", "--file", "PIPE"),
    (
        "raters.ratings",
        "evaluate",
        "evaluate.yaml",
        "raters={ratings: [PIPE]}",
        "policies={a: lm, b: lm}",
    ),
    ("model.path", "ppo", "config.yaml", "model.path=MODEL"),
]


@pytest.mark.parametrize("kind", ["a named pipe", "a device"])
@pytest.mark.parametrize(("key", "words"), [(key, words) for key, *words in PIPES])
def test_what_may_have_no_end_is_not_read(kind, key, words, refused, world, tmp_path):
    pipe, model = tmp_path / "pipe", shutil.copytree(world / "lm", tmp_path / "lm")
    os.mkfifo(pipe)
    given = {"a named pipe": str(pipe), "a device": "/dev/zero"}[kind]
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(given)
    Path("sweep.yaml").write_text(f"config: {given}\nseeds: [1]\noutput_dir: swept\n")
    words = [word.replace("PIPE", given).replace("MODEL", str(model)) for word in words]
    with time_limit(20):
        line = refused(*words)
    assert line.startswith(f"marlhf: {key}: given ")
    assert f"which is {kind}, must be a file" in line


def test_a_configuration_may_come_from_a_command(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shell's `<(command)`: a pipe among the open files."""
    monkeypatch.chdir(world)
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as pipe:
        pipe.write(Path("config.yaml").read_text())
    main(["ppo", f"/dev/fd/{reader}", f"output_dir={tmp_path / 'run'}"])
    os.close(reader)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_command_that_writes_without_end_is_refused(refused: Refusals) -> None:
    reader, writer = os.pipe()

    def fill() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as pipe:
            while True:
                pipe.write("y\n" * 9999)

    thread = threading.Thread(target=fill)
    thread.start()
    assert "has more than 1048576 characters" in refused("ppo", f"/dev/fd/{reader}")
    os.close(reader)
    thread.join()


CLOSED = [
    ("data in a closed folder", "closed/data.jsonl", "data.path=closed/data.jsonl"),
    ("a closed data folder", "closed/data.jsonl", "data.path=closed"),
    ("a closed folder inside", "open/closed/data.jsonl", "data.path=open"),
    ("a closed data file", "data.jsonl", "data.path=data.jsonl"),
    ("held-out data", "closed/data.jsonl", "data.eval_path=closed/data.jsonl"),
    ("texts", "closed/data.jsonl", "ptx={path: closed/data.jsonl, text_column: prompt}"),
    ("a closed model folder", "lm/config.json", "model.path=lm"),
    ("a model in a closed folder", "closed/lm/config.json", "model.path=closed/lm"),
    ("closed weights", "lm/model.safetensors", "model.path=lm"),
    ("a closed config.json", "lm/config.json", "model.path=lm"),
    ("a closed tokenizer", "lm/tokenizer.json", "model.path=lm"),
    ("a closed reward model", "rm/config.json", "reward.models=./rm"),
    ("a closed critic", "rm/config.json", "critic.path=rm"),
    ("a closed output_dir", "out/x", "output_dir=out"),
    ("an output_dir in a closed folder", "closed/x", "output_dir=closed/out"),
    ("a checkpoint in a closed folder", "closed/step-1/x", "resume=closed/step-1"),
    ("a closed policy", "lm/config.json", "policies=lm"),
    ("a policy in a closed run", "run/final/config.json", "policies=run"),
    ("results in a closed folder", "closed/x", "policies=lm output_dir=closed/out"),
]
FILES = {"a closed data file", "closed weights", "a closed config.json", "a closed tokenizer"}


@pytest.mark.parametrize(("name", "file", "overrides"), CLOSED, ids=[name for name, _, _ in CLOSED])
def test_what_is_closed(name, file, overrides, world, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(world, tmp_path, dirs_exist_ok=True))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        target.write_text('{"prompt": "x"}\n' * 9)
    parts = [p for p in target.parents if p.name == "closed"]
    closed = target if name in FILES else (parts or [target.parent])[0]
    os.chmod(".", 0o777)
    os.chmod(closed, 0)
    words = [overrides] if overrides.startswith("ptx") else overrides.split()
    job = "evaluate" if "policies" in overrides else "ppo"
    status, error = unprivileged(
        [job, f"{'evaluate' if job == 'evaluate' else 'config'}.yaml", *words]
    )
    os.chmod(closed, 0o755)
    assert status == 2, error
    assert len(error.strip().splitlines()) == 1, error
    key = words[-1].partition("=")[0]
    assert error.startswith(f"marlhf: {key.removesuffix('.models')}"), error
    assert "Permission denied" in error


def give_up_privileges() -> None:
    """From now on permission bits hold for root too: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits of each
    assert libc.capget(header, sets) == 0
    sets[0], sets[1] = sets[0] & ~0b110, sets[1] & ~0b110
    assert libc.capset(header, sets) == 0


def unprivileged(words: list[str]) -> tuple[int, str]:
    """Status and standard error of a command line, run by a copy of this process that may not read
    what is closed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 99
        with contextlib.suppress(BaseException), io.StringIO() as error:
            if os.geteuid() == 0:
                give_up_privileges()
            sys.stderr = error
            try:
                main(words)
                status = 0
            except SystemExit as end:
                status = int(str(end.code))
            except BaseException as other:
                error.write(repr(other))
            os.write(writer, error.getvalue().encode()[:60_000])
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        error = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), error
