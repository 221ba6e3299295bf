"""The contract of dataset presets: a raw row in, an `Example` out.

A preset is any callable `row -> Example`, with an attribute `source` for the dataset's location on
the hub and its division. The built-in ones are frozen dataclasses whose fields are their
configuration. `parts` does the work common to all datasets: sft rows, pairs, prompts, parts, rows
that break the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from marlhf.common.errors import one_line
from marlhf.common.registry import Registry, Spec, split_spec
from marlhf.data.files import Files, Row, number_in

THREE_PARTS = {"sft": 0.2, "reward": 0.4, "ppo": 0.4}


@dataclass(frozen=True)
class Source:
    """Location and division of a dataset.

    path        hub name; None where `data.path` must be given
    files       folder, revision and columns to read
    eval_split  split with the held-out documents; None: some of the training split's
    shares      share of the training documents by part; they add up to 1
    """

    path: str | None = None
    files: Files = field(default_factory=Files)
    eval_split: str | None = None
    shares: Mapping[str, float] = field(default_factory=lambda: THREE_PARTS)


@dataclass(frozen=True)
class Example:
    """Content of one row of a dataset.

    prompt          text for the policy to continue
    demonstrations  answers to imitate: one sft row each
    pair            (better answer, worse answer), or None without a preference
    columns         for rewards, in addition to the prompt; None where the row gives no prompt
    document        text that must not be in two parts at once; None: the prompt
    """

    prompt: str
    demonstrations: tuple[str, ...] = ()
    pair: tuple[str, str] | None = None
    columns: Mapping[str, Any] | None = field(default_factory=dict)
    document: str | None = None


PresetFn = Callable[[Row], Example]

PRESETS = Registry(
    kind="data.preset",
    group="marlhf.data_presets",
    factories={
        "openai/summarize_from_feedback": "marlhf.data.presets.summaries.SummarizeFromFeedback",
        "Dahoas/full-hh-rlhf": "marlhf.data.presets.dialogues.FullHHRLHF",
        "openai/webgpt_comparisons": "marlhf.data.presets.webgpt.WebGPTComparisons",
        "codeparrot/apps": "marlhf.data.presets.apps.APPS",
    },
    arguments=("row",),
)


def build_preset(spec: Spec) -> tuple[str, PresetFn]:
    """Build `(name, preset)` from a name, an import path or a mapping with `name`.

    A class is built with the mapping's other keys; a plain function is used as it is and takes
    none. Raises UserError.
    """
    name, _ = split_spec(spec, PRESETS.kind)
    return name, PRESETS.build(spec)


def source_of(preset: PresetFn) -> Source:
    """The preset's `source`; by default three parts of the data at `data.path`."""
    return getattr(preset, "source", Source())


class RowError(ValueError):
    """A row that breaks the dataset's schema; the message names the fault."""


def value(row: Any, key: str, kind: type | tuple[type, ...], optional: bool = False) -> Any:
    """Get `row["a"]["b"]` for the key "a.b". Raises RowError unless it is of the kind.

    A number may be written as text, as in CSV.

    optional: null, a missing last key, or empty text instead of a number gives None.
    """
    node = row
    *parents, leaf = key.split(".")
    for depth, name in enumerate([*parents, leaf]):
        if not isinstance(node, Mapping):
            raise RowError(f"{'.'.join([*parents, leaf][:depth])} is {_shown(node)}")
        if name not in node and not (optional and depth == len(parents)):
            raise RowError(f"{key} is missing")
        node = node.get(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(node, str) and str not in kinds and {int, float} & {*kinds}:
        number = number_in(node)
        node = number if number is not None else node.strip() or None
    if optional and node is None:
        return None
    if not isinstance(node, kind) or isinstance(node, bool):
        raise RowError(f"{key} is {_shown(node)}")
    return node


def _shown(node: Any) -> str:
    return "null" if node is None else one_line(repr(node), 40)
