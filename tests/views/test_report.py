"""`marlhf report`: groups, bands and parity against plain formulas, the page in a real browser."""

from __future__ import annotations

import math
import re
import statistics
import struct
from pathlib import Path
from typing import Any

import pytest
from support.browser import browser, faults
from support.runs import tiny_trainer
from support.written_runs import learning, sample, some_runs, write_run

from marlhf.cli import main
from marlhf.common.errors import UserError
from marlhf.runs.alarms import RULES
from marlhf.views.charts import STYLES, marker
from marlhf.views.report.document import ADVICE, document
from marlhf.views.report.figures import frontier, macro_lengths, mean_line
from marlhf.views.report.groups import (
    Mean,
    choose_baseline,
    group_runs,
    parity,
    smoothed,
    target_of,
)
from marlhf.views.report.runs import Run, read_runs

# --- grouping


def test_seeds_are_grouped_and_configurations_named_by_what_varies(tmp_path):
    groups = group_runs(read_runs(some_runs(tmp_path)))
    assert [(g.label, len(g.runs)) for g in groups] == [("token", 3), ("ngram(n=5)", 3)]
    assert choose_baseline(groups, None).label == "token"
    assert choose_baseline(groups, "ngram(n=5)").label == "ngram(n=5)"
    assert choose_baseline(groups, "ngram-1").label == "ngram(n=5)"
    with pytest.raises(UserError, match=r"no group is called 'x'; possible: token; ngram"):
        choose_baseline(groups, "x")


def test_a_name_and_a_mapping_of_it_alone_are_the_same_segmenter(tmp_path):
    write_run(tmp_path / "a", learning(1), segmenter="token", seed=0)
    write_run(tmp_path / "b", learning(1), segmenter={"name": "token"}, seed=1)
    assert len(group_runs(read_runs([str(tmp_path)]))) == 1


def test_other_keys_tell_groups_apart(tmp_path):
    for i, (coef, how) in enumerate([(0.1, "sum"), (0.1, "mean"), (0.2, "sum")]):
        config = {"kl": {"coef": coef}, "macro": {"reward": how}, "segmenter": "ngram"}
        write_run(tmp_path / f"run{i}", learning(1), **config)
    labels = [g.label for g in group_runs(read_runs([str(tmp_path)]))]
    assert labels == [
        "kl.coef=0.1, macro.reward=sum",
        "kl.coef=0.1, macro.reward=mean",
        "kl.coef=0.2, macro.reward=sum",
    ]


def test_keys_of_another_version_and_runs_without_configuration(tmp_path):
    write_run(tmp_path / "new", learning(1), segmenter="token", ptx={"coef": 0.0})
    write_run(tmp_path / "old", learning(1), segmenter="token")
    write_run(tmp_path / "bare", learning(1))
    groups = group_runs(read_runs([str(tmp_path)]))
    assert sorted(len(g.runs) for g in groups) == [1, 2]
    assert {g.label for g in groups} == {"token", "bare"}


def test_a_key_that_one_run_lacks_still_tells_the_others_apart(tmp_path):
    """Beside a run of another version, or of another job, runs that differ are not averaged."""
    write_run(tmp_path / "a", learning(1), segmenter="token", kl={"coef": 0.1})
    write_run(tmp_path / "b", learning(1), segmenter="ngram", kl={"coef": 0.2})
    write_run(tmp_path / "old", learning(1), segmenter="token")
    write_run(tmp_path / "sft", learning(1), model={"path": "m"})
    groups = group_runs(read_runs([str(tmp_path)]))
    labels = [group.label for group in groups]
    assert labels == ["kl.coef=0.1, token", "kl.coef=0.2, ngram", "token", "sft"]
    assert "<td>–</td>" in document(groups, groups[0])


def test_keys_of_any_kind_are_compared(tmp_path):
    for name, last in (("a", 1), ("b", 2)):
        run = write_run(tmp_path / name, learning(1))
        (run / "config.yaml").write_text(
            f"kl.coef: {last}\n3: 4\nx: {{y: {{1: 2, 2024-01-01: 3}}}}\n"
        )
    groups = group_runs(read_runs([str(tmp_path)]))
    assert [group.label for group in groups] == ["kl.coef=1", "kl.coef=2"]
    assert "kl.coef" in document(groups, groups[0])


def test_a_sweeps_own_names_are_used(tmp_path):
    for arm in ("slow", "fast"):
        run = write_run(tmp_path / arm / "seed-0", learning(1), kl={"coef": len(arm) + ord(arm[0])})
        (run / "sweep.yaml").write_text(f"arm: {arm}\n")
    labels = {group.label for group in group_runs(read_runs([str(tmp_path)]))}
    assert labels == {"slow", "fast"}


