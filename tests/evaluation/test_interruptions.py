"""Evaluations that are stopped from outside, or whose folder holds what is no file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support import warm_python
from support.evaluations import build_models, config_for, lines_of, results_of

from marlhf.common.errors import UserError
from marlhf.config.loading import config_to_dict
from marlhf.models import loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_one_batch_at_most(
    number: signal.Signals, folder: Path, tmp_path: Path
) -> None:
    """In a process of its own, as a signal would also hit pytest."""
    changes = {"rollout": {"responses_per_prompt": 10, "batch_size": 4}}
    expected = results_of(folder, **changes)
    text = yaml.safe_dump(
        config_to_dict(config_for(folder, output_dir=str(tmp_path / "out"), **changes))
    )
    (tmp_path / "e.yaml").write_text(text)
    program = (  # what runs in the background ignores Ctrl-C
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path[:0] = {sys.path!r}\n"
        f"from marlhf.cli import main; main(['evaluate', {str(tmp_path / 'e.yaml')!r}])"
    )
    process = subprocess.Popen(
        [warm_python.command(), "-c", program], stderr=subprocess.PIPE, text=True
    )
    samples, end = tmp_path / "out" / "samples.jsonl", time.monotonic() + 60
    while not samples.exists() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in error
    before = lines_of(tmp_path, "samples")
    assert 0 < len(before) < len(lines_of(folder, "samples"))
    assert len(before) % 4 == 0
    assert results_of(folder, output_dir=str(tmp_path / "out"), **changes) == expected
    assert lines_of(tmp_path, "samples")[: len(before)] == before


@pytest.mark.parametrize("name", ["samples.jsonl", "results.json", "raters_key.jsonl"])
def test_a_pipe_where_a_file_belongs_is_refused(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening it would wait for a writer that never comes; no model is loaded for that."""
    os.mkfifo(tmp_path / name)
    monkeypatch.setattr(loading, "load_policy", None)
    with pytest.raises(UserError, match=f"{name}' is not a file; move it away"):
        results_of(folder, output_dir=str(tmp_path), baseline="b", raters={"format": "csv"})
