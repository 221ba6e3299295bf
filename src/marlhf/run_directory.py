"""The folder a run writes: resolved config, metrics, samples, TensorBoard events."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from marlhf.config import MetricsSettings
from marlhf.config_loading import config_to_dict
from marlhf.errors import UserError
from marlhf.metrics import JsonLines, ProgressBar, TensorBoard, WandB

_OWN_FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "tensorboard", "final")


class RunDirectory:
    """Claims `folder` for one run; every write is a no-op on ranks other than the main one.

    Raises UserError when the folder holds another run, unless `overwrite`: then `open` deletes that
    run's own files and nothing else. Nothing is deleted before, as the new run may yet be refused.
    """

    def __init__(
        self, folder: str | Path, overwrite: bool, log: MetricsSettings, is_main: bool
    ) -> None:
        self.path = Path(folder).expanduser()
        self._log = log
        self._is_main = is_main
        self._is_new = True
        self._sinks: list[Any] = []
        self._samples: JsonLines | None = None
        if not is_main:
            return
        if (self.path / "metrics.jsonl").exists() and not overwrite:
            raise UserError(
                f"output_dir: {str(folder)!r} already holds a run; choose another, or "
                "set overwrite=true to delete it"
            )
        if log.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError("log.wandb: needs: pip install 'marlhf[wandb]'")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except FileExistsError:
            raise UserError(f"output_dir: given {str(folder)!r}, which is a file") from None
        except OSError as error:
            raise UserError(f"output_dir: cannot write {str(folder)!r}: {error.strerror}") from None

    def open(self, config: Any, steps: int) -> None:
        """Write the resolved configuration and open the sinks; again, after `close`, appends."""
        if not self._is_main or self._sinks:
            return
        if self._is_new:
            self._delete_old()
        self._is_new = False
        plain = config_to_dict(config)
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        (self.path / "config.yaml").write_text(text, encoding="utf-8")
        self._samples = JsonLines(self.path / "samples.jsonl")
        self._sinks.append(JsonLines(self.path / "metrics.jsonl"))
        if self._log.tensorboard:
            self._sinks.append(TensorBoard(self.path / "tensorboard"))
        if self._log.wandb:
            self._sinks.append(WandB(self.path, plain))
        if self._log.progress:
            self._sinks.append(ProgressBar(steps))

    def _delete_old(self) -> None:
        for name in _OWN_FILES:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def write(self, row: Mapping[str, Any]) -> None:
        """Send one row of metrics to every sink."""
        for sink in self._sinks:
            sink.write(row)

    def write_sample(self, sample: Mapping[str, Any]) -> None:
        """Append one response to samples.jsonl."""
        if self._samples is not None:
            self._samples.write(sample)

    def close(self) -> None:
        """Close what `open` opened."""
        for sink in self._sinks:
            sink.close()
        if self._samples is not None:
            self._samples.close()
        self._sinks, self._samples = [], None
