"""docs/from_trl.md: the keys that its tables name exist, with the defaults that they state."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from marlhf import PPOConfig
from marlhf.config.loading import config_fields

PAGE = (Path(__file__).parents[2] / "docs" / "from_trl.md").read_text(encoding="utf-8")
DEFAULTS = {field.key: field.default for field in config_fields(PPOConfig)}


def rows() -> Iterator[tuple[list[str], str]]:
    """Keys and note of each row that maps an argument to keys."""
    for line in re.findall(r"^\| `.*\|$", PAGE, re.MULTILINE):
        _, keys, note = (cell.strip() for cell in line.strip("|").split("|"))
        yield re.findall(r"`([^`:]+)[^`]*`", keys), note


def test_keys_exist():
    arguments = {"config", "tokenizer", "model", "reward", "critic"}  # of PPOTrainer
    named = {key for keys, _ in rows() for key in keys}
    of_lora = {key.removeprefix("model.lora.") for key in DEFAULTS}
    assert len(named) > 40
    assert named - DEFAULTS.keys() - arguments - of_lora == set()


def test_defaults_are_those_stated():
    stated = {
        tuple(keys): re.findall(r"\d\S*\d|\d", text)
        for keys, note in rows()
        for text in re.findall(r"marlhf: ([^;]+)", note)
    }
    assert len(stated) == 8
    for keys, numbers in stated.items():
        defaults = [json.loads(DEFAULTS[key]) for key in keys]
        flat = [x for value in defaults for x in (value if isinstance(value, list) else [value])]
        assert [float(number) for number in numbers] == flat, keys
