"""`marlhf merge`: merge an adapter into its base, as one plain model."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from marlhf.common.errors import Parser, UserError, say
from marlhf.common.paths import model_path, writing


def main(words: Sequence[str]) -> None:
    """Run the command. Raises UserError."""
    parser = Parser(
        prog="marlhf merge", description="Merge an adapter into its base, and write the full model."
    )
    parser.add_argument("adapter", help="an adapter's folder, or a run that trained one")
    parser.add_argument("out", type=Path, help="where to write the model; must not exist")
    parser.add_argument(
        "--base", help="the base model, if it has moved since the adapter was trained"
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args(words)
    _check_new(options.out)
    if options.base is not None:
        model_path(options.base, "--base")
    merge(options.adapter, options.out, options.base, trust_remote_code=options.trust_remote_code)
    say(f"wrote {options.out}", sys.stdout)


def merge(
    adapter: str, out: Path, base: str | None = None, trust_remote_code: bool = False
) -> None:
    """Write the merged model and its tokenizer, as a plain `from_pretrained` directory.

    adapter   of a policy or reward model: its folder, or the run or `final/` that holds it
    base      the model it was trained on; default: the one the adapter names
    """
    from marlhf.config import ModelSettings
    from marlhf.models import adapters, loading
    from marlhf.runs import checkpoint
    from marlhf.runs.directory import only_writer

    out = model_path(out, "out")

    folder = find_adapter(adapter)
    config: Any = adapters.saved_adapter(folder)
    path = base or config.base_model_name_or_path
    if not path:
        raise UserError(f"adapter: {str(folder)!r} does not name its base; give --base")
    settings = ModelSettings(path=path, trust_remote_code=trust_remote_code)
    if config.task_type == "SEQ_CLS":
        classifier = replace(settings, path=str(folder))
        model: Any = loading.read_classifier(classifier, "adapter", base=path)
    else:
        lm_config = loading.load_model_config(settings, "base")
        model = adapters.merged(loading.read_causal_lm(settings, lm_config, "base"), folder)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer_path = str(folder) if has_tokenizer else path
    tokenizer = loading.load_tokenizer(replace(settings, path=tokenizer_path), "base")
    partial = model_path(f"{out}.partial", "out")
    with only_writer(partial, "out"):
        _check_new(out)  # another process may have finished it meanwhile
        try:
            with writing("out", partial):
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
                checkpoint.replace(partial, out)
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)  # frees space on a full disk
            raise


def _check_new(out: Path) -> None:
    if model_path(out, "out").exists():
        raise UserError(f"out: {str(out)!r} exists already; choose another")


def find_adapter(path: str) -> Path:
    """Find the folder of an adapter: `path`, or one in a run or its `final/`. Raises UserError."""
    root = model_path(path, "adapter")
    if not root.is_dir():
        raise UserError(f"adapter: given {path!r}, which is not a directory that exists")
    for prefix in ("", "adapter/*/", "final/adapter/*/"):
        configs = list(root.glob(f"{prefix}adapter_config.json"))
        if len(configs) == 1:
            return configs[0].parent
    raise UserError(
        f"adapter: {path!r} holds no adapter (adapter_config.json), nor does its final/adapter"
    )
