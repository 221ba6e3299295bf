"""Loads a preset's rows for a job: divides them by document and shapes them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

from marlhf.common.errors import UserError, one_line
from marlhf.config import DataSettings
from marlhf.data.files import Row, local_splits, read_rows
from marlhf.data.presets.base import Example, PresetFn, Source, build_preset, source_of

Stage = Literal["sft", "reward", "ppo", "evaluate"]

HELD_OUT_SHARE = 0.05  # of a training split that also provides the held-out documents

_EXPLAINED, _NUMBERED = 5, 25  # broken rows that a message explains, and numbers
_log = logging.getLogger(__name__)


def preset_records(settings: DataSettings, stage: Stage) -> tuple[list[Row], list[Row]]:
    """Load `(rows of the job's part, held-out rows)`, both in the job's shape.

    The job `evaluate` gets its evaluation rows as the first and none as the second: by default the
    first `data.eval_rows` held-out rows (0: all of them). Raises UserError.
    """
    assert settings.preset is not None
    name, preset = build_preset(settings.preset)
    source = source_of(preset)
    part = _part(settings, stage, name, source)
    loader = _PresetLoader(settings, name, preset, source)
    examples = loader.training()

    def held_out() -> list[Row]:
        return _shaped(loader.held_out(examples), stage, name)[: settings.eval_rows or None]

    if part == "held_out":
        return held_out()[: settings.limit], []
    evaluates = stage == "evaluate"
    takes_all = evaluates and part == "all"
    of_part = [e for e in examples if takes_all or loader.is_in(e, part)]
    rows = _shaped(of_part, stage, name)[: settings.limit]
    return rows, held_out() if settings.eval_rows and not evaluates else []


def unit_hash(document: str, seed: int, purpose: str = "part") -> float:
    """Hash a document, a seed and a purpose to a number in [0, 1).

    It does not depend on other rows, their order or the machine. Differences in white space are
    ignored.
    """
    key = f"{purpose}:{seed}".encode()
    text = " ".join(document.split()).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, key=key, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(frozen=True)
class _PresetLoader:
    """Loads the training and held-out examples of one preset."""

    settings: DataSettings
    name: str
    preset: PresetFn
    source: Source

    def training(self) -> list[Example]:
        """All examples of the training split, which may include held-out documents."""
        split = self.settings.split
        rows = read_rows(self._path, split, files=self.source.files)
        return self._examples(rows, f"{self._path} ({split})")

    def is_in(self, example: Example, part: str) -> bool:
        """Whether a training example belongs to a part."""
        if self._carves_out(example):
            return False
        if part == "all":
            return True
        shares = self.source.shares
        position = unit_hash(_document(example), self.settings.part_seed)
        ends = dict(zip(shares, accumulate(shares.values()), strict=True))
        return (
            ends[part] - shares[part] <= position < (1 if part == list(shares)[-1] else ends[part])
        )

    def held_out(self, training: list[Example]) -> list[Example]:
        """Examples of documents in no part, in an order fixed by the seed. Raises UserError."""
        if self._split_gives_both:
            examples = [e for e in training if self._carves_out(e)]
        else:
            known = {_normal(_document(e)) for e in training}
            examples = [e for e in self._eval_examples() if _normal(_document(e)) not in known]
        if not examples:
            none = (
                f"none of the documents of the split {self.settings.split!r} is among the "
                f"{HELD_OUT_SHARE:.0%} held out"
                if self._split_gives_both
                else "every document of the held-out data is in the training data too"
            )
            raise UserError(
                f"data.eval_split: {none}; give other data, data.eval_rows=0 in training, or "
                "data.part=all in evaluation"
            )
        seed = self.settings.part_seed
        return sorted(examples, key=lambda e: unit_hash(_document(e), seed, "order"))

    @property
    def _path(self) -> str:
        path = self.settings.path or self.source.path
        if path is None:
            raise UserError(f"data.path: missing; the preset {self.name} does not know one")
        return path

    @cached_property
    def _eval_split(self) -> str:
        """The settings' split, else the source's; the training split if a local copy lacks it."""
        settings, usual = self.settings, self.source.eval_split
        if settings.eval_split is not None or usual is None:
            return settings.eval_split or settings.split
        present = local_splits(self._path, self.source.files)
        return usual if present is None or usual in present else settings.split

    @property
    def _split_gives_both(self) -> bool:
        return self.settings.eval_path is None and self._eval_split == self.settings.split

    def _carves_out(self, example: Example) -> bool:
        if not self._split_gives_both:
            return False
        return unit_hash(_document(example), self.settings.part_seed, "held out") < HELD_OUT_SHARE

    def _eval_examples(self) -> list[Example]:
        settings, files = self.settings, self.source.files
        if settings.eval_path is not None:
            split = settings.eval_split or "train"
            rows = read_rows(
                settings.eval_path, split, files=files, key="data.eval_path",
                split_key="data.eval_split",
            )  # fmt: skip
            return self._examples(rows, f"{settings.eval_path} ({split})")
        split = self._eval_split
        rows = read_rows(self._path, split, files=files, split_key="data.eval_split")
        return self._examples(rows, f"{self._path} ({split})")

    def _examples(self, rows: Iterable[Row], where: str) -> list[Example]:
        """Convert rows to examples; those that break the schema are reported and left out."""
        read = [self._example(row) for row in rows]
        broken = {i: fault for i, fault in enumerate(read) if isinstance(fault, str)}
        self._report(broken, len(read), where)
        return [example for example in read if isinstance(example, Example)]

    def _example(self, row: Row) -> Example | str:
        """Convert a row to an example, or to the description of its fault."""
        try:
            example = self.preset(row)
            kind = type(example).__name__
            return example if isinstance(example, Example) else f"became a {kind}, no Example"
        except Exception as error:  # a user's preset can raise anything
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return kind + one_line(error, 120)

    def _report(self, broken: Mapping[int, str], count: int, where: str) -> None:
        """Warn of the broken rows. Raises UserError where they are too many."""
        if not broken:
            return
        which = _listed(broken)
        finding = f"{len(broken)} of the {count} rows of {where} break the schema of {self.name}"
        needed = self.settings.min_good_rows
        if count - len(broken) < needed * count:
            raise UserError(
                f"data.min_good_rows: given {needed:g}, and {finding}: {which}. Is data.preset "
                "that of this data?"
            )
        if os.environ.get("RANK", "0") == "0":  # every rank reads the same rows
            _log.warning("%s and are left out: %s", finding, which)


def _listed(broken: Mapping[int, str]) -> str:
    """List the first rows with their faults, then row numbers alone, then a count."""
    explained = [f"row {i}: {fault}" for i, fault in list(broken.items())[:_EXPLAINED]]
    numbers = [str(i) for i in list(broken)[_EXPLAINED:_NUMBERED]]
    also = [f"also rows {', '.join(numbers)}"] if numbers else []
    more = [f"and {len(broken) - _NUMBERED} more"] if len(broken) > _NUMBERED else []
    return "; ".join([*explained, *also, *more])


def _part(settings: DataSettings, stage: Stage, name: str, source: Source) -> str:
    """The job's part. Raises UserError where the dataset does not have it."""
    default = {"evaluate": "held_out"}.get(stage, stage)
    part = default if settings.part == "auto" else settings.part
    possible = [*source.shares, "all", *(["held_out"] if stage == "evaluate" else [])]
    if part not in possible:
        raise UserError(
            f"data.part: the dataset {name} has no part for {part!r}; possible: "
            f"{', '.join(possible)}"
        )
    return part


