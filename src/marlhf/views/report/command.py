"""`marlhf report RUN [RUN ...]`: a self-contained page about runs, and charts as PNGs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from marlhf.common.errors import Parser, UserError, say
from marlhf.common.paths import local_path, writing


def main(words: Sequence[str]) -> None:
    """Write the report and print its path. Raises UserError."""
    options = _parse(words)
    from marlhf.runs.directory import check_no_run
    from marlhf.views.html_page import write_page
    from marlhf.views.report.document import document
    from marlhf.views.report.groups import choose_baseline, group_runs
    from marlhf.views.report.png import write_pngs
    from marlhf.views.report.runs import read_runs

    if options.output is not None:
        check_no_run(local_path(options.output, "--output"), "--output")
    groups = group_runs(read_runs(options.runs))
    baseline = choose_baseline(groups, options.baseline)
    folder = _folder(options)
    path = write_page(folder / "report.html", document(groups, baseline), "--output")
    for group in groups:
        for run in group.runs:
            for note in run.notes:
                say(f"{run.name}: {note}", sys.stdout)
    say(f"Report: {path}", sys.stdout)
    if not options.no_png:
        with writing("--output", folder):
            try:
                say(f"PNGs: {len(write_pngs(groups, folder))} in {folder}", sys.stdout)
            except UserError as error:
                say(error, sys.stdout)


def _folder(options: argparse.Namespace) -> Path:
    if options.output is not None:
        return local_path(options.output, "--output")
    return (
        Path(options.runs[0]).expanduser() / "report" if len(options.runs) == 1 else Path("report")
    )


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="marlhf report",
        description="One HTML page, with nothing to load from anywhere, about one run or several: "
        "curves, reward against KL, macro actions, samples before and after, updates to parity. "
        "Runs that differ in seed alone are averaged.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="output_dir of a run, or a folder of such (a sweep)")
    add("--output", metavar="FOLDER", help="where to write; default: RUN/report, or ./report")
    add(
        "--baseline",
        metavar="NAME",
        help="configuration that others are compared with, as the report calls it, or one of its "
        "runs; default: the one of token-level PPO, or else the first",
    )
    add("--no-png", action="store_true", help="write the page alone")
    return parser.parse_args(list(words))
