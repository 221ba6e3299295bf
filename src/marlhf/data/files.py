"""Reads rows from files, folders of files, `save_to_disk` folders, and the hub.

Every fault of the data is a one-line UserError. Local paths are never looked up on the hub.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlhf.common.errors import UserError, one_line
from marlhf.common.paths import local_path, reading, special_kind
from marlhf.data.file_formats import FORMATS, Row, data_format, is_archive, read_file, suffixes

__all__ = ["Files", "Row", "local_splits", "looks_local", "number_in", "read_rows"]

_SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"}
_HUB_NAME = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")
_ABOUT_DATA = re.compile(r"(readme|licen[cs]e|citation|dataset_infos?\.json)|.*\.md$", re.I)
_NAMED = 5  # number of skipped files that a message names

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
) -> list[Row]:
    """Read rows `{column: value}` of a local file or folder, or of a hub dataset.

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
        rows = read_file(source, key, files.columns)
    elif source.is_dir():
        rows = _read_folder(source, split, key, split_key, limit, files.columns)
    elif (kind := special_kind(source)) is not None:
        raise UserError(f"{key}: given {path!r}, which is {kind}, must be a file or a folder")
    elif looks_local(path):
        raise UserError(f"{key}: given {path!r}, which does not exist")
    else:
        rows = _read_hub(path, name, split, key, limit, files)
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
    if isinstance(value, str):
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
    limit: int | None,
    columns: Sequence[str] | None,
) -> list[Row]:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _first_rows(_load_saved(folder, split, key, split_key), limit, columns)
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
    return [row for file in by_split[split] for row in read_file(file, key, columns)]


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
        words = re.split(r"[\W_]+", str(file.relative_to(folder).with_suffix("")))
        own = next((w for w in words if w == split or w in _SPLITS), "train")
        by_split.setdefault(own, []).append(file)
    return by_split, [name for name in left_out if not _is_about(name)]


def _names_below(folder: Path, key: str) -> list[str]:
    """Relative paths of all files below a folder.

    A link to a folder counts as a file. Raises UserError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    with reading(key, folder):
        for place, folders, files in os.walk(folder, onerror=fail):
            links = [name for name in folders if (Path(place) / name).is_symlink()]
            found += [(Path(place) / name).relative_to(folder) for name in (*files, *links)]
    return [str(path) for path in sorted(found)]


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


def _read_hub(
    path: str, name: str | None, split: str, key: str, limit: int | None, files: Files
) -> list[Row]:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

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
        with contextlib.nullcontext() if reachable else _offline():
            found = datasets.load_dataset(path, name, split=split, **where)
            return _first_rows(found, limit, files.columns)
    except Exception as error:
        if not reachable:
            raise UserError(
                f"{key}: given {path!r}, which is no file or folder here; the Hugging Face hub "
                "cannot be reached, and its cache here has no such dataset"
            ) from error
        raise UserError(f"{key}: cannot load {path!r}: {one_line(error)}") from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Restrict `datasets` to its cache."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _first_rows(dataset: Any, limit: int | None, columns: Sequence[str] | None = None) -> list[Row]:
    if columns is not None:  # unused columns can be most of the data
        dataset = dataset.select_columns([c for c in columns if c in dataset.column_names])
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return dataset.to_list()
