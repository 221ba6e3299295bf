"""Print pip constraints that pin every direct dependency to the lowest version allowed.

    python scripts/lowest_versions.py > lowest.txt
    pip install -c lowest.txt '.[dev]'

The lowest versions are those of pyproject.toml, extras included. `make test-lowest` installs them
and runs the tests that touch other libraries.
"""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def lowest(requirement: Requirement) -> str | None:
    """`name==version` of the requirement's lower bound; None without one."""
    bounds = [bound for bound in requirement.specifier if bound.operator in (">=", "==")]
    return f"{requirement.name}=={bounds[0].version}" if bounds else None


def main() -> None:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    pins = {lowest(Requirement(line)) for line in [*project["dependencies"], *extras]}
    print("\n".join(sorted(pin for pin in pins if pin)))


if __name__ == "__main__":
    main()
