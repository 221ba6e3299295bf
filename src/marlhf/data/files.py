"""Opens rows of files, folders of files, `save_to_disk` folders, and the hub.

Every fault of the data is a one-line UserError. Local paths are never looked up on the hub.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa

from marlhf.common.errors import UserError, one_line
from marlhf.common.paths import digest_of_file, local_path, reading, special_kind
from marlhf.data.file_formats import (
    FORMATS,
    Row,
    check_format,
    data_format,
    is_archive,
    is_parquet,
    read_file,
    read_parquet,
    suffixes,
)
from marlhf.data.rows import TEXT_SCHEMA, Rows, rows_of_dataset
from marlhf.data.store import Writer, batched, stored

__all__ = ["Files", "Row", "local_splits", "looks_local", "number_in", "read_rows"]

_SPLITS = {
    *("train", "training", "test", "testing", "validation", "valid", "val", "dev"),
    *("eval", "evaluation", "heldout", "holdout"),
}
_HUB_NAME = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")
_ABOUT_DATA = re.compile(r"(readme|licen[cs]e|citation|dataset_infos?\.json)|.*\.md$", re.I)
_NAMED = 5  # number of skipped files that a message names

_ENCODER = json.JSONEncoder(ensure_ascii=False)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Files:
    """Selects files and columns of a dataset.

    folder    subfolder of a hub dataset; of a local folder too, if it exists there
    revision  branch, tag or commit of a hub dataset
    columns   those to read; None: all
    """

    folder: str | None = None
    revision: str | None = None
    columns: Sequence[str] | None = None


def read_rows(
    path: str,
    split: str = "train",
    name: str | None = None,
    limit: int | None = None,
    key: str = "data.path",
    split_key: str = "data.split",
    files: Files = Files(),
) -> Rows:
    """Open rows `{column: value}` of a local file or folder, or of a hub dataset.

    split       a file has only `train`; a folder has those in its files' names
    name        configuration of a hub dataset
    limit       maximum number of rows, from the first
    key, split_key   names of path and split in messages
    files       folder, revision and columns to read

    Raises UserError for missing or unreadable data, an unknown split, or no rows.
    """
    if not path:
        raise UserError(f"{key}: is empty, must be a file, a folder or a hub name")
    source = _local(path, files, key)
    if name is not None and source.exists():
        raise UserError(
            f"data.name: given {name!r}, but {path!r} is local and has no configurations"
        )
    if source.is_file():
        _check_split(split, ["train"], split_key, path)
        rows = _read_files([source], key, files.columns)
    elif source.is_dir():
        rows = _read_folder(source, split, key, split_key, files.columns)
    elif (kind := special_kind(source)) is not None:
        raise UserError(f"{key}: given {path!r}, which is {kind}, must be a file or a folder")
    elif looks_local(path):
        raise UserError(f"{key}: given {path!r}, which does not exist")
    else:
        rows = _read_hub(path, name, split, key, files)
    if not rows:
        raise UserError(f"{key}: {path!r} has no rows")
    return rows[:limit]


def local_splits(path: str, files: Files = Files()) -> list[str] | None:
    """Splits of a local file or folder; None where the path does not exist. Raises UserError."""
    source = _local(path, files, "data.path")
    if not source.exists():
        return None
    if source.is_file():
        return ["train"]
    if (source / "dataset_dict.json").is_file():
        return sorted(p.name for p in source.iterdir() if p.is_dir())
    return (
        ["train"]
        if (source / "state.json").is_file()
        else sorted(_by_split(source, "data.path")[0])
    )


def local_files(path: str) -> list[Path]:
    """Data files of a folder, of all splits. Raises UserError."""
    by_split, _ = _by_split(Path(path).expanduser(), "data.path")
    return [file for files in by_split.values() for file in files]


def number_in(value: Any) -> float | int | None:
    """Parse the number in a cell, which CSV has as text; None without one."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, str):
        if "_" in value:  # Python's own way to write 1000
            return None
        try:
            number = float(value)
        except ValueError:
            return None
        with contextlib.suppress(ValueError):
            return int(value)
        return number
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _local(path: str, files: Files, key: str) -> Path:
    source = local_path(path, key)
    inside = source / (files.folder or "")
    return local_path(inside, key) if inside.is_dir() else source


