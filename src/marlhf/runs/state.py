"""Contents of a run's checkpoints, written and read by all ranks together.

    step-N/policy, step-N/critic   a folder for each part that has `save(folder)` and
                                   `load(folder)`, which raises on all ranks or on none
    step-N/rank-R.pt               on each rank: every part that has `state_dict()` and
                                   `load_state_dict(state)`, and the random number generators
    step-N/manifest.json           step, held-out score, configuration, number of ranks, digests of
                                   the run's inputs; checksums

The position in the data and the noise of every response are functions of (seed, step, row).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from marlhf.common.errors import PeerError, UserError, one_line
from marlhf.common.memory_errors import doing
from marlhf.common.plugins import (
    check_state,
    generators,
    plugin_call,
    plugin_generators,
    set_generators,
    set_plugin_generators,
)
from marlhf.common.state_files import digest_of_state, read_tensors
from marlhf.config import CheckpointSettings
from marlhf.config.loading import config_from_dict, config_to_dict, with_new_names
from marlhf.config.sections import sampling_engine
from marlhf.distributed import Distributed
from marlhf.runs import checkpoint
from marlhf.runs.agreement import check_agreement, check_shared, differences
from marlhf.runs.checkpoint import Checkpoint
from marlhf.runs.directory import RunDirectory, notice, run_files, writing
from marlhf.runs.provenance import Provenance, check_apart

# Sections and keys that change no result, or (micro-batch sizes) only its rounding. With more steps
# the run is longer: from the checkpoint on, learning rates follow the longer schedule.
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
    "offload",
    "distributed_timeout_minutes",
)
ENGINE_SIZE = "rollout.engine.batch_size"  # may differ too where the engine is `transformers`


class RunState:
    """Saves and loads the parts of a run; every method is called on all ranks.

    parts        everything with state that updates change, by name; stateless parts are skipped
    provenance   of the run, on the main rank

    Raises UserError for a part whose state no checkpoint could hold.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        config: Any,
        distributed: Distributed,
        provenance: Provenance | None = None,
    ) -> None:
        self._folders = {n: p for n, p in parts.items() if hasattr(p, "save")}
        self._dicts = {n: p for n, p in parts.items() if hasattr(p, "load_state_dict")}
        self._dicts = {n: p for n, p in self._dicts.items() if n not in self._folders}
        self._config = config
        self._distributed = distributed
        self._provenance = provenance
        for name, part in self._dicts.items() if config.checkpoint.every else ():
            state: Any = None
            with suppress(UserError), plugin_call(name):  # it may have none before its first call
                state = part.state_dict()
            with plugin_call(name):  # fails before training rather than at the first checkpoint
                check_state(state)

    def is_due(self, step: int, stopping: bool) -> bool:
        """Whether to save a checkpoint after this update; `stopping` if it is the last."""
        every = self._config.checkpoint.every
        if every == 0:
            return False
        return stopping or step % every == 0 or step == self._config.steps

    @doing("saving")
    def save(self, root: Path, step: int, score: float | None) -> None:
        """Write `root/step-N` and delete the checkpoints that `config.checkpoint` does not keep.

        Raises UserError where it cannot be written; earlier checkpoints stay complete.
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
        for name, part in self._folders.items():
            blocks = _needs_peers(part, partial / name)
            self._on_all(
                lambda part=part, name=name: part.save(partial / name), root, blocks_on_peers=blocks
            )
        self._on_all(lambda: self._save_rank(partial), root)
        facts = {
            "score": score,
            "world_size": self._distributed.world_size,
            "zero_stage": self._distributed.zero_stage,
            "threads": torch.get_num_threads(),
            "config": config_to_dict(self._config),
        }
        if self._provenance is not None:
            facts["made_of"] = self._provenance.facts()
        digests: dict[str, Any] = {}
        position = self._distributed.rank, self._distributed.world_size
        self._on_all(lambda: digests.update(checkpoint.digests(partial, *position)), root)
        gathered = self._distributed.gather_objects(list(digests.items()))
        files = dict(gathered)
        self._on_main(lambda: checkpoint.commit(partial, facts, files), root)

    @doing("loading")
    def load(self, start: Checkpoint) -> int:
        """Load a checkpoint of any number of ranks and return its step. Raises UserError."""
        blocks = any(_needs_peers(part, start.path / name) for name, part in self._folders.items())
        self._distributed.fail_together(lambda: self._read(start), blocks_on_peers=blocks)
        self._distributed.fail_together(lambda: self._announce(start))
        return start.step

    def _announce(self, start: Checkpoint) -> None:
        if self._distributed.is_main:
            notice(f"resuming from {start.path}{self._changes(start)}")

    def _read(self, start: Checkpoint) -> None:
        world = start.facts["world_size"]
        file = start.path / f"rank-{self._distributed.rank % world}.pt"
        stage = file.name  # for the error message
        try:
            for name, part in self._folders.items():
                stage = name
                part.load(start.path / name)
            stage = file.name
            state = read_tensors(file)
            for name, part in self._dicts.items():
                stage, part_state = file.name, state["parts"][name]
                with plugin_call(name):
                    part.load_state_dict(part_state)
            stage = f"{file.name}, generators"
            of_plugins = state.get("plugins", state["generators"])
            if of_plugins is not None:
                set_generators(of_plugins)  # states that do not fit fail before a plug-in runs
            set_generators(state["generators"])
            set_plugin_generators(of_plugins)
        except Exception as error:  # parts raise anything on others' state
            kind = PeerError if isinstance(error, PeerError) else UserError
            raise kind(
                f"resume: checkpoint {start.path} does not fit this run: {stage}: {_message(error)}"
            ) from error

    def _save_rank(self, partial: Path) -> None:
        parts = {}
        for name, part in self._dicts.items():
            with plugin_call(f"checkpoint: {name}"):
                parts[name] = part.state_dict()
                check_state(parts[name])
        state = {"parts": parts, "generators": generators(), "plugins": plugin_generators()}
        torch.save(state, partial / f"rank-{self._distributed.rank}.pt")

    def _changes(self, start: Checkpoint) -> str:
        """Suffix of the notice of a resume: differences from the checkpoint."""
        changes = [
            f"{key} {a!r} -> {b!r}"
            for key, a, b in differences(
                _config_of(start, self._config), config_to_dict(self._config)
            )
            if key not in ("output_dir", "overwrite", "resume", "resume_changed")
        ]
        ranks = self._distributed
        for name, fact, present in (
            ("ranks", "world_size", ranks.world_size),
            ("ZeRO stage", "zero_stage", ranks.zero_stage),
            ("threads", "threads", torch.get_num_threads()),
        ):
            old = start.facts.get(fact)
            if old not in (None, present):
                changes.append(f"{name} {old} -> {present}, which may change results by rounding")
        changes += [
            f"{name} differed from rank to rank: rank R resumes from that of rank R mod "
            f"{start.facts['world_size']}"
            for name in self._of_ranks(start)
        ]
        return f" ({'; '.join(changes)})" if changes else ""

    def _of_ranks(self, start: Checkpoint) -> list[str]:
        """On another number of ranks: what differed from rank to rank in the checkpoint."""
        old_ranks = start.facts["world_size"]
        if old_ranks == self._distributed.world_size:
            return []
        digests: dict[str, set[str]] = {}
        for rank in range(old_ranks):
            state = read_tensors(start.path / f"rank-{rank}.pt")
            of_rank = {**state["parts"], "random streams of plug-ins": state.get("plugins")}
            for name, part in of_rank.items():
                digests.setdefault(name, set()).add(digest_of_state(part))
        return [name for name, values in digests.items() if len(values) > 1]

    def _on_main(self, work: Any, root: Path) -> None:
        self._on_all(work if self._distributed.is_main else lambda: None, root)

    def _on_all(self, work: Any, root: Path, blocks_on_peers: bool = False) -> None:
        def guarded() -> None:
            with writing(root):
                work()

        self._distributed.fail_together(guarded, blocks_on_peers=blocks_on_peers)


def _needs_peers(part: Any, folder: Path) -> bool:
    """Whether a part saves to, or loads, a folder on all ranks at once."""
    return hasattr(part, "needs_peers") and part.needs_peers(folder)


def _message(error: Exception) -> str:
    """An error's message, after its type where the message alone would be unclear."""
    is_plain = isinstance(error, UserError | OSError | RuntimeError)
    return one_line(error) if is_plain else f"{type(error).__name__}: {one_line(error)}"


