"""Contents of a run's checkpoints, which all ranks write and read together.

    step-N/policy, step-N/critic   a folder for each part that has `save(folder)` and `load(folder)`
    step-N/rank-R.pt               on each rank: every part that has `state_dict()` and
                                   `load_state_dict(state)`, and the random number generators
    step-N/manifest.json           step, held-out score, configuration, number of ranks, digests of
                                   the run's inputs; checksums

The position in the data and the noise of every response are functions of (seed, step, row).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from marlhf.common.errors import UserError, one_line
from marlhf.common.plugins import (
    called,
    check_state,
    generators,
    plugin_generators,
    set_generators,
    set_plugin_generators,
)
from marlhf.common.state_files import read_tensors
from marlhf.config import CheckpointSettings
from marlhf.config.loading import config_from_dict, config_to_dict, with_new_names
from marlhf.distributed import Distributed
from marlhf.runs import checkpoint
from marlhf.runs.checkpoint import Checkpoint
from marlhf.runs.directory import RunDirectory, notice, own_files, writing
from marlhf.runs.provenance import Provenance, check_apart

# Sections and keys that change no result, or (micro-batch sizes) only its rounding. More steps make
# a longer run: from the checkpoint on, learning rates follow the longer schedule.
MAY_DIFFER = (
    "output_dir",
    "overwrite",
    "resume",
    "resume_changed",
    "steps",
    "epochs",
    "log",
    "checkpoint",
    "model.gradient_checkpointing",
    "rollout.micro_batch_size",
    "optimizer.micro_batch_size",
    "optimizer.max_skipped_steps",
    "distributed_timeout_minutes",
)


class RunState:
    """Saves and loads the parts of a run; every method is called on all ranks.

    parts     everything that an update changes, by name; stateless parts are skipped
    made_of   provenance of the run, on the main rank

    Raises UserError for a part whose state no checkpoint could hold.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        config: Any,
        distributed: Distributed,
        made_of: Provenance | None = None,
    ) -> None:
        self._folders = {n: p for n, p in parts.items() if hasattr(p, "save")}
        self._dicts = {n: p for n, p in parts.items() if hasattr(p, "load_state_dict")}
        self._dicts = {n: p for n, p in self._dicts.items() if n not in self._folders}
        self._config = config
        self._distributed = distributed
        self._made_of = made_of
        for name, part in self._dicts.items() if config.checkpoint.every else ():
            state: Any = None
            with suppress(UserError), called(name):  # it may have none before its first call
                state = part.state_dict()
            with called(name):  # now rather than after the first hundred updates
                check_state(state)

    def is_due(self, step: int, stopping: bool) -> bool:
        """Whether to save a checkpoint after this update; `stopping` if the run stops here."""
        every = self._config.checkpoint.every
        return bool(every and (stopping or step % every == 0 or step == self._config.steps))

    def save(self, root: Path, step: int, score: float | None) -> None:
        """Write `root/step-N` and delete the checkpoints that `config.checkpoint` does not keep.

        Raises UserError where the disk refuses; earlier checkpoints stay complete then.
        """
        try:
            self._write(root, step, score)
        except Exception:
            if self._distributed.is_main:  # frees space on a full disk
                shutil.rmtree(root / f"step-{step}.partial", ignore_errors=True)
            raise
        settings: CheckpointSettings = self._config.checkpoint
        self._on_main(lambda: checkpoint.prune(root, settings.keep, settings.keep_best), root)

    def _write(self, root: Path, step: int, score: float | None) -> None:
        partial = root / f"step-{step}.partial"
        self._on_main(lambda: checkpoint.begin(root, step), root)
        waits = self._distributed.zero_stage > 0  # DeepSpeed's engines save collectively
        for name, part in self._folders.items():
            self._on_all(lambda part=part, name=name: part.save(partial / name), root, waits)
        self._on_all(lambda: self._save_rank(partial), root)
        facts = {
            "score": score,
            "world_size": self._distributed.world_size,
            "threads": torch.get_num_threads(),
            "config": config_to_dict(self._config),
        }
        if self._made_of is not None:
            facts["made_of"] = self._made_of.facts()
        own: dict[str, Any] = {}
        place = self._distributed.rank, self._distributed.world_size
        self._on_all(lambda: own.update(checkpoint.digests(partial, *place)), root)
        files = dict(self._distributed.gather_objects(list(own.items())))
        self._on_main(lambda: checkpoint.commit(partial, facts, files), root)

    def load(self, found: Checkpoint) -> int:
        """Resume from a checkpoint and return its step. Raises UserError."""
        waits = self._distributed.zero_stage > 0
        self._distributed.fail_together(lambda: self._read(found), waits)
        if self._distributed.is_main:
            notice(f"resuming from {found.path}{self._what_differs(found)}")
        return found.step

    def _read(self, found: Checkpoint) -> None:
        world = found.facts["world_size"]
        file = found.path / f"rank-{self._distributed.rank % world}.pt"
        at_work = file.name
        try:
            for name, part in self._folders.items():
                at_work = name
                part.load(found.path / name)
            at_work = file.name
            state = read_tensors(file)
            for name, part in self._dicts.items():
                at_work, kept = file.name, state["parts"][name]
                with called(name):
                    part.load_state_dict(kept)
            at_work = f"{file.name}, generators"
            of_plugins = state.get("plugins", state["generators"])
            if of_plugins is not None:
                set_generators(of_plugins)  # fails here if they do not fit, not in a plug-in
            set_generators(state["generators"])
            set_plugin_generators(of_plugins)
        except Exception as error:  # parts raise anything on others' state
            raise UserError(
                f"resume: checkpoint {found.path} does not fit this run: {at_work}: "
                f"{_as_said(error)}"
            ) from error

    def _save_rank(self, partial: Path) -> None:
        parts = {}
        for name, part in self._dicts.items():
            with called(f"checkpoint: {name}"):
                parts[name] = part.state_dict()
                check_state(parts[name])
        state = {"parts": parts, "generators": generators(), "plugins": plugin_generators()}
        torch.save(state, partial / f"rank-{self._distributed.rank}.pt")

    def _what_differs(self, found: Checkpoint) -> str:
        """Suffix of the notice of a resume: differences from the checkpoint."""
        changes = [
            f"{key} {a!r} -> {b!r}"
            for key, a, b in differences(_config_of(found, self._config), self._config)
            if key not in ("output_dir", "overwrite", "resume", "resume_changed")
        ]
        ranks, now = found.facts["world_size"], self._distributed.world_size
        if ranks != now:
            changes.append(f"ranks {ranks} -> {now}, which may change results by rounding")
        threads, now = found.facts.get("threads"), torch.get_num_threads()
        if threads not in (None, now):
            changes.append(f"threads {threads} -> {now}, which may change results by rounding")
        return f" ({'; '.join(changes)})" if changes else ""

    def _on_main(self, work: Any, root: Path) -> None:
        self._on_all(work if self._distributed.is_main else lambda: None, root)

    def _on_all(self, work: Any, root: Path, waits: bool = False) -> None:
        def guarded() -> None:
            with writing(root):
                work()

        self._distributed.fail_together(guarded, waits)