def looks_local(path: str) -> bool:
    """Whether a path that does not exist cannot be a hub dataset."""
    return not _HUB_NAME.match(path) or path.startswith(".") or data_format(path) is not None


def _check_split(split: str, possible: list[str], split_key: str, path: str) -> None:
    if split not in possible:
        raise UserError(
            f"{split_key}: given {split!r}, but {path!r} has {', '.join(sorted(possible))} alone"
        )


def _read_folder(
    folder: Path,
    split: str,
    key: str,
    split_key: str,
    columns: Sequence[str] | None,
) -> Rows:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _of_dataset(_load_saved(folder, split, key, split_key), columns)
    by_split, left_out = _by_split(folder, key, split)
    if not by_split:
        others = f", but {_some(left_out)}" if left_out else ""
        raise UserError(
            f"{key}: folder {str(folder)!r} is no `save_to_disk` folder and has no file that ends "
            f"in {suffixes()}{others}"
        )
    _check_split(split, list(by_split), split_key, str(folder))
    if left_out and os.environ.get("RANK", "0") == "0":  # every rank reads the same rows
        which = _some(left_out)
        _log.warning("%s: files in %r that are not read: %s", key, str(folder), which)
    return _read_files(by_split[split], key, columns)


def _read_files(files: Sequence[Path], key: str, columns: Sequence[str] | None) -> Rows:
    """Open the rows of data files of one format, through a copy in the cache.

    Raises UserError for a file that cannot be read, or changes meanwhile.
    """
    contents, states = [], {}
    for file in files:
        check_format(file, key)
        with reading(key, file):
            states[file] = _state(file)
            contents.append([digest_of_file(file), "".join(file.suffixes).lower()])
    entry = stored(
        "rows", [contents, columns], lambda writer: _copy_rows(files, key, columns, writer)
    )
    for file, state in states.items():
        with reading(key, file):
            if _state(file) != state:
                raise UserError(f"{key}: {str(file)!r} changed while it was read")
    return Rows(entry.tables, entry.key, entry.facts["names"])