def _sft_rows(examples: Iterable[Example]) -> list[Row]:
    """`{prompt, completion}` of every non-blank demonstration."""
    return [
        {"prompt": e.prompt, "completion": answer}
        for e in examples
        for answer in e.demonstrations
        if answer.strip()
    ]


def _pairs(examples: Iterable[Example]) -> list[Row]:
    """`{prompt, chosen, rejected}` of every pair of non-blank answers that differ."""
    return [
        {"prompt": e.prompt, "chosen": e.pair[0], "rejected": e.pair[1]}
        for e in examples
        if e.pair is not None and all(map(str.strip, e.pair)) and e.pair[0] != e.pair[1]
    ]


def _prompts(examples: Iterable[Example]) -> list[Row]:
    """`{prompt, ...columns}`, each prompt once; later rows fill in nulls of earlier ones."""
    by_prompt: dict[str, Row] = {}
    for example in examples:
        if example.columns is not None:
            row = {"prompt": example.prompt, **example.columns}
            known = {k: v for k, v in by_prompt.get(example.prompt, {}).items() if v is not None}
            by_prompt[example.prompt] = row | known
    return list(by_prompt.values())


_SHAPES: Mapping[Stage, tuple[Callable[[Iterable[Example]], list[Row]], str]] = {
    "sft": (_sft_rows, "demonstrations"),
    "reward": (_pairs, "preference pairs"),
    "ppo": (_prompts, "prompts"),
    "evaluate": (_prompts, "prompts"),
}


def _shaped(examples: list[Example], stage: Stage, name: str) -> list[Row]:
    shape, what = _SHAPES[stage]
    rows = shape(examples)
    if not rows:
        raise UserError(
            f"data.preset: {name} gives no {what}; the part has {len(examples)} rows of the data"
        )
    return rows


def _document(example: Example) -> str:
    return example.prompt if example.document is None else example.document


def _normal(document: str) -> str:
    return " ".join(document.split())
