"""A folder with a tiny model, data and a configuration that works; and `Refusals`, which runs the
command line on something that does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from marlhf.cli import main
from marlhf.common.errors import printable
from marlhf.models import loading
from support.tiny_models import (
    BYTES_VOCAB,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_sequence_classifier,
)

CONFIG = """\
model: {path: lm}
data: {path: data.jsonl, eval_rows: 0}
output_dir: run
steps: 1
segmenter: {name: ngram, n: 2}
reward: {models: {name: length, target: 3}}
rollout: {batch_size: 4, max_new_tokens: 5, max_prompt_length: 16}
log: {progress: false, tensorboard: false, eval_every: 0, samples: 0}
"""
FAULTY = """\
import torch
from marlhf import Segmenter

NUMBER = 3

class NeedsArguments:
    def __init__(self, size): ...
    def __call__(self, batch): return batch.response_mask

class RaisesWhenBuilt:
    def __init__(self): raise RuntimeError("no such disk")

class NotCallable: ...

def a_list(batch): return [True]
def other_shape(batch): return torch.zeros(2, 2, dtype=torch.bool)
def floats(batch): return batch.response_mask.float()
def no_start(batch): return torch.zeros_like(batch.response_mask)
def raises(batch): raise KeyError("clauses\\nof two lines")
def takes_nothing(): ...
def fine_starts(batch):
    starts = torch.zeros_like(batch.response_mask)
    starts[:, 0] = batch.response_mask[:, 0]
    return starts

class Slim(Segmenter):
    def starts(self, batch): return batch.entropy.mean(1, keepdim=True) > 0

class Forgets:
    def __call__(self, batch): return fine_starts(batch)
    def learn(self, responses): raise RuntimeError("what was it")

def fine(prompts, completions): return [0.0] * len(prompts)
def needs_answer(prompts, completions, answer): return [0.0] * len(prompts)
def by_place(responses, summary): return [0.0] * len(responses)
def too_few(prompts, completions): return [0.0]
def not_a_list(prompts, completions): return 1.0
def texts(prompts, completions): return ["good"] * len(prompts)
def nans(prompts, completions): return [float("nan")] * len(prompts)
def raises_on_b(prompts, completions):
    if any("b" in p for p in prompts): raise ValueError("no b,\\nplease")
    return [0.0] * len(prompts)
def leaves(*arguments): raise SystemExit(0)
def red(prompts, completions): raise ValueError("\x1b[31mred\x9b\x07\u202e")
def beyond_the_end(prompts, completions): return [[(99, 1.0)]] * len(prompts)

calls = 0
def fails_later(prompts, completions):
    global calls
    calls += 1
    if calls > 2: raise RuntimeError("service is down")
    return [0.0] * len(prompts)
"""


def build_world(folder: Path) -> Path:
    """`lm` and `rm` (a reward model), `data.jsonl`, `config.yaml`, and modules of plug-ins."""
    tokenizer = byte_tokenizer()
    models = {
        "lm": tiny_causal_lm("llama", BYTES_VOCAB),
        "small_lm": tiny_causal_lm("llama", 64),
        "rm": tiny_sequence_classifier("llama", BYTES_VOCAB),
        "small_rm": tiny_sequence_classifier("llama", 64),
        "other_rm": tiny_sequence_classifier("llama", 259),
        "labels_rm": tiny_sequence_classifier("llama", BYTES_VOCAB, num_labels=2),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"{letter} is a letter", "summary": letter} for letter in "abcdefgh"]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "faulty.py").write_text(FAULTY)
    (folder / "raises_on_import.py").write_text("raise OSError('the disk\\nis on fire')\n")
    (folder / "needs_missing.py").write_text("import a_package_that_is_not_there\n")
    (folder / "syntax_error.py").write_text("def f(:\n")
    (folder / "exits.py").write_text("raise SystemExit(0)\n")
    (folder / "empty_folder").mkdir()
    return folder


class Refusals:
    """Runs the command line in this process and checks how it refuses."""

    def __init__(self, folder: Path, capfd: Any, monkeypatch: Any) -> None:
        self.folder = folder
        self.capfd = capfd
        self.monkeypatch = monkeypatch

    def __call__(self, *words: str, weights: bool = False) -> str:
        """The one line that `marlhf WORDS` says on its way out with status 2.

        weights: whether a model may be loaded first
        """
        if not weights:
            for auto in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
                auto_class = getattr(loading, auto)
                self.monkeypatch.setattr(auto_class, "from_pretrained", _weights_were_loaded)
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main(words)
        error = self.capfd.readouterr().err
        assert end.value.code == 2, error
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.startswith("marlhf: ")]
        assert len(lines) == 1, error
        assert error.endswith(lines[0] + "\n")
        if not weights:
            assert error == lines[0] + "\n", "something else is on the terminal"
            assert not (self.folder / "run" / "metrics.jsonl").exists()
        assert len(lines[0]) < 500
        assert lines[0] == printable(lines[0])
        assert "Input should" not in lines[0]
        return lines[0]

    def of(self, *overrides: str, weights: bool = False) -> str:
        """What `marlhf ppo config.yaml OVERRIDES` says."""
        return self("ppo", "config.yaml", *overrides, weights=weights)

    def copy(self, name: str, change: Callable[[Path], Any]) -> Path:
        """A copy of a model's folder with something changed in it."""
        copy = self.folder / f"changed_{name}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder / name, copy)
        change(copy)
        return copy


def _weights_were_loaded(*args: Any, **kwargs: Any) -> None:
    pytest.fail("weights were loaded before the fault was found")


def cases(table: str) -> Iterator[Any]:
    """Parameters from lines `input -> fragment & fragment` (inputs of several words: `a ;; b`)."""
    for line in table.strip().splitlines():
        words, arrow, fragments = line.partition(" -> ")
        assert arrow, line
        yield pytest.param(words.split(" ;; "), fragments.split(" & "), id=words)
