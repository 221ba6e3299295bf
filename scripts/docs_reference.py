"""Write the pages of the documentation site that are made from the code.

mkdocs runs this while it builds: the key tables of every job (`reference/ppo.md`, ...), and the
public names of the package (`reference/python.md`), whose docstrings mkdocstrings reads.
"""

from __future__ import annotations

import html
import inspect
from collections.abc import Iterator

import mkdocs_gen_files

import marlhf
from marlhf import rewards, segmenters, testing
from marlhf.cli import JOBS
from marlhf.common.registry import import_path
from marlhf.config.loading import config_fields


def key_table(config_class: type) -> Iterator[str]:
    """Markdown of every key of a job, a table per section."""
    sections: dict[str, list[str]] = {"": []}
    summaries = {"": "Keys outside any section."}
    for field in config_fields(config_class):
        section, _, name = field.key.rpartition(".")
        if field.type == "section":
            sections[field.key] = []
            summaries[field.key] = field.description
            continue
        type_name = _cell(field.type).replace("\\|", "\\|<wbr>")  # for narrow windows
        kind = f"{type_name}<br>{_code(field.default)}"
        sections[section].append(f"| `{name}` | {kind} | {_cell(field.description)} |")
    for section, rows in sections.items():
        if not rows:
            continue
        yield f"## {f'`{section}`' if section else 'Top level'}\n"
        yield f"{_cell(summaries[section])}\n"
        yield "| key | type, default | meaning |\n|---|---|---|"
        yield "\n".join(rows) + "\n"


def names(module: object, public: list[str]) -> Iterator[str]:
    """mkdocstrings blocks of a module's public classes and functions."""
    for name in public:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):  # not aliases of types
            yield f"::: {value.__module__}.{value.__qualname__}\n"


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*")


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


for job, (config_path, _, summary) in JOBS.items():
    lines = [
        f"# `marlhf {job}`\n",
        f"{summary[0].upper()}{summary[1:]}.\n",
        f"`marlhf {job} CONFIG.yaml key.sub=value ...`; `marlhf {job} --help` prints this page.\n",
        *key_table(import_path(config_path, "job")),
    ]
    with mkdocs_gen_files.open(f"reference/{job}.md", "w") as page:
        page.write("\n".join(lines))

with mkdocs_gen_files.open("reference/python.md", "w") as page:
    page.write(
        "# Python\n\nThe public names of `marlhf`, `marlhf.segmenters`, `marlhf.rewards` and "
        "`marlhf.testing`.\n"
    )
    shown: set[str] = set()
    for module in (marlhf, segmenters, rewards, testing):
        public = [name for name in module.__all__ if name not in shown and name != "__version__"]
        shown.update(public)
        page.write(f"\n## `{module.__name__}`\n\n")
        page.write("\n".join(names(module, public)))
