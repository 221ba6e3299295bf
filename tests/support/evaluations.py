"""Tiny evaluations: models, data and a configuration in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from marlhf.config import EvaluateConfig
from marlhf.config.loading import config_from_dict, merge
from marlhf.evaluation.job import evaluate
from support.tiny_models import (
    BYTES_VOCAB,
    byte_tokenizer,
    tiny_causal_lm,
    tiny_sequence_classifier,
)

PROMPTS = ["ab", "hello there", "a longer prompt than the others", "x", "12", "one two"]


def build_models(folder: Path) -> Path:
    """Policies `a` and `b`, a run `run` with `b` in its `final`, a reward model `rm`, and data."""
    tokenizer = byte_tokenizer(add_bos=True)
    models = {
        "a": tiny_causal_lm("llama", BYTES_VOCAB, seed=0),
        "b": tiny_causal_lm("llama", BYTES_VOCAB, seed=1),
        "run/final": tiny_causal_lm("llama", BYTES_VOCAB, seed=1),
        "small": tiny_causal_lm("llama", 64),
        "other": tiny_causal_lm("llama", BYTES_VOCAB + 40),
        "rm": tiny_sequence_classifier("llama", BYTES_VOCAB),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": text, "summary": f"{text} aeiou"} for text in PROMPTS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_for(folder: Path, **changes: Any) -> EvaluateConfig:
    """Two policies, two responses of up to 9 tokens to each of six prompts, rewarded by length.

    Paths of models are names in `folder`; results go to `folder/out`.
    """
    values: dict[str, Any] = {
        "policies": {"a": str(folder / "a"), "b": str(folder / "b")},
        "data": {"path": str(folder / "data.jsonl"), "eval_rows": 0},
        "rollout": {"responses_per_prompt": 2, "max_new_tokens": 9, "batch_size": 5},
        "rewards": [{"name": "length", "target": 9, "unit": "characters"}],
        "resamples": 200,
        "output_dir": str(folder / "out"),
    }
    return config_from_dict(EvaluateConfig, merge(values, changes))


def results_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """Evaluate, and read what is on disk."""
    config = config_for(folder, **changes)
    returned = evaluate(config)
    on_disk = json.loads((Path(config.output_dir) / "results.json").read_text())
    assert on_disk == json.loads(json.dumps(returned))
    return on_disk


def lines_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Records of `out/NAME.jsonl`."""
    text = (folder / "out" / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n")[:-1]]