def test_a_sweeps_own_names_are_used_beside_other_runs_too(tmp_path):
    for arm in ("slow", "fast"):
        config = {"kl": {"coef": len(arm) + ord(arm[0])}, "output": {"note": "x" * 80}}
        run = write_run(tmp_path / arm / "seed-0", learning(1), **config)
        (run / "sweep.yaml").write_text(f"arm: {arm}\n")
    write_run(tmp_path / "mine", learning(1), kl={"coef": 1}, output={"note": "y" * 80})
    labels = {group.label for group in group_runs(read_runs([str(tmp_path)]))}
    assert labels == {"slow", "fast", f"{tmp_path.name}/mine"}


# --- numbers


def test_mean_and_interval_against_tables():
    values = [1.0, 2.0, 4.0]
    mean = Mean.of(values)
    assert mean is not None
    assert mean.value == pytest.approx(7 / 3)
    assert mean.half == pytest.approx(4.303 * statistics.stdev(values) / math.sqrt(3), rel=1e-6)
    assert Mean.of([5.0]) == Mean(5.0, None, 1)
    assert Mean.of([]) is None


def test_the_interval_holds_the_truth_in_19_of_20_cases():
    """Ten thousand draws of five seeds of a normal; a z interval would hold it in only 88%."""
    import numpy as np

    draws = np.random.default_rng(0).normal(3, 2, (10_000, 5))
    found = [Mean.of(row) for row in draws]
    held = sum(abs(m.value - 3) <= m.half for m in found if m is not None and m.half is not None)
    assert held / len(draws) == pytest.approx(0.95, abs=0.01)


def test_lines_are_means_by_step_and_by_seconds(tmp_path):
    groups = group_runs(read_runs(some_runs(tmp_path)))
    line = mean_line(groups[1], "score_mean")
    assert line.x[:3] == [1, 2, 3]
    assert line.y[2] == pytest.approx(0.12 + 0.01)
    assert line.low is not None
    assert line.y[2] - line.low[2] == pytest.approx(4.303 * 0.01 / math.sqrt(3), rel=1e-6)
    assert mean_line(groups[1], "score_mean", seconds=True).x[:3] == [2, 4, 6]


@pytest.mark.parametrize(("key", "low"), [("response_length_mean", 0), ("reward_length_mean", -1)])
def test_bands_end_at_zero_where_nothing_is_less(key, low, tmp_path):
    for seed, value in enumerate([0.0, 0.1]):
        write_run(tmp_path / str(seed), [{"step": 1, key: value}], segmenter="token", seed=seed)
    (group,) = group_runs(read_runs([str(tmp_path)]))
    line = mean_line(group, key)
    assert line.low is not None
    assert math.ceil(line.low[0] - 0.5) == low


def test_long_runs_are_drawn_in_few_points_that_keep_the_mean(tmp_path):
    rows = [{"step": t, "score_mean": float(t % 7)} for t in range(1, 3001)]
    write_run(tmp_path / "long", rows)
    (group,) = group_runs(read_runs([str(tmp_path)]))
    line = mean_line(group, "score_mean")
    assert len(line.x) == 120
    assert line.x[-1] == 3000
    assert statistics.fmean(line.y) == pytest.approx(
        statistics.fmean(t % 7 for t in range(1, 3001))
    )


def test_smoothing_is_the_mean_of_the_last_five_evaluations():
    values = {2 * i: float(i**2) for i in range(8)}
    found = smoothed(values)
    assert list(found) == [8, 10, 12, 14]
    assert found[10] == pytest.approx((1 + 4 + 9 + 16 + 25) / 5)
    assert smoothed({1: 1.0, 2: 2.0}) == {}


def test_parity_against_the_definition(tmp_path):
    """Token rises by 0.02 a step and ends, over evaluations at 12, 14, ... 20, at 0.32 plus its
    noise, so at 0.33 on average over seeds. At 0.04 a step a run's smoothed reward, which lags by
    4 steps, passes that at the first even step from 4 + (0.33 - noise) / 0.04 on."""
    token, ngram = group_runs(read_runs(some_runs(tmp_path)))
    assert target_of(token) == pytest.approx(0.33)
    expected = [2 * math.ceil((4 + (0.33 - 0.01 * seed) / 0.04) / 2 - 1e-9) for seed in range(3)]
    found = parity(ngram, token)
    assert found is not None
    assert found.times == expected
    assert found.reached == 3
    assert found.median == statistics.median(expected)
    # of token's own runs the first ends short of the mean and counts with its last step
    own = parity(token, token)
    assert own is not None
    assert own.times[0] == math.inf
    assert own.reached == 2
    base = statistics.median([20, *own.times[1:]])
    assert found.ratio == pytest.approx(found.median / base)
    assert found.ratio_low is not None
    assert found.ratio_high is not None
    assert found.ratio_low <= found.ratio <= found.ratio_high
    seconds = parity(ngram, token, seconds=True)
    assert seconds is not None
    assert seconds.times == [2 * s for s in expected]


