"""Inputs of a job: their digests, and a guard against overwriting them.

A run's checkpoints hold digests of its data rows, of the files of every model that its
configuration names, and of its plug-ins' code; a resume compares them.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from marlhf.common.errors import UserError
from marlhf.common.paths import digest_of_file
from marlhf.config.loading import config_to_dict
from marlhf.data.files import local_files
from marlhf.data.rows import fact_of
from marlhf.runs.json_lines import parse_line

# files of a model and its tokenizer, without reports or training states in the same folder
_MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.index.json", "*.py"),
    "quantization_config.json",
    *("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf"),
    *("tokenizer*.json", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*"),
)
_DATA = ("data.", "ptx.")
# keys under which any text may name a model, a file or code
_PLUG_INS = (
    *("reward.models", "reward.tokens", "rewards", "segmenter", "data.preset", "policies"),
    *("ppo.estimator", "ppo.lam", "ppo.critic_lam", "ppo.weights", "rollout.engine", "reference"),
    "raters.ratings",
)
_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_THREADS = 4
_PART, _PARTS = 2**12, 64

InputFacts = dict[str, dict[str, Any]]


def model_files(folder: Path) -> list[Path]:
    """Files of a model and its tokenizer in a folder, sorted."""
    files = {file for name in _MODEL_FILES for file in folder.glob(name) if file.is_file()}
    if any(file.suffix == ".safetensors" for file in files):  # then .bin files are not read
        files = {file for file in files if file.suffix != ".bin"}
    return sorted(files)


def base_of(folder: Path) -> str | None:
    """Path or hub name of an adapter's base; None for a folder without an adapter."""
    try:
        adapter_config = parse_line((folder / "adapter_config.json").read_bytes())
    except OSError:
        return None
    base = (adapter_config or {}).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def commit_of(name: str, revision: str | None = None) -> str | None:
    """Commit of a hub model in the local cache; None where there is none."""
    if not _HUB_NAME.match(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no hub name after all
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def named(config: Any, arguments: Mapping[str, Any] | None = None) -> Iterator[tuple[str, str]]:
    """Yield `(dotted key, text)` of every text that may name an input of the job.

    arguments   given in Python instead of configuration keys
    """
    objects = {f"argument {name}": value for name, value in (arguments or {}).items()}
    for key, text in _texts({**config_to_dict(config), **objects}, ""):
        is_plug_in = key.startswith(("argument ", *(f"{name}." for name in _PLUG_INS)))
        is_plug_in = is_plug_in or key in _PLUG_INS
        if is_plug_in or re.search(r"(\.|_|^)path$", key):
            yield key, text


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, below in value.items():
            yield from _texts(below, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for i, below in enumerate(value):
            yield from _texts(below, f"{key}.{i}")


def code_of(spec: Any) -> list[dict[str, Any]]:
    """Digests of the code that a plug-in's name and arguments import by path."""
    files = [file for _, text in _texts(spec, "") for file in code_files(text)]
    return [{"code": hashlib.sha256(file.read_bytes()).hexdigest()} for file in files]


def existing(text: str) -> Path | None:
    """The file or folder that a text names, if there is one."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # a name too long, a null, `~nobody`
        return None


# --- protection of inputs


def check_apart(
    config: Any, outputs: Iterable[Path], arguments: Mapping[str, Any] | None = None
) -> None:
    """Check that a job reads none of the files that it deletes or writes.

    outputs   files and folders that the job deletes or replaces, whether they exist or not

    Raises UserError, naming both keys.
    """
    targets = {name: target for target in outputs for name in _names_of(target)}
    for key, text in named(config, arguments):
        path = existing(text)
        for file in () if path is None else _read_at(path, is_data=key.startswith(_DATA)):
            for name in _names_of(file):
                hit = next((targets[p] for p in (name, *name.parents) if p in targets), None)
                if hit is not None:
                    overwrite = "overwrite: given true, which" if config.overwrite else "it"
                    raise UserError(
                        f"output_dir: given {config.output_dir!r}; {overwrite} would replace "
                        f"{str(hit)!r}, which {key} ({text!r}) reads; choose another output_dir"
                    )


def _read_at(path: Path, is_data: bool) -> list[Path]:
    """Files behind a path: itself and, for a folder, those of its data or model."""
    if path.is_file():
        return [path]
    if is_data:
        return [path, *local_files(str(path))]
    files = [path, *model_files(path)]
    base = base_of(path)
    base_path = None if base is None else existing(base)
    return files if base_path is None or base_path == path else [*files, base_path]


def _names_of(path: Path) -> list[Path]:
    """A path as written, with all links resolved, and with all except the last resolved."""
    absolute = Path(os.path.abspath(path))
    return [absolute, Path(os.path.realpath(path)), absolute.parent.resolve() / absolute.name]


# --- digests


def data_labels(data: Any, train: Any = None, held_out: Any = None) -> tuple[str, str]:
    """Names of training and held-out data in messages.

    Keys with their values, or names of Python arguments that replace them.
    """
    key = "preset" if data.path is None and data.preset is not None else "path"
    name = f"data.{key} {getattr(data, key)!r}" if train is None else "train_dataset"
    if held_out is not None:
        return name, "eval_dataset"
    is_separate = train is None and data.eval_path is not None
    return name, f"data.eval_path {data.eval_path!r}" if is_separate else f"{name}, held out"


class Provenance:
    """Digests of a run's inputs. Background threads read the files while models are loaded.

    config      of the job
    rows        label -> rows that it trains or is evaluated on
    arguments   given in Python instead of keys: names and paths count as in the configuration; of
                objects the type alone, and of tokenizers the vocabulary and chat template too
    """

    def __init__(
        self, config: Any, rows: Mapping[str, Iterable[Any]], arguments: Mapping[str, Any]
    ) -> None:
        self._facts: InputFacts = {label: {"rows": fact_of(part)} for label, part in rows.items()}
        self._files: dict[Path, dict[str, Any]] = {}  # to be read; the same facts as in self._facts
        self._threads: list[threading.Thread] = []
        revision = getattr(config.model, "revision", None)  # evaluate has none
        for key, text in named(config, arguments):
            if not key.startswith(_DATA):
                facts = self._of(key, text, revision if key == "model.path" else None)
                if facts:
                    self._facts[f"{key} {text!r}"] = facts
        objects = {k: v for k, v in arguments.items() if v is not None and not _is_plain(v)}
        for name, value in objects.items():
            self._facts[f"argument {name}"] = _of_object(value)
        self.not_compared = sorted(objects)

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """Differences from the `facts` of a checkpoint, each with its key and path."""
        for label, facts in self._facts.items():
            old = _mapping(before.get(label))
            for name, fact in facts.items():
                was = _mapping(old.get(name))
                if "ctime_ns" in fact and all(
                    fact[key] == was.get(key) for key in ("bytes", "mtime_ns", "ctime_ns")
                ):  # same ctime: the file has not been written to
                    fact["sha256"] = was.get("sha256")
        self.begin()
        present, changed = self.facts(), []
        for label in dict.fromkeys([*before, *present]):
            old, new = _mapping(before.get(label)), present.get(label, {})
            names = [
                name
                for name in dict.fromkeys([*old, *new])
                if _without_times(old.get(name)) != _without_times(new.get(name))
            ]
            if names:
                excerpt = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                changed.append(f"{label} ({excerpt})")
        return changed

    def quick_facts(self) -> InputFacts:
        """Size of a file, and a digest of parts of it: no full read.

        Raises OSError.
        """
        parts = {id(fact): _digest_of_parts(path) for path, fact in self._files.items()}
        return {
            label: {
                name: {**(_without_times(fact) or {}), "parts": parts.get(id(fact))}
                for name, fact in facts.items()
            }
            for label, facts in self._facts.items()
        }

    def begin(self) -> None:
        """Start reading the files without a digest."""
        waiting = deque((p, f) for p, f in self._files.items() if f.get("sha256") is None)
        count = min(_THREADS, len(waiting))
        self._threads = [
            threading.Thread(target=_read_all, args=(waiting,), daemon=True) for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def facts(self) -> InputFacts:
        """All facts as plain data, for a manifest; waits for the threads of `begin`."""
        for thread in self._threads:
            thread.join()
        return self._facts

    def _of(self, key: str, text: str, revision: str | None) -> dict[str, Any]:
        path = existing(text)
        if path is None:
            commit = commit_of(text, revision)
            files = {file.name: self._of_file(file) for file in code_files(text)}
            return files or ({} if commit is None else {"commit": {"commit": commit}})
        if path.is_dir():
            facts = {str(f.relative_to(path)): self._of_file(f) for f in model_files(path)}
            base = base_of(path)
            if base is not None and base != text:
                facts |= {f"{base}: {n}": f for n, f in self._of(key, base, None).items()}
            return facts
        is_file = key.endswith("path") or os.sep in text or bool(path.suffix)
        return {path.name: self._of_file(path)} if is_file and path.is_file() else {}

    def _of_file(self, file: Path) -> dict[str, Any]:
        about = file.stat()
        fact = {"bytes": about.st_size, "sha256": None}
        fact |= {"mtime_ns": about.st_mtime_ns, "ctime_ns": about.st_ctime_ns}
        return self._files.setdefault(Path(os.path.realpath(file)), fact)


def code_files(path: str) -> list[Path]:
    """Source files behind an import path or an installed name that was imported.

    The module's file, and the file in which the same package defines the object.
    """
    names = {e.value.replace(":", ".") for e in entry_points(name=path) if "marlhf" in e.group}
    files = []
    for name in sorted({path, *names}):
        module_name, _, attribute = name.rpartition(".")
        package = module_name.split(".")[0]
        owner = getattr(getattr(sys.modules.get(module_name), attribute, None), "__module__", None)
        for module in dict.fromkeys([module_name, owner]):
            file = getattr(sys.modules.get(str(module)), "__file__", None)
            if file and str(module).split(".")[0] == package != "marlhf" and Path(file).is_file():
                files.append(Path(file))
    return files


def _read_all(waiting: deque[tuple[Path, dict[str, Any]]]) -> None:
    while True:
        try:
            path, fact = waiting.popleft()
        except IndexError:
            return
        try:
            fact["sha256"] = digest_of_file(path)
        except OSError:  # gone since; the code that needs it reports it
            fact["sha256"] = "cannot be read"


def _digest_of_parts(path: Path) -> str:
    """SHA-256 of evenly spaced parts of a file: other weights differ in all of them."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for start in range(0, size, max(_PART, size // _PARTS)):
            file.seek(start)
            digest.update(file.read(_PART))
    return digest.hexdigest()


def _of_object(value: Any) -> dict[str, Any]:
    kind = value if isinstance(value, type) or hasattr(value, "__qualname__") else type(value)
    facts = {"type": {"type": f"{kind.__module__}.{kind.__qualname__}"}}
    if hasattr(value, "get_vocab"):
        facts["vocabulary"] = fact_of(sorted(value.get_vocab().items()))
        facts["chat_template"] = fact_of([value.chat_template])
    return facts


def _is_plain(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_is_plain, value))
    return isinstance(value, str | Mapping)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _without_times(fact: Any) -> dict[str, Any] | None:
    """A file's fact without its times, which differ in a copy of the file."""
    times = ("mtime_ns", "ctime_ns")
    return {k: v for k, v in fact.items() if k not in times} if isinstance(fact, Mapping) else None
