"""Presets of public datasets, for `data.preset`. See `base` for the contract."""

from marlhf.data.presets.base import (
    PRESETS,
    Example,
    PresetFn,
    RowError,
    Source,
    build_preset,
    value,
)
from marlhf.data.presets.parts import Stage, preset_records, unit_hash

__all__ = [
    "PRESETS",
    "Example",
    "PresetFn",
    "RowError",
    "Source",
    "Stage",
    "build_preset",
    "preset_records",
    "unit_hash",
    "value",
]