def test_runs_that_never_reach_parity_are_counted_as_such(tmp_path):
    for seed in range(4):
        fast = {"segmenter": "token", "seed": seed}
        slow = {"segmenter": "word", "seed": seed}
        write_run(tmp_path / f"token{seed}", learning(0.05, noise=0.001 * seed), **fast)
        write_run(tmp_path / f"word{seed}", learning(0.05 if seed == 0 else 0.01), **slow)
    token, word = group_runs(read_runs([str(tmp_path)]))
    found = parity(word, token)
    assert found is not None
    assert found.reached <= 1
    assert found.median == found.high == math.inf
    assert "never" in document([token, word], token)


def test_frontier_prefers_held_out_numbers(tmp_path):
    groups = group_runs(read_runs(some_runs(tmp_path)))
    chart = frontier(groups)
    assert chart is not None
    assert "held-out" in chart.title
    assert chart.lines[0].x[-1] == pytest.approx(2.0)
    assert chart.lines[0].y[-1] == pytest.approx(0.41)
    write_run(tmp_path / "no_eval", [{"step": 1, "score_mean": 1.0, "kl_mean": 2.0}])
    chart = frontier(group_runs(read_runs([str(tmp_path / "no_eval")])))
    assert chart is not None
    assert "training" in chart.title


def test_macro_lengths_are_counted_over_samples(tmp_path):
    groups = group_runs(read_runs(some_runs(tmp_path)))
    lengths, responses = macro_lengths(groups[0])
    assert responses == 3 * 8
    assert lengths == {1: 24, 2: 24, 3: 24}


def test_one_update_is_marked_as_a_whole_number(tmp_path):
    write_run(tmp_path / "run", [{"step": 1, "score_mean": 5.0}], segmenter="token")
    groups = group_runs(read_runs([str(tmp_path)]))
    html = document(groups, groups[0])
    assert ">1</text>" in html
    assert ">0.8</text>" not in html
    assert "token; 1 update." in html


def test_series_beyond_the_palette_have_marks_of_their_own():
    looks = {(i % STYLES, re.findall(r'd="([^"]*)"', marker(i, 0, 0))[0]) for i in range(64)}
    assert len(looks) == 64


# --- the page


def test_the_page_has_everything(tmp_path):
    groups = group_runs(read_runs(some_runs(tmp_path)))
    html = document(groups, choose_baseline(groups, None))
    headings = "Reward, KL and responses;Time and memory;Reward and KL;Lengths of macro actions"
    for heading in [*headings.split(";"), "to parity", "Samples before and after"]:
        assert heading in html
    assert not re.search(r"""(src|href)="(?!data:,)""", html)
    assert "<b>One</b>" not in html
    assert "&lt;b&gt;One&lt;/b&gt; two" in html
    assert html.count('class="band') >= 2
    # four prompts at most, of each of two groups, before and after, and the training responses
    assert html.count('class="a e0"') >= 2 * 2 * 3


def test_the_sign_of_an_advantage_stays_on_its_line(tmp_path):
    lines = {"macro_actions": ["one\n", "two", ""], "macro_advantages": [1.0, -1.0, 1.0]}
    samples = [sample(step, 0, **lines) for step in (0, 20)]
    write_run(tmp_path / "run", learning(0.1), samples, segmenter="line")
    groups = group_runs(read_runs([str(tmp_path)]))
    html = document(groups, groups[0])
    assert '>one⏎<sup class="sign">+</sup>\n</span>' in html
    assert '>two<sup class="sign">−</sup></span>' in html
    assert '>∅<sup class="sign">+</sup></span>' in html


def test_warning_signs_are_listed_with_advice(tmp_path):
    rows = [{"step": t, "clip_fraction": 0.5, "score_mean": 1.0} for t in range(1, 8)]
    write_run(tmp_path / "run", rows)
    groups = group_runs(read_runs([str(tmp_path)]))
    html = document(groups, groups[0])
    assert "Warning signs" in html
    assert ADVICE["clipping"] in html
    assert set(ADVICE) == set(RULES)