def _as_said(error: Exception) -> str:
    """An error's message, with its type where that is needed to understand it."""
    is_plain = isinstance(error, UserError | OSError | RuntimeError)
    return one_line(error) if is_plain else f"{type(error).__name__}: {one_line(error)}"


@dataclass(frozen=True)
class Claimed:
    """A run's folder, the checkpoint to resume from, and provenance (on the main rank)."""

    run: RunDirectory
    found: Checkpoint | None
    made_of: Provenance | None


def claim(
    config: Any,
    distributed: Distributed,
    rows: Mapping[str, Iterable[Any]],
    arguments: Mapping[str, Any] | None = None,
) -> Claimed:
    """Claim the folder of a run, for all ranks.

    rows, arguments   as in `Provenance`

    Raises UserError where the folder or the checkpoint is not for this run.
    """
    given = arguments or {}
    keys = (config.output_dir, config.overwrite, config.log)

    def claimed() -> RunDirectory:
        if distributed.is_main:
            check_apart(config, own_files(config.output_dir), given)
        return RunDirectory(*keys, distributed.is_main, config.resume)

    run = distributed.fail_together(claimed)
    (found, *_) = distributed.gather_objects([run.checkpoint])
    if found is not None:
        check_config(config, found)
    is_wanted = distributed.is_main and (found is not None or config.checkpoint.every > 0)
    made_of = distributed.fail_together(
        lambda: _made_of(config, rows, given, found) if is_wanted else None
    )
    return Claimed(run, found, made_of)


def _made_of(
    config: Any,
    rows: Mapping[str, Iterable[Any]],
    arguments: Mapping[str, Any],
    found: Checkpoint | None,
) -> Provenance:
    """Provenance of a run, on a resume checked against the checkpoint's. Raises UserError."""
    made_of = Provenance(config, rows, arguments)
    before = None if found is None else found.facts.get("made_of")
    if found is None or before is None:
        made_of.begin()
    if found is not None and before is None:
        notice(
            f"checkpoint {found.path} does not say what the run was made of: whether data and "
            "weights are the same could not be checked"
        )
    if found is None or before is None:
        return made_of
    changed = "; ".join(made_of.changes(before))
    if changed and not config.resume_changed:
        raise UserError(
            f"resume: since checkpoint {found.path} these have changed: {changed}; bring back what "
            "was there, or set resume_changed=true to go on with what is there now"
        )
    if changed:
        notice(f"resume_changed: goes on although these have changed: {changed}")
    return made_of


def check_config(config: Any, found: Checkpoint) -> None:
    """Check that a checkpoint can be resumed with this configuration. Raises UserError."""
    faults = [
        f"{key} ({a!r}, now {b!r})"
        for key, a, b in differences(_config_of(found, config), config)
        if key not in MAY_DIFFER and key.split(".")[0] not in MAY_DIFFER
    ]
    if faults:
        raise UserError(
            f"resume: the configuration differs from that of checkpoint {found.path} in "
            f"{', '.join(faults)}; on a resume only these may differ: {', '.join(MAY_DIFFER)}"
        )
    if config.steps < found.step:
        raise UserError(
            f"steps: given {config.steps}, but the checkpoint {found.path} to resume is already of "
            f"update {found.step}"
        )


def _config_of(found: Checkpoint, config: Any) -> Any:
    """Configuration of a checkpoint; keys added since have their defaults. Raises UserError."""
    try:
        return config_from_dict(type(config), with_new_names(found.facts["config"]))
    except UserError as error:
        raise UserError(
            f"resume: the configuration of checkpoint {found.path} is not one of this version of "
            f"marlhf: {error}"
        ) from None


def differences(old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys in which two configurations of a class differ, with both values."""
    return _differences(config_to_dict(old), config_to_dict(new), "")


def _differences(old: Any, new: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{prefix}{name}.")
    elif old != new:
        yield prefix[:-1], old, new
