"""Options of commands that name arms."""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
from collections.abc import Sequence
from typing import Any

from marlhf.common.errors import UserError, did_you_mean

THE_RUN = "the run"
_SECTIONS = ("segmenter", "macro", "ppo", "kl")  # what credit is made of


def add_arm_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name arms, for `settings_of_arms`."""
    parser.add_argument(
        "--arm",
        action="append",
        metavar="SETTINGS",
        help="keys of segmenter, macro, ppo and kl that differ from the run's, as on the command "
        "line; give it several times",
    )
    parser.add_argument(
        "--grid",
        action="append",
        metavar="KEY=[A, B]",
        help="values of a key; given several times, every combination is an arm",
    )


def settings_of_arms(options: argparse.Namespace) -> dict[str, list[str]]:
    """Overrides of each arm, by its label; the run's own first. Raises UserError."""
    arms: dict[str, list[str]] = {THE_RUN: []}
    arms |= {text: _overrides(text) for text in options.arm or []}
    points = [_values(text) for text in options.grid or []]
    for point in itertools.product(*points) if points else ():
        _check_keys(point, "--grid")
        arms[" ".join(point)] = list(point)
    return arms


def _overrides(text: str) -> list[str]:
    """The settings of an arm. Raises UserError for a key that no arm can change."""
    try:
        words = shlex.split(_with_mappings_whole(text))
    except ValueError as error:
        raise UserError(f"--arm: given {text!r}: {error}") from None
    _check_keys(words, "--arm")
    if not words:
        raise UserError("--arm: given nothing; must hold settings such as segmenter=sentence")
    return words


def _with_mappings_whole(text: str) -> str:
    """The text with all within brackets escaped, so that `shlex.split` leaves it as it is."""
    escaped: list[str] = []
    depth, quote = 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "[{":
            depth += 1
        within = depth > 0
        if not quote and c in "]}":
            depth = max(0, depth - 1)
        escaped.append(f"\\{c}" if within else c)
    return "".join(escaped)


def _values(text: str) -> list[str]:
    """`key=value` for every value of a key. Raises UserError."""
    key, _, listed = text.partition("=")
    from marlhf.config.yaml_text import parse_yaml

    values: Any = parse_yaml(listed, f"--grid {text!r}")
    if not key or not isinstance(values, list) or not values:
        raise UserError(f"--grid: given {text!r}, must look like ppo.lam=[0.95, 1]")
    texts = [x if isinstance(x, str) else json.dumps(x, default=str) for x in values]
    return [f"{key}={text}" for text in texts]


def _check_keys(words: Sequence[str], option: str) -> None:
    from marlhf.config import PPOConfig

    possible = f"keys of {', '.join(_SECTIONS)}"
    for word in words:
        section = word.partition("=")[0].partition(".")[0]
        if section in _SECTIONS:
            continue
        if section in PPOConfig.__dataclass_fields__:
            raise UserError(
                f"{option}: given {word!r}, but the responses are sampled and scored already; "
                f"possible: {possible}"
            )
        hint = did_you_mean(section, _SECTIONS)
        raise UserError(f"{option}: {section}: unknown key; {hint}Possible: {possible}")


def names_kl(overrides: Sequence[str]) -> bool:
    """Whether an arm sets the KL coefficient itself."""
    return any(word.partition("=")[0].split(".")[0] == "kl" for word in overrides)