@dataclass(frozen=True)
class ClaimedRun:
    """A run's folder, the checkpoint to resume from, and provenance (on the main rank)."""

    directory: RunDirectory
    checkpoint: Checkpoint | None
    provenance: Provenance | None


def claim_run(
    config: Any,
    distributed: Distributed,
    rows: Mapping[str, Iterable[Any]],
    arguments: Mapping[str, Any] | None = None,
) -> ClaimedRun:
    """Claim the folder of a run on all ranks.

    rows, arguments   as in `Provenance`

    Raises UserError where the folder or the checkpoint is not for this run.
    """
    objects = arguments or {}
    keys = (config.output_dir, config.overwrite, config.log)

    def claim_folder() -> RunDirectory:
        if distributed.is_main:
            check_apart(config, run_files(config.output_dir), objects)
        return RunDirectory(*keys, distributed.is_main, config.resume)

    directory = distributed.fail_together(claim_folder)
    (start, *_) = distributed.gather_objects([directory.checkpoint])
    if start is not None:
        check_config(config, start)
    has_digests = distributed.is_main and (start is not None or config.checkpoint.every > 0)
    provenance = None
    if has_digests or distributed.world_size > 1:
        provenance = distributed.fail_together(lambda: Provenance(config, rows, objects))
    if provenance is not None and distributed.world_size > 1:
        facts = distributed.fail_together(provenance.quick_facts)
        check_agreement(config, distributed, facts)
    if not has_digests:
        provenance = None
    if config.checkpoint.every > 0:
        check_shared(directory.path, distributed)
    distributed.fail_together(lambda: _begin(provenance, config, start))
    return ClaimedRun(directory, start, provenance)