def _state(file: Path) -> tuple[int, int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns


def _copy_rows(
    files: Sequence[Path], key: str, columns: Sequence[str] | None, writer: Writer
) -> dict[str, Any]:
    """Write a table per file; returns the column names if all rows have the same."""
    orders: dict[tuple[str, ...], None] = {}
    for file in files:
        if is_parquet(file):
            for number, batch in enumerate(read_parquet(file, key, columns)):
                if number == 0:
                    writer.new_table(batch.schema)
                orders[tuple(batch.schema.names)] = None
                writer.write(batch)
            continue
        writer.new_table(TEXT_SCHEMA)
        for rows in batched(read_file(file, key, columns)):
            orders |= dict.fromkeys(map(tuple, rows))
            texts = [_ENCODER.encode(row) for row in rows]
            writer.write(pa.record_batch([pa.array(texts, pa.large_string())], TEXT_SCHEMA))
    same = len(set(map(frozenset, orders))) == 1
    return {"names": list(next(iter(orders))) if same else None}


def _by_split(
    folder: Path, key: str, split: str | None = None
) -> tuple[dict[str, list[Path]], list[str]]:
    """`(data files of a folder by the split in their names, names of skipped files)`.

    `split` is an additional split name. Data is in one format; JSON files next to Parquet or JSON
    Lines are skipped, as they usually describe the data. Raises UserError.
    """
    by_format: dict[str, list[Path]] = {}
    left_out: list[str] = []
    for name in _names_below(folder, key):
        kind = data_format(name)
        if kind is None and is_archive(name):
            raise UserError(
                f"{key}: {str(folder / name)!r} is packed in a way that is not read; unpack it, or "
                "take it out of the folder"
            )
        if kind is None or _is_hidden(name) or not (folder / name).is_file():
            left_out += [name] if kind or not (_is_hidden(name) or _is_about(name)) else []
        else:
            by_format.setdefault(kind, []).append(folder / name)
    formats = [suffix for suffix in FORMATS if suffix in by_format]
    if len([suffix for suffix in formats if suffix != ".json"]) > 1:
        examples = ", ".join(str(by_format[suffix][0].relative_to(folder)) for suffix in formats)
        raise UserError(
            f"{key}: folder {str(folder)!r} has data of several formats, must be of one: {examples}"
        )
    for suffix in formats[1:]:
        left_out += [str(file.relative_to(folder)) for file in by_format[suffix]]
    by_split: dict[str, list[Path]] = {}
    for file in by_format[formats[0]] if formats else []:
        by_split.setdefault(_split_in(str(file.relative_to(folder)), split), []).append(file)
    return by_split, [name for name in left_out if not _is_about(name)]


def _split_in(name: str, split: str | None) -> str:
    """The split in a file's name: `test` for `Test-1.jsonl`, `test2.csv` and `test/a.csv`."""
    words = re.split(r"[\W_]+", str(Path(name).with_suffix("")))
    known = [word.lower().rstrip("0123456789") for word in words]
    pairs = zip(words, known, strict=True)
    return next((w if w == split else k for w, k in pairs if w == split or k in _SPLITS), "train")


def _names_below(folder: Path, key: str) -> list[str]:
    """Relative paths of all files below a folder.

    A link to a folder counts as a file. Raises UserError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    paths = []
    with reading(key, folder):
        for parent, folders, files in os.walk(folder, onerror=fail):
            links = [name for name in folders if (Path(parent) / name).is_symlink()]
            paths += [(Path(parent) / name).relative_to(folder) for name in (*files, *links)]
    return [str(path) for path in sorted(paths)]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def _is_about(name: str) -> bool:
    """Whether a file, by its name, describes the data (a readme, a licence)."""
    return _ABOUT_DATA.match(Path(name).name) is not None


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return one_line(", ".join(names[:_NAMED]) + more)


def _load_saved(folder: Path, split: str, key: str, split_key: str) -> Any:
    """Load a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{key}: {str(folder)!r} cannot be read: {one_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        _check_split(split, [str(s) for s in saved], split_key, str(folder))
        return saved[split]
    _check_split(split, list({"train", str(saved.split or "train")}), split_key, str(folder))
    return saved


def _read_hub(path: str, name: str | None, split: str, key: str, files: Files) -> Rows:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from marlhf.compat.huggingface import offline

    where: dict[str, Any] = {"data_dir": files.folder, "revision": files.revision}
    where = {key: value for key, value in where.items() if value is not None}
    reachable = True
    try:
        # checked first, because load_dataset retries for half a minute without a network
        HfApi().dataset_info(path, timeout=10)
    except RepositoryNotFoundError:
        raise UserError(
            f"{key}: given {path!r}, which is no file or folder here and no public dataset on the "
            "Hugging Face hub"
        ) from None
    except Exception:  # of any HTTP library: the dataset may still be cached
        reachable = False
    try:
        with contextlib.nullcontext() if reachable else offline():
            dataset = datasets.load_dataset(path, name, split=split, **where)
    except Exception as error:
        if not reachable:
            raise UserError(
                f"{key}: given {path!r}, which is no file or folder here; the Hugging Face hub "
                "cannot be reached, and its cache here has no such dataset"
            ) from error
        raise UserError(f"{key}: cannot load {path!r}: {one_line(error)}") from error
    return _of_dataset(dataset, files.columns)


def _of_dataset(dataset: Any, columns: Sequence[str] | None) -> Rows:
    if columns is not None:
        dataset = dataset.select_columns([c for c in columns if c in dataset.column_names])
    return rows_of_dataset(dataset, files_are_content=True)
