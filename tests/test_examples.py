"""The examples run as they are, on a tiny random model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_train_in_python(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(model)
    byte_tokenizer(add_bos=True).save_pretrained(model)
    script = [sys.executable, str(EXAMPLES / "train_in_python.py")]
    options = ["--model", str(model), "--steps", "2", "--output", str(tmp_path / "run")]
    done = subprocess.run([*script, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