def _begin(provenance: Provenance | None, config: Any, start: Checkpoint | None) -> None:
    """Start reading a run's inputs; on a resume, compare them with the checkpoint's.

    Raises UserError.
    """
    if provenance is None:
        return
    before = None if start is None else start.facts.get("made_of")
    if start is None or before is None:
        provenance.begin()
    if start is not None and before is None:
        notice(
            f"checkpoint {start.path} has no digests of the run's inputs: whether data and weights "
            "are the same could not be checked"
        )
    if start is None or before is None:
        return
    changed = "; ".join(provenance.changes(before))
    if changed and not config.resume_changed:
        raise UserError(
            f"resume: since checkpoint {start.path} these have changed: {changed}; restore them, "
            "or set resume_changed=true to resume with the present ones"
        )
    if changed:
        notice(f"resume_changed: resuming although these have changed: {changed}")


def check_config(config: Any, start: Checkpoint) -> None:
    """Check that a checkpoint can be resumed with this configuration. Raises UserError."""
    old, new = _config_of(start, config), config_to_dict(config)
    faults = [
        f"{key} ({a!r}, now {b!r})"
        for key, a, b in differences(_with_plain_engine(old), _with_plain_engine(new))
        if key not in MAY_DIFFER and key.split(".")[0] not in MAY_DIFFER
    ]
    if faults:
        raise UserError(
            f"resume: the configuration differs from that of checkpoint {start.path} in "
            f"{', '.join(faults)}; on a resume only these may differ: {', '.join(MAY_DIFFER)}"
        )
    if config.steps < start.step:
        raise UserError(
            f"steps: given {config.steps}, but the checkpoint {start.path} to resume is already of "
            f"update {start.step}"
        )


def _with_plain_engine(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without arguments of the engine that change no sample."""
    rollout = config.get("rollout", {})
    if "engine" not in rollout:
        return config
    return {**config, "rollout": {**rollout, "engine": sampling_engine(rollout["engine"])}}


def _config_of(start: Checkpoint, config: Any) -> dict[str, Any]:
    """Configuration of a checkpoint; keys added since have their defaults. Raises UserError."""
    try:
        recorded = config_from_dict(type(config), with_new_names(start.facts["config"]))
        return config_to_dict(recorded)
    except UserError as error:
        raise UserError(
            f"resume: the configuration of checkpoint {start.path} is not one of this version of "
            f"marlhf: {error}"
        ) from None
