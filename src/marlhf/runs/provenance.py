"""Inputs of a job: their digests, and a guard against overwriting them.

A run's checkpoints hold digests of its data rows, of the files of every model that its
configuration names, and of its plug-ins' code; a resume compares them.
"""

from __future__ import annotations

import hashlib
import json
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
from marlhf.config.loading import config_to_dict
from marlhf.data.files import local_files
from marlhf.runs.json_lines import parse_line

# files of a model and its tokenizer, without reports or training states in the same folder
_MODEL_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.index.json", "*.py"),
    *("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf"),
    *("tokenizer*.json", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*"),
)
_DATA = ("data.", "ptx.")
# keys under which any text may name a model, a file or code
_PLUG_INS = (
    *("reward.models", "reward.tokens", "rewards", "segmenter", "data.preset", "policies"),
    *("reference", "raters.ratings"),
)
_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_BLOCK, _THREADS = 2**22, 4

Facts = dict[str, dict[str, Any]]


def model_files(folder: Path) -> list[Path]:
    """Files of a model and its tokenizer in a folder, sorted."""
    found = {file for name in _MODEL_FILES for file in folder.glob(name) if file.is_file()}
    if any(file.suffix == ".safetensors" for file in found):  # then .bin files are not read
        found = {file for file in found if file.suffix != ".bin"}
    return sorted(found)


def base_of(folder: Path) -> str | None:
    """Path or hub name of an adapter's base; None for a folder without an adapter."""
    try:
        found = parse_line((folder / "adapter_config.json").read_bytes())
    except OSError:
        return None
    base = (found or {}).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def commit_of(name: str, revision: str | None = None) -> str | None:
    """Commit of a hub model in the local cache; None where there is none."""
    if not _HUB_NAME.match(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no hub name after all
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def named(config: Any, arguments: Mapping[str, Any] | None = None) -> Iterator[tuple[str, str]]:
    """Yield `(dotted key, text)` of all texts that may name an input of the job.

    arguments   given in Python instead of configuration keys
    """
    given = {f"argument {name}": value for name, value in (arguments or {}).items()}
    for key, text in _texts({**config_to_dict(config), **given}, ""):
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


# --- what must not be replaced


def check_apart(
    config: Any, own: Iterable[Path], arguments: Mapping[str, Any] | None = None
) -> None:
    """Check that a job reads nothing that it deletes or writes.

    own   files and folders that the job deletes or replaces, whether they exist or not
    Raises UserError, naming both keys.
    """
    targets = {name: target for target in own for name in _names_of(target)}
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
    found = [path, *model_files(path)]
    base = base_of(path)
    below = None if base is None else existing(base)
    return found if below is None or below == path else [*found, below]


def _names_of(path: Path) -> list[Path]:
    """A path as written, with all links followed, and with all but the last followed."""
    absolute = Path(os.path.abspath(path))
    return [absolute, Path(os.path.realpath(path)), absolute.parent.resolve() / absolute.name]


# --- digests


def rows_fact(rows: Iterable[Any]) -> dict[str, Any]:
    """Number of rows, and a digest of their contents in this order."""
    digest, count = hashlib.sha256(), 0
    for row in rows:
        count += 1
        digest.update(json.dumps(row, sort_keys=True, default=_plain, skipkeys=True).encode())
        digest.update(b"\n")
    return {"rows": {"rows": count, "sha256": digest.hexdigest()}}


def _plain(value: Any) -> Any:
    fields = getattr(value, "__dict__", None)
    return fields or _ADDRESS.sub("", str(value))


def data_labels(data: Any, train: Any = None, held_out: Any = None) -> tuple[str, str]:
    """Names of training and held-out data in messages.

    Keys with their values, or arguments of Python code where these are given.
    """
    key = "preset" if data.path is None and data.preset is not None else "path"
    name = f"data.{key} {getattr(data, key)!r}" if train is None else "train_dataset"
    if held_out is not None:
        return name, "eval_dataset"
    given = train is None and data.eval_path is not None
    return name, f"data.eval_path {data.eval_path!r}" if given else f"{name}, held out"


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
        self._facts: Facts = {label: rows_fact(part) for label, part in rows.items()}
        self._files: dict[Path, dict[str, Any]] = {}  # to be read; the same facts as in self._facts
        self._threads: list[threading.Thread] = []
        revision = config.model.revision
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
                ):  # same ctime: nobody has written to it
                    fact["sha256"] = was.get("sha256")
        self.begin()
        now, found = self.facts(), []
        for label in dict.fromkeys([*before, *now]):
            old, new = _mapping(before.get(label)), now.get(label, {})
            every = dict.fromkeys([*old, *new])
            names = [name for name in every if _known(old.get(name)) != _known(new.get(name))]
            if names:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                found.append(f"{label} ({shown})")
        return found

    def begin(self) -> None:
        """Start reading the files whose digests are not known yet."""
        waiting = deque((p, f) for p, f in self._files.items() if f.get("sha256") is None)
        count = min(_THREADS, len(waiting))
        self._threads = [
            threading.Thread(target=_read_all, args=(waiting,), daemon=True) for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def facts(self) -> Facts:
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

    That of the module, and that in which the same package defines the object.
    """
    names = {e.value.replace(":", ".") for e in entry_points(name=path) if "marlhf" in e.group}
    found = []
    for name in sorted({path, *names}):
        module_name, _, attribute = name.rpartition(".")
        package = module_name.split(".")[0]
        owner = getattr(getattr(sys.modules.get(module_name), attribute, None), "__module__", None)
        for module in dict.fromkeys([module_name, owner]):
            file = getattr(sys.modules.get(str(module)), "__file__", None)
            if file and str(module).split(".")[0] == package != "marlhf" and Path(file).is_file():
                found.append(Path(file))
    return found


def _read_all(waiting: deque[tuple[Path, dict[str, Any]]]) -> None:
    while True:
        try:
            path, fact = waiting.popleft()
        except IndexError:
            return
        try:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
            fact["sha256"] = digest.hexdigest()
        except OSError:  # gone since; the code that needs it reports it
            fact["sha256"] = "cannot be read"


def _of_object(value: Any) -> dict[str, Any]:
    kind = value if isinstance(value, type) or hasattr(value, "__qualname__") else type(value)
    facts = {"type": {"type": f"{kind.__module__}.{kind.__qualname__}"}}
    if hasattr(value, "get_vocab"):
        facts["vocabulary"] = rows_fact(sorted(value.get_vocab().items()))["rows"]
        facts["chat_template"] = rows_fact([value.chat_template])["rows"]
    return facts


def _is_plain(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_is_plain, value))
    return isinstance(value, str | Mapping)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _known(fact: Any) -> dict[str, Any] | None:
    """A fact without its times, which change in a copy."""
    times = ("mtime_ns", "ctime_ns")
    return {k: v for k, v in fact.items() if k not in times} if isinstance(fact, Mapping) else None
