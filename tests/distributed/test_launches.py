"""How many processes a launch starts, how long they wait for each other, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from support.launches import PROFILES, accelerate, launch, ppo_folder, torchrun

from marlhf.common.errors import UserError
from marlhf.distributed import Distributed
from marlhf.distributed.profile import DEEPSPEED

REPOSITORY = Path(__file__).parents[2]
# a reward that says in which process it ran, and beside how many
NOTED = """
import os
from pathlib import Path
def score(prompts, completions):
    place = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1"), len(prompts)
    Path("processes", str(os.getpid())).write_text(" ".join(map(str, place)))
    return [float(len(text)) for text in completions]
"""
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One with `my_run.yaml`: one update of 4 prompts."""
    (tmp_path / "processes").mkdir()
    return ppo_folder(tmp_path, NOTED)


def start(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command line in a folder, of whose launchers and variables no outer launch is part."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    program = shutil.which(command[0], path=str(Path(sys.executable).parent))
    assert program is not None
    return subprocess.run(
        [program, *command[1:]],
        env={**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True,
        text=True,
        timeout=240,
        cwd=folder,
    )


def processes(folder: Path) -> list[str]:
    """`rank world rows` of each process that scored."""
    return sorted(path.read_text() for path in (folder / "processes").iterdir())


def commands(page: str) -> list[list[str]]:
    """The lines of a page that start two processes without a profile."""
    text = (REPOSITORY / page).read_text()
    lines = re.findall(r"^(?:accelerate launch|torchrun) .*my_run\.yaml", text, re.MULTILINE)
    return [shlex.split(line) for line in lines if "--config_file" not in line]


def test_the_readmes_commands_start_two_processes(folder: Path) -> None:
    """Without GPUs too, where accelerate left to itself starts one."""
    found = commands("README.md")
    assert found
    for command in found:
        assert "2" in command
        done = start(command, folder)
        assert done.returncode == 0, done.stderr
        assert processes(folder) == ["0 2 2", "1 2 2"]
        for path in (folder / "processes").iterdir():
            path.unlink()
        shutil.rmtree(folder / "run")


def test_fewer_processes_than_were_asked_for_is_said_in_a_line(folder: Path) -> None:
    command = ["accelerate", "launch", "--num_processes", "2", "-m", "marlhf", "ppo", "my_run.yaml"]
    done = start(command, folder)
    assert done.returncode == 0, done.stderr
    assert processes(folder) == ["0 1 4"]
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("marlhf: "))
    assert "one process runs, though accelerate was asked for several" in line
    assert "--multi_gpu --num_processes N" in line


ENVIRONMENTS: dict[str, tuple[dict[str, str], str]] = {
    "no GPU, DeepSpeed": (
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"},
        "ACCELERATE_USE_CPU: given true with DeepSpeed",
    ),
    "no launcher": (
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        "ACCELERATE_USE_DEEPSPEED: given true, but no launcher started this process",
    ),
    "FSDP": ({"ACCELERATE_USE_FSDP": "true"}, "accelerate's FSDP: is not supported"),
    "a word": ({"ACCELERATE_USE_CPU": "perhaps"}, "ACCELERATE_USE_CPU: given 'perhaps', must be"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE: given 2, but what started"),
    "srun": ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS: given 4, but what started"),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_launches_that_cannot_work_end_in_a_line(case: str, folder: Path) -> None:
    variables, line = ENVIRONMENTS[case]
    done = start(["python", "-m", "marlhf", "ppo", "my_run.yaml"], folder, **variables)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"marlhf: {line}")
    assert "Traceback" not in done.stderr
    assert processes(folder) == []


@pytest.mark.parametrize("version", ["0.19.7", "0.20.1"])
def test_another_deepspeed_than_is_asked_for_ends_in_a_line(version: str, folder: Path) -> None:
    """A step that was to be discarded would be applied, and only then be found."""
    information = folder / f"deepspeed-{version}.dist-info"  # the folder comes first in the path
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n"
    )
    paths = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "PYTHONPATH": os.pathsep.join(paths)}
    done = start(["python", "-m", "marlhf", "ppo", "my_run.yaml"], folder, **variables)
    assert done.returncode == 2
    assert f"marlhf: DeepSpeed: installed is {version}, must be at least 0.19.8" in done.stderr


def test_the_deepspeed_that_is_asked_for_is_that_of_the_package() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    requirement = Requirement(re.findall(r'"(deepspeed[^;"]*)', text)[0])
    lowest, beyond = DEEPSPEED
    assert {str(s) for s in requirement.specifier} == {f">={lowest}", f"<{beyond}"}


@pytest.mark.parametrize("launcher", [torchrun(2), accelerate(PROFILES / "zero2.yaml")])
def test_every_group_waits_as_long_as_was_said(launcher: list[str], tmp_path: Path) -> None:
    """Those that DeepSpeed makes too."""
    sections: dict[str, Any] = {"steps": 1, "distributed_timeout_minutes": 77}
    launch(tmp_path / "run", launcher, sections)
    found = json.loads((tmp_path / "run" / "launch.json").read_text())
    assert found["ranks"] == 2
    assert found["timeouts"] == [77 * 60.0]


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE: given 'x', must be a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: given 0, must be at least 1"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK: given None, must be 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK: given '2', must be 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "a"}, "LOCAL_RANK: given 'a', must be a"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": "99999"},
            "MASTER_PORT: given '99999', must be 1 to 65535",
        ),
    ],
)
def test_what_a_launcher_says_is_checked(
    environment: dict[str, str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=shown):
        Distributed()
