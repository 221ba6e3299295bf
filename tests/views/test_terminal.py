"""Macro actions as text, the plot, and the panel at the end of the quickstart."""

import builtins
import io
import json
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from marlhf.commands import quickstart
from marlhf.common.errors import UserError
from marlhf.views.terminal import (
    BeforeAfter,
    before_after_panel,
    colour_macro_actions,
    macro_pieces,
    plot_reward_kl,
    print_table,
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def terminal(**options):
    """A console that shows colour, whatever the tests run in."""
    defaults = {"force_terminal": True, "color_system": "truecolor", "no_color": False}
    return Console(file=io.StringIO(), width=80, **{**defaults, **options})


def pipe():
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def rendered(console, renderable):
    console.print(renderable)
    return console.file.getvalue()


# --- macro_pieces


@pytest.mark.parametrize(
    ("text", "offsets", "starts", "pieces"),
    [
        ("", [], [], []),
        ("", [(0, 0)], [True], [""]),
        ("abcdef", [(0, 2), (2, 3), (3, 6)], [True, False, True], ["abc", "def"]),
        ("abcdef", [(0, 2), (2, 3), (3, 6)], [True, True, True], ["ab", "c", "def"]),
        # Three tokens write one emoji; macro actions start at the first and at the last of them.
        ("a🙂b", [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [1, 1, 0, 1, 0], ["a", "🙂", "b"]),
        # The whole of a macro action lies inside a character that another has begun.
        ("🙂b", [(0, 1), (0, 1), (1, 2)], [1, 1, 1], ["🙂", "", "b"]),
        # EOS alone in a macro action, and a special token in the middle.
        ("ab", [(0, 2), (2, 2)], [1, 1], ["ab", ""]),
        ("ab", [(0, 1), (1, 1), (1, 2)], [1, 1, 0], ["a", "b"]),
        # Characters that no token claims stay with the macro action before them.
        ("a b", [(0, 1), (2, 3)], [1, 1], ["a ", "b"]),
        (" a", [(1, 2)], [1], [" a"]),
    ],
)
def test_pieces_are_the_characters_of_each_macro_action(text, offsets, starts, pieces):
    assert macro_pieces(text, offsets, starts) == pieces


def test_pieces_need_a_start_and_a_flag_for_each_token():
    with pytest.raises(ValueError, match="no macro action starts"):
        macro_pieces("ab", [(0, 2)], [False])
    with pytest.raises(ValueError, match="zip"):
        macro_pieces("ab", [(0, 1), (1, 2)], [True])


@st.composite
def spans_and_starts(draw):
    """Spans as the tokenizer makes them: in order, some empty, some shared by several tokens."""
    spans = []
    position = 0
    for _ in range(draw(st.integers(1, 12))):
        length = draw(st.integers(0, 3))
        spans += [(position, position + length)] * draw(st.integers(1, 3))
        position += length
    starts = [
        True,
        *draw(st.lists(st.booleans(), min_size=len(spans) - 1, max_size=len(spans) - 1)),
    ]
    text = draw(st.text("ab 🙂\n", min_size=position, max_size=position))
    return text, spans, starts


@given(spans_and_starts())
def test_pieces_partition_the_text_by_the_first_token_of_each_character(case):
    text, spans, starts = case
    pieces = macro_pieces(text, spans, starts)
    assert "".join(pieces) == text
    # The oracle walks characters, not tokens.
    expected = [""] * sum(starts)
    for i, character in enumerate(text):
        first = next(t for t, (begin, end) in enumerate(spans) if begin <= i < end)
        expected[sum(starts[: first + 1]) - 1] += character
    assert pieces == expected


# --- colours


def test_neighbouring_macro_actions_differ_in_style():
    line = colour_macro_actions([" one", " two", "", " three"] * 4, terminal())
    assert line.plain == " one two three" * 4
    styles = [span.style for span in line.spans]
    assert len(styles) == 12
    assert all(a != b for a, b in pairwise(styles))


def test_without_colour_a_bar_separates_macro_actions(monkeypatch):
    assert colour_macro_actions(["a b", "", " c"], pipe()).plain == "a b| c"
    assert colour_macro_actions(["a b", " c"], terminal(no_color=True)).plain == "a b| c"
    monkeypatch.setenv("NO_COLOR", "1")
    assert colour_macro_actions(["a b", " c"]).plain == "a b| c"


@pytest.mark.parametrize("console", [terminal(), pipe()])
def test_line_breaks_are_seen_and_control_characters_do_nothing(console):
    line = colour_macro_actions(["a\r\n", "\nb\tc\x1b[2J[red]"], console)
    assert line.plain.replace("|", "") == "a⏎⏎b  c�[2J[red]"
    assert "[red]" in rendered(console, line)


# --- before and after


SAMPLES = [
    BeforeAfter("The soup [was]", [" cold and", " late"], [" warm\n", " and kind"], -0.25, 0.875),
    BeforeAfter("Monday", [], [" came"]),
]


def printed_table(*cells):
    console = pipe()
    print_table(console, ["before token", "truth", "critic", "bias", "error"], [cells, cells])
    return console.file.getvalue()


def test_intervals_of_a_table_fold_before_its_labels_are_cut():
    wide = "-0.038 [-0.075, -0.0077]"
    shown = printed_table("12-15", wide, "0.0020", wide, wide)
    assert max(map(len, shown.splitlines())) <= 80
    words = shown.split()
    assert {"before", "token", "truth", "critic"} <= set(words)
    assert words.count("12-15") == 2
    assert shown.count("[-0.075, -0.0077]") == 6
    assert wide not in shown


def test_long_labels_of_a_table_fold_beside_its_numbers():
    label, interval = "ppo.estimator=my_package.Group", "0.21 [0.13, 0.30]"
    shown = printed_table(label, interval, "0.0020", interval, "0.1")
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count(interval) == 4
    assert "ppo.estimator=my_" in shown
    assert "…" not in shown


def test_panel_shows_change_and_samples():
    before = {"eval_score_mean": 0.125, "eval_kl_mean": 0.0}
    after = {"eval_score_mean": 0.5, "eval_kl_mean": 7.25}
    console = pipe()
    lines = rendered(console, before_after_panel(before, after, SAMPLES, console)).splitlines()
    cells = [line.split() for line in lines]
    assert [c[-3:] for c in cells if c[:1] == ["score,"]] == [["0.125", "0.500", "+0.375"]]
    assert [c[-3:] for c in cells if c[:1] == ["KL"]] == [["0.000", "7.250", "+7.250"]]
    assert any("before   -0.250   The soup [was]| cold and| late" in line for line in lines)
    assert any("after     0.875   The soup [was]| warm⏎| and kind" in line for line in lines)
    assert any("–   Monday" in line for line in lines)


def test_panel_without_values_or_samples():
    console = pipe()
    nothing = {"eval_score_mean": None, "eval_kl_mean": float("nan")}
    shown = rendered(console, before_after_panel(nothing, {}, [], console))
    assert shown.count("–") == 6
    assert "Samples" not in shown


def test_panel_in_colour_has_no_bars():
    console = terminal()
    shown = rendered(console, before_after_panel({}, {}, SAMPLES, console))
    assert "|" not in shown
    assert "48;2;86;180;233m cold and" in shown


# --- the plot


def size(path):
    """Width and height that a PNG states."""
    header = path.read_bytes()[:24]
    assert header.startswith(PNG_SIGNATURE)
    return struct.unpack(">II", header[16:24])


GAPS = [
    {"step": 0, "eval_score_mean": 0.1, "eval_kl_mean": 0.0},
    {"step": 1, "score_mean": None, "kl_mean": float("nan")},
    {"step": 2, "score_mean": 0.3},
    {"score_mean": "?", "kl_mean": 2.0},
    {"step": 4, "score_mean": float("inf"), "kl_mean": True, "eval_score_mean": 0.4},
]


@pytest.mark.parametrize("metrics", [[], [{}], GAPS, GAPS[:1]], ids=len)
def test_plot_of_any_rows_is_a_png(metrics, tmp_path):
    path = tmp_path / "new" / "plot.png"
    plot_reward_kl(metrics, path, "title")
    assert size(path) == (900, 750)


def test_plot_draws_what_is_known_and_nothing_else(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    made = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: made.append(self))
    plot_reward_kl(GAPS, tmp_path / "plot.png", "title")
    drawn = [
        [tuple(zip(*line.get_data(), strict=True)) for line in axes.lines] for axes in made[0].axes
    ]
    assert drawn == [[((2, 0.3),), ((0, 0.1), (4, 0.4))], [((3, 2.0),), ((0, 0.0),)]]


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install marlhf\[demo\]"):
        plot_reward_kl([], tmp_path / "plot.png", "title")


def test_the_end_of_the_quickstart_shows_any_text(tmp_path):
    pytest.importorskip("matplotlib")
    metrics = [
        {"step": step, "eval_score_mean": 0.1 * step, "eval_kl_mean": 0.0} for step in (0, 2)
    ]
    sample = {"row": 0, "held_out": True, "prompt": "Say", "score": 0.5}
    samples = [
        {**sample, "step": 0, "macro_actions": ["before"]},
        {**sample, "step": 2, "macro_actions": ["one\u2028two", "\x85"]},
    ]
    for name, rows in (("metrics", metrics), ("samples", samples)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    console = Console(file=io.StringIO(), width=100)
    quickstart.show(tmp_path, console)
    assert "before" in console.file.getvalue()
    assert "two|" in console.file.getvalue()