def test_pngs_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    main(["report", *some_runs(tmp_path), "--output", str(tmp_path / "out")])
    pngs = sorted((tmp_path / "out").glob("*.png"))
    names = {p.name for p in pngs}
    assert {"eval_score_mean.png", "eval_score_mean_by_seconds.png", "frontier.png",
            "macro_lengths.png", "kl_mean.png"} <= names  # fmt: skip
    for path in pngs:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert struct.unpack(">II", content[16:24]) == (960, 630)
    assert f"PNGs: {len(pngs)} in" in capsys.readouterr().out


def test_the_folder_of_a_run_is_no_place_for_a_report(tmp_path, capsys):
    (run,) = some_runs(tmp_path)[:1]
    before = sorted(Path(run).rglob("*"))
    with pytest.raises(SystemExit):
        main(["report", run, "--output", run])
    assert f"--output: {run!r} holds a training run; choose another" in capsys.readouterr().err
    assert sorted(Path(run).rglob("*")) == before


def test_without_matplotlib_there_is_still_a_page(tmp_path, capsys, monkeypatch):
    import builtins

    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    main(["report", *some_runs(tmp_path, seeds=1), "--output", str(tmp_path / "out")])
    assert "pip install 'marlhf[demo]'" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").is_file()


def test_pages_in_a_browser(tmp_path):
    """Many runs with long names, a single run, an empty one: no error, nothing too wide."""
    paths = some_runs(tmp_path / "many")
    long = write_run(
        tmp_path / ("a_name_without_end_" * 5),
        learning(0.01),
        [sample(s, r, prompt="x" * 900, macro_actions=["y" * 300, "<i>", "z"]) for s in (0, 20)
         for r in range(3)],
        segmenter={"name": "union", "of": ["ngram", {"name": "my.long.path.Segmenter", "n": 3}]},
        kl={"coef": 0.05},
    )  # fmt: skip
    empty = write_run(tmp_path / "empty", [])
    with browser() as page:
        for name, runs in {
            "many": [*paths, str(long)],
            "one": paths[:1],
            "none": [str(empty)],
        }.items():
            groups = group_runs(read_runs(runs))
            path = tmp_path / f"{name}.html"
            path.write_text(document(groups, groups[0]), encoding="utf-8")
            assert faults(page, path) == [], name
        page.open(tmp_path / "many.html", 1280)
        visible = "getComputedStyle(document.querySelector('svg.by-seconds')).display"
        assert page.evaluate(visible) == "none"
        page.evaluate("document.querySelector('button[data-axis=seconds]').click()")
        assert page.evaluate(visible) == "block"
        # a chart tells its values: held-out reward of the first chart at its right end
        page.evaluate(
            "(() => { const svg = document.querySelector('svg.by-seconds');"
            " const box = svg.getBoundingClientRect();"
            " svg.dispatchEvent(new PointerEvent('pointermove', {bubbles: true,"
            " clientX: box.right - 10, clientY: box.top + 20})); })()"
        )
        tip = page.evaluate("document.getElementById('tip').textContent")
        assert "seconds of updates: 40" in tip
        assert re.search(r"ngram\(n=5\).*: 0\.81", tip), tip
        assert page.messages == []


def test_a_real_run(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", steps=2, log={"eval_every": 1, "samples": 2})
    trainer.eval_prompts = list(trainer.stream.prompts[:3])
    trainer.train()
    main(["report", str(tmp_path / "run"), "--no-png"])
    html = (tmp_path / "run" / "report" / "report.html").read_text(encoding="utf-8")
    assert "before (update 0)" in html
    assert "after (update 2)" in html
    assert "--a:rgba(var(--good)" in html or "--a:rgba(var(--bad)" in html
    assert "cannot be read" not in html


# --- the palette


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    bright, dim = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_series_and_text_stand_out_from_their_background(theme):
    """WCAG 2.1: 3 for graphics, 4.5 for text."""
    css = (Path(__file__).parents[2] / "src/marlhf/views/assets/page.css").read_text()
    colours = dict(re.findall(r"--(\w+): (#\w{6})", css.split(":root {")[1 + theme].split("}")[0]))
    for background in ("paper", "card"):
        assert all(_contrast(colours[f"c{i}"], colours[background]) >= 3 for i in range(8))
        assert _contrast(colours["ink"], colours[background]) >= 7
        assert _contrast(colours["muted"], colours[background]) >= 4.5
    assert all(_contrast(colours["ink"], colours[f"h{i}"]) >= 4.5 for i in range(4))


def test_a_run_is_a_plain_record():
    run = Run("a", Path(), {}, [{"step": 1, "x": True, "y": 2, "z": float("nan")}], [])
    assert run.keys() == {"y"}
    assert run.values("x") == {}
