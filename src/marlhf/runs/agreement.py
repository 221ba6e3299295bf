"""Checks that all ranks were started with the same configuration, data, models and code.

Ranks that differ would silently average gradients of different losses, or deadlock.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from marlhf.common.errors import UserError, short_repr
from marlhf.common.paths import writing
from marlhf.config.loading import config_to_dict
from marlhf.distributed import Distributed

_DELAY = 10.0  # seconds after which a network's file system shows a new file


def check_agreement(
    config: Any, distributed: Distributed, inputs: Mapping[str, Any] | None = None
) -> None:
    """Compare every rank's configuration and inputs with those of the first.

    inputs   label -> facts about an input, plain data; `Provenance.quick_facts`

    Must be called on all ranks. Raises the same UserError on all where one differs.
    """
    mine = config_to_dict(config), dict(inputs or {})
    first, *others = distributed.gather_objects([mine])
    for rank, (settings, facts) in enumerate(others, 1):
        keys = [
            f"{key} ({short_repr(theirs)}, on rank 0 {short_repr(ours)})"
            for key, ours, theirs in differences(first[0], settings)
        ]
        labels = [
            label for label in {**first[1], **facts} if first[1].get(label) != facts.get(label)
        ]
        if keys or labels:
            raise UserError(
                f"ranks: rank {rank} differs from rank 0 in {', '.join(keys or labels)}; all ranks "
                "must be started with the same configuration, data, models and code"
            )


def check_shared(folder: Path, distributed: Distributed) -> None:
    """Check that all ranks see the folder that the first one writes. Raises UserError."""
    if distributed.world_size == 1:
        return
    names = [f".seen-by-all-{uuid.uuid4().hex}"] if distributed.is_main else []
    (name,) = distributed.gather_objects(names)

    def look() -> None:
        if distributed.is_main:
            with writing("output_dir", folder):
                (folder / name).touch()
        deadline = time.monotonic() + _DELAY
        while not (folder / name).exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"output_dir: {str(folder)!r} of rank 0 is not that of rank "
                    f"{distributed.rank}; must be on a file system that all ranks share"
                )
            time.sleep(0.05)

    try:
        distributed.fail_together(look)
    finally:
        if distributed.is_main:
            (folder / name).unlink(missing_ok=True)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys in which two configurations differ, with both values."""
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after
