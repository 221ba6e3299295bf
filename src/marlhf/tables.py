"""Data files -> rows: JSONL, JSON, CSV, Parquet, folders of these, `save_to_disk` folders, the hub.

Whatever is wrong with the data is one UserError line. Nothing local is looked up on the hub.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlhf.errors import UserError, one_line

Row = dict[str, Any]

_SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escaped; nothing else is in JSON's UTF-8
_HUB_NAME = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")


@dataclass(frozen=True)
class Files:
    """Which files of a dataset, and what of them.

    folder    of a hub dataset; of a local folder too, where that has it
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
    """Rows of a local file or folder, or of a hub dataset, as `{column: value}`.

    split       a file has `train` alone; a folder has those that its files are named after
    name        configuration of a hub dataset
    limit       the first rows only
    key, split_key   what messages call path and split
    files       folder, revision and columns to read

    Raises UserError: nothing there, no such split, unreadable, or no rows.
    """
    if not path:
        raise UserError(f"{key}: is empty, must be a file, a folder or a hub name")
    source = _local(path, files)
    if name is not None and source.exists():
        raise UserError(
            f"data.name: given {name!r}, but {path!r} is local and has no configurations"
        )
    if source.is_file():
        _check_split(split, ["train"], split_key, path)
        rows = _read_file(source, key, files.columns)
    elif source.is_dir():
        rows = _read_folder(source, split, key, split_key, limit, files.columns)
    elif looks_local(path):
        raise UserError(f"{key}: given {path!r}, which does not exist")
    else:
        rows = _read_hub(path, name, split, key, limit, files)
    if not rows:
        raise UserError(f"{key}: {path!r} has no rows")
    return rows[:limit]


def local_splits(path: str, files: Files = Files()) -> list[str] | None:
    """The splits of a local file or folder; None for what is not local. Raises UserError."""
    source = _local(path, files)
    if not source.exists():
        return None
    if source.is_file():
        return ["train"]
    if (source / "dataset_dict.json").is_file():
        return sorted(p.name for p in source.iterdir() if p.is_dir())
    return ["train"] if (source / "state.json").is_file() else sorted(_by_split(source))


def _local(path: str, files: Files) -> Path:
    source = Path(path).expanduser()
    inside = source / (files.folder or "")
    return inside if inside.is_dir() else source


def parse_json(text: str) -> Any:
    """`json.loads`, with a question mark for half of an escaped pair, such as of an emoji that was
    cut in two: it is no character, and no tokenizer takes it."""
    value = json.loads(text)
    if _SURROGATE.search(text):
        whole = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        value = json.loads(whole)
    return value


def looks_local(path: str) -> bool:
    """Whether a path that does not exist can only have meant a local one, never a hub dataset."""
    return not _HUB_NAME.match(path) or path.startswith(".") or Path(path).suffix in _READERS


def _check_split(split: str, possible: list[str], split_key: str, path: str) -> None:
    if split not in possible:
        raise UserError(
            f"{split_key}: given {split!r}, but {path!r} has {', '.join(sorted(possible))} alone"
        )


def _read_file(file: Path, key: str, columns: Sequence[str] | None = None) -> list[Row]:
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise UserError(
            f"{key}: given {str(file)!r}; a file must end in {', '.join(sorted(_READERS))}"
        )
    try:
        if reader is _read_parquet:
            return _read_parquet(file, key, columns)
        rows = reader(file, key)
        if columns is None:
            return rows
        return [{name: row[name] for name in columns if name in row} for row in rows]
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {file} is not UTF-8 text: {error.reason}") from None
    except (OSError, ValueError, RecursionError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{key}: {file} cannot be read: {one_line(error)}") from None


def _read_jsonl(file: Path, key: str) -> list[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        return list(_parse_lines(lines, file, key))


def _parse_lines(lines: Any, file: Path, key: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{key}: {file}, line {number}: not valid JSON: {error.msg}, column {error.colno}"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"{key}: {file}, line {number}: holds a {type(row).__name__}, must be an object "
                'such as {"prompt": ...}'
            )
        yield row


def _read_json(file: Path, key: str) -> list[Row]:
    """A list of objects; JSON lines under the wrong name are read too."""
    text = file.read_text(encoding="utf-8-sig")
    try:
        rows = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return list(_parse_lines(io.StringIO(text), file, key))
        raise UserError(
            f"{key}: {file}, line {error.lineno}: not valid JSON: {error.msg}, column {error.colno}"
        ) from None
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{key}: {file} must hold a list of objects")
    return rows


def _read_csv(file: Path, key: str) -> list[Row]:
    from pyarrow import csv

    if not file.stat().st_size:
        return []
    options = csv.ParseOptions(newlines_in_values=True)
    return csv.read_csv(file, parse_options=options).to_pylist()


def _read_parquet(file: Path, key: str, columns: Sequence[str] | None = None) -> list[Row]:
    from pyarrow import parquet

    table = parquet.ParquetFile(file)
    present = [c for c in columns if c in table.schema_arrow.names] if columns else None
    return table.read(columns=present).to_pylist()


_READERS: dict[str, Callable[[Path, str], list[Row]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}


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
    by_split = _by_split(folder, split)
    if not by_split:
        raise UserError(
            f"{key}: folder {str(folder)!r} is no `save_to_disk` folder and has no file that ends "
            f"in {', '.join(sorted(_READERS))}"
        )
    _check_split(split, list(by_split), split_key, str(folder))
    return [row for file in by_split[split] for row in _read_file(file, key, columns)]


def _by_split(folder: Path, split: str | None = None) -> dict[str, list[Path]]:
    """The data files of a folder, by the split that their names say; `split` is one more name."""
    found = [p for p in sorted(folder.rglob("*")) if p.suffix in _READERS and p.is_file()]
    found = [p for p in found if not any(x.startswith(".") for x in p.relative_to(folder).parts)]
    # one format only: a folder of Parquet files often has a JSON file that describes them
    suffix = next((s for s in _READERS if any(p.suffix == s for p in found)), None)
    by_split: dict[str, list[Path]] = {}
    for file in found:
        if file.suffix == suffix:
            words = re.split(r"[\W_]+", str(file.relative_to(folder).with_suffix("")))
            own = next((w for w in words if w == split or w in _SPLITS), "train")
            by_split.setdefault(own, []).append(file)
    return by_split


def _load_saved(folder: Path, split: str, key: str, split_key: str) -> Any:
    """A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
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
        # asked first, because load_dataset tries for half a minute where there is no network
        HfApi().dataset_info(path, timeout=10)
    except RepositoryNotFoundError:
        raise UserError(
            f"{key}: given {path!r}, which is no file or folder here and no public dataset on the "
            "Hugging Face hub"
        ) from None
    except Exception:  # of whatever HTTP library: the cache may still have it
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
    """Let `datasets` look in its cache alone."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _first_rows(dataset: Any, limit: int | None, columns: Sequence[str] | None = None) -> list[Row]:
    if columns is not None:  # what nobody reads can be most of the data
        dataset = dataset.select_columns([c for c in columns if c in dataset.column_names])
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return dataset.to_list()
