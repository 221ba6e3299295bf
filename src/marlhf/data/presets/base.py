"""The contract of dataset presets: a raw row in, what it says out.

A preset is any callable `row -> Example`, with an attribute `source` that says where the hub keeps
the dataset and how it is divided. The built-in ones are frozen dataclasses whose fields are their
configuration. What `Example` has in common for all datasets (sft rows, pairs, prompts, parts, rows
that break the schema) is done once, in `parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from marlhf.common.errors import UserError, one_line
from marlhf.common.registry import Registry, Spec, construct, split_spec
from marlhf.data.files import Files, Row, number_in

THREE_PARTS = {"sft": 0.2, "reward": 0.4, "ppo": 0.4}


@dataclass(frozen=True)
class Source:
    """Where a dataset is and how it is divided.

    path        hub name; None where only `data.path` can say
    files       folder, revision and columns to read
    eval_split  split with the held-out documents; None: some of the training split's
    shares      part of each job -> its share of the training documents; they add up to 1
    """

    path: str | None = None
    files: Files = field(default_factory=Files)
    eval_split: str | None = None
    shares: Mapping[str, float] = field(default_factory=lambda: THREE_PARTS)


@dataclass(frozen=True)
class Example:
    """What one row of a dataset says.

    prompt          what the policy continues
    demonstrations  answers to imitate: an sft row each
    pair            (better answer, worse answer), or None where nobody preferred one
    columns         for rewards, beside the prompt; None where the row is of no use as a prompt
    document        what must not be in two parts at once; None: the prompt
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
)


def build_preset(spec: Spec) -> tuple[str, PresetFn]:
    """A preset's name and the preset, from a name, an import path or a mapping with `name`.

    A class is built with the mapping's other keys; a plain function is used as it is and takes
    none. Raises UserError.
    """
    name, arguments = split_spec(spec, "data.preset")
    factory = PRESETS.find(name)
    if isinstance(factory, type):
        return name, construct(factory, arguments, f"data.preset {name}")
    if arguments:
        raise UserError(
            f"data.preset {name}: is not a class and takes no arguments; given "
            f"{', '.join(arguments)}"
        )
    return name, factory


def source_of(preset: PresetFn) -> Source:
    """The preset's `source`; three parts of whatever `data.path` names where it has none."""
    return getattr(preset, "source", Source())


class RowError(ValueError):
    """A row that is not of the dataset's schema; the message says what is wrong with it."""


def value(row: Any, key: str, kind: type | tuple[type, ...], optional: bool = False) -> Any:
    """`row["a"]["b"]` for the key "a.b". Raises RowError unless it is of the kind; a number may be
    written as text, as all cells of CSV are.

    optional: null, or a missing last key, is None, and so is no text where a number is wanted.
    """
    found = row
    *parents, leaf = key.split(".")
    for depth, name in enumerate([*parents, leaf]):
        if not isinstance(found, Mapping):
            raise RowError(f"{'.'.join([*parents, leaf][:depth])} is {_shown(found)}")
        if name not in found and not (optional and depth == len(parents)):
            raise RowError(f"{key} is missing")
        found = found.get(name)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(found, str) and str not in kinds and {int, float} & {*kinds}:
        number = number_in(found)
        found = number if number is not None else found.strip() or None
    if optional and found is None:
        return None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise RowError(f"{key} is {_shown(found)}")
    return found


def _shown(found: Any) -> str:
    return "null" if found is None else one_line(repr(found), 40)
