"""`marlhf segment`: macro actions of texts, shown in the terminal or as a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from marlhf.common.errors import Parser, UserError, at_least_one, say
from marlhf.common.paths import model_path, text_file
from marlhf.common.registry import spec_label
from marlhf.config.yaml_text import parse_yaml
from marlhf.views.html_page import write_page
from marlhf.views.inspector import segment_texts, show
from marlhf.views.inspector_page import inspector_page


def main(words: Sequence[str]) -> None:
    """Show macro actions in the terminal, or write an HTML page."""
    options = _parse(words)
    specs = [parse_yaml(spec, "--segmenter") for spec in options.segmenter or ["ngram"]]
    source = options.tokenizer or options.model
    if not source:
        raise UserError(
            "segment: --tokenizer is missing: macro actions are made of tokens; name the policy "
            "(hub name or directory) whose tokenizer to use"
        )
    texts, prompts = _read(options)

    from marlhf.config import ModelSettings
    from marlhf.models.loading import load_tokenizer
    from marlhf.segmenters import build_segmenter

    segmenters = [build_segmenter(spec) for spec in specs]
    key = "--tokenizer" if options.tokenizer else "--model"
    model_path(source, key)
    tokenizer = load_tokenizer(ModelSettings(path=source), key)
    segmented = segment_texts(texts, segmenters, tokenizer, options.model, prompts)
    labels = [spec_label(spec) for spec in specs]
    if options.html is None:
        show(segmented, labels, Console())
        return
    path = write_page(options.html, inspector_page(segmented, labels), "--html")
    say(f"Wrote {path}", sys.stdout)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="marlhf segment",
        description="Show where macro actions start, for one or several segmenters side by side.",
        epilog="example: marlhf segment 'One, two. Three!' --tokenizer HuggingFaceTB/"
        "SmolLM2-135M-Instruct --segmenter '{name: ngram, n: 3}' --segmenter sentence",
    )
    add = parser.add_argument
    add("text", nargs="?", help="the text; without any source it is read from standard input")
    add("--file", metavar="PATH", help="the text of a file")
    add(
        "--data",
        metavar="PATH",
        help="a column of a dataset: JSONL, JSON, CSV, Parquet, saved dataset, hub name",
    )
    add("--column", metavar="NAME", help="the column with the texts")
    add("--rows", type=at_least_one, default=8, metavar="N", help="first rows only (default: 8)")
    add("--split", default="train", help="split of the dataset (default: train)")
    add(
        "--segmenter",
        action="append",
        metavar="SPEC",
        help="as in a config: ngram, '{name: ngram, n: 3}', my_package.my_module.mine; give it "
        "several times to compare (default: ngram)",
    )
    add("--tokenizer", metavar="PATH", help="hub name or directory; default: that of --model")
    add(
        "--model",
        metavar="PATH",
        help="causal LM for the perplexity of each token, which the segmenter perplexity needs",
    )
    add("--prompt", help="prompt that the text answers, for the model")
    add("--prompt-column", metavar="NAME", help="the column with the prompts")
    add("--html", metavar="PATH", help="write a page instead")
    return parser.parse_args(list(words))


def _read(options: argparse.Namespace) -> tuple[list[str], list[str | None]]:
    """Texts and their prompts, from one source. Raises UserError."""
    sources = {"text": options.text, "--file": options.file, "--data": options.data}
    named_sources = [name for name, value in sources.items() if value is not None]
    if len(named_sources) > 1:
        raise UserError(f"segment: given {' and '.join(named_sources)}; give only one of them")
    for name, value in (("column", options.column), ("prompt-column", options.prompt_column)):
        if value is not None and options.data is None:
            raise UserError(f"segment: --{name} names a column of --data, which is not given")
    for name, value in (("prompt", options.prompt), ("prompt-column", options.prompt_column)):
        if value is not None and options.model is None:
            raise UserError(f"segment: --{name} is for a model to read; --model is not given")
    if options.data is not None:
        return _read_columns(options)
    text = options.text
    if options.file is not None:
        text = _read_file(text_file(options.file, "--file", streams=True))
    elif text is None:
        if sys.stdin.isatty():
            raise UserError("segment: no text; give one, or --file, or --data with --column")
        text = sys.stdin.buffer.read().decode("utf-8-sig", "replace")
    if any("\ud800" <= letter <= "\udfff" for letter in f"{text}{options.prompt or ''}"):
        raise UserError("segment: the text holds half of a character (bytes that are not UTF-8)")
    if not text:
        source = f" of {options.file!r}" if options.file else ""
        raise UserError(f"segment: the text{source} is empty")
    return [text], [options.prompt]


def _read_file(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"--file: {str(path)!r} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"--file: cannot read {str(path)!r}: {error.strerror}") from None


def _read_columns(options: argparse.Namespace) -> tuple[list[str], list[str | None]]:
    from marlhf.data.files import read_rows

    rows = read_rows(
        options.data, options.split, None, options.rows, key="--data", split_key="--split"
    )
    text_columns = [name for name, value in rows[0].items() if isinstance(value, str)]

    def column(key: str, name: str | None) -> list[str]:
        values = [row.get(name or "") for row in rows]
        texts = [value for value in values if isinstance(value, str)]
        if name is None or len(texts) < len(rows):
            fault = "is missing" if name is None else f"given {name!r}, which some row lacks"
            raise UserError(
                f"{key}: {fault}; columns with text: {', '.join(text_columns) or 'none'}"
            )
        return texts

    texts = column("--column", options.column)
    if options.prompt_column is None:
        return texts, [options.prompt] * len(rows)
    return texts, [*column("--prompt-column", options.prompt_column)]
