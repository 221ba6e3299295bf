"""`marlhf segment`: what it shows, what it refuses, and the page it writes."""

from __future__ import annotations

import io
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.browser import browser, faults
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm

from marlhf.cli import main
from marlhf.segmenters import NGram, Perplexity, RandomNGram, Sentence, Sequence, Union, Word
from marlhf.views.inspector import segment_texts, show, summarise
from marlhf.views.inspector_page import inspector_page

TEXT = "One two, three. Four 🙂\nfive!"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    tiny_causal_lm("llama", BYTES_VOCAB).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def refusal(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["segment", *words])
    error = capsys.readouterr().err
    assert end.value.code == 2, error
    assert error.count("\n") == 1
    return error


def test_macro_actions_in_the_terminal(lm, capsys):
    main(["segment", "abc def", "--tokenizer", str(lm), "--segmenter", "{name: ngram, n: 3}"])
    out = capsys.readouterr().out
    assert "abc| de|f" in out
    assert "ngram(n=3)" in out
    assert re.search(r"ngram\(n=3\)\s+3\s+2\.33\s+3\s", out)


def test_several_segmenters_stand_side_by_side_where_there_is_room(lm):
    cut = segment_texts([TEXT], [Word(), Sentence()], byte_tokenizer())
    for width, beside in ((120, True), (50, False)):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        show(cut, ["word", "[sentence]"], console)
        lines = console.file.getvalue().splitlines()
        heading = next(line for line in lines if "word" in line)
        assert ("[sentence]" in heading) == beside


def test_every_source_of_texts(lm, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("ab\ncd", encoding="utf-8")
    rows = [{"id": 1, "reply": "ab cd"}, {"id": 2, "reply": "ef"}, {"id": 3, "reply": "gh"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    common = ["--tokenizer", str(lm), "--segmenter", "word"]
    main(["segment", "--file", str(tmp_path / "text.txt"), "--segmenter", "line", *common[:2]])
    assert "ab⏎\n|cd" in capsys.readouterr().out
    main(["segment", "--data", str(tmp_path / "rows.jsonl"), "--column", "reply", "--rows", "2",
          *common])  # fmt: skip
    out = capsys.readouterr().out
    assert "text 2 of 2" in out
    assert "gh" not in out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"uv wx")))
    main(["segment", *common])
    assert "uv| wx" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("ab", encoding="utf-8-sig")  # as Windows writes it
    main(["segment", "--file", str(tmp_path / "text.txt"), *common[:2]])
    assert "2 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["text"], "--tokenizer is missing"),
        (["text", "--tokenizer", "./nowhere"], "--tokenizer: given './nowhere', which does not"),
        (["text", "--tokenizer", "LM", "--segmenter", "ngrm"], "did you mean 'ngram'"),
        (["text", "--tokenizer", "LM", "--segmenter", "{name: ngram, n: 0}"], "n"),
        (["text", "--tokenizer", "LM", "--segmenter", "3"], "given 3, must be a name"),
        (["text", "--tokenizer", "LM", "--segmenter", "{name: ["], "not valid YAML"),
        (["text", "--tokenizer", "LM", "--segmenter", "perplexity"], "log-probabilities"),
        (["text", "--file", "x", "--tokenizer", "LM"], "text and --file"),
        (["--file", "nowhere.txt", "--tokenizer", "LM"], "nowhere.txt"),
        (["", "--tokenizer", "LM"], "empty"),
        (["text", "--column", "a", "--tokenizer", "LM"], "--data"),
        (["--data", "ROWS", "--tokenizer", "LM"], "columns with text: reply"),
        (["--data", "ROWS", "--column", "id", "--tokenizer", "LM"], "given 'id'"),
        (["--data", "ROWS", "--column", "reply", "--rows", "0", "--tokenizer", "LM"], "at least 1"),
        (["--data", "ROWS", "--rows", "x", "--tokenizer", "LM"], "given x, must be a whole number"),
        (["text", "--model", "LM", "--prompt", "x" * 300], "takes 256 tokens"),
        (["text", "--model", ""], "--tokenizer is missing"),
        (["text", "--tokenizer", "LM", "--prompt", "x"], "--model is not given"),
        (
            [
                "--data",
                "ROWS",
                "--column",
                "reply",
                "--prompt-column",
                "reply",
                "--tokenizer",
                "LM",
            ],
            "--model is not given",
        ),
        (["text", "--tokenizer", "LM", "--html", "/dev/null/page.html"], "--html: cannot write"),
        (["text", "--tokeniser", "LM"], "unrecognized"),
    ],
)
def test_bad_input_is_one_line(words, says, lm, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": 1, "reply": "ab"}) + "\n")
    words = [{"LM": str(lm), "ROWS": str(rows)}.get(word, word) for word in words]
    assert says in refusal(capsys, *words)


def test_perplexity_is_that_of_transformers(lm):
    """Our path goes over backbone and head; the model's own loss is the oracle."""
    tokenizer, model = byte_tokenizer(), tiny_causal_lm("llama", BYTES_VOCAB)
    (cut,) = segment_texts([TEXT], [Perplexity()], tokenizer, str(lm), ["Say: "])
    context = tokenizer("Say: ").input_ids
    ids = torch.tensor([[*context, *tokenizer(TEXT).input_ids]])
    labels = ids.clone()
    labels[:, : len(context)] = -100
    loss = float(model(input_ids=ids, labels=labels).loss)
    assert -sum(cut.logprobs) / len(cut.logprobs) == pytest.approx(loss, rel=1e-5)
    rises = [b < a for a, b in zip(cut.logprobs, cut.logprobs[1:], strict=False)]
    assert cut.starts[0] == [True, *rises]


def test_without_a_prompt_the_text_begins_after_the_first_token_of_a_text(lm):
    tokenizer = byte_tokenizer()
    (alone,) = segment_texts(["abc"], [], tokenizer, str(lm))
    (after,) = segment_texts(["abc"], [], tokenizer, str(lm), ["<s>"])
    (other,) = segment_texts(["abc"], [], tokenizer, str(lm), ["?"])
    assert alone.logprobs == after.logprobs != other.logprobs


def test_pieces_and_macro_actions_add_up_to_the_text():
    segmenters = [NGram(4), RandomNGram(), Word(), Sequence(), Union(of=("ngram", "word"))]
    for item in segment_texts([TEXT, "", "x"], segmenters, byte_tokenizer()):
        for i in range(len(segmenters)):
            ranges = item.macro_actions(i)
            assert [t for tokens in ranges for t in tokens] == list(range(len(item.ids)))
            assert "".join(map(item.written, ranges)) == "".join(item.pieces)
    cut = segment_texts([TEXT], [NGram(4)], byte_tokenizer())
    count = len(TEXT.encode())
    lengths = summarise(cut, 0).lengths
    assert lengths == {4: count // 4} | ({count % 4: 1} if count % 4 else {})


def test_a_page_of_text_is_no_wait():
    text = " ".join(f"Sentence number {i} goes on, and on; then it ends." for i in range(80))
    segmenters = [NGram(5), Word(), Sentence(), Sequence()]
    began = time.perf_counter()
    cut = segment_texts([text], segmenters, byte_tokenizer())
    inspector_page(cut, ["a", "b", "c", "d"])
    assert len(cut[0].ids) > 3000
    assert time.perf_counter() - began < 60  # a guard against what is quadratic; usually 0.2


def test_the_page_holds_every_token_once_for_each_segmenter(lm):
    text = "<script>alert('x')</script> & <b>\x1b[31m\nnext"
    cut = segment_texts([text], [NGram(5), Word()], byte_tokenizer(), str(lm))
    html = inspector_page(cut, ["ngram", "<word>"])
    assert html.count('class="t"') == 2 * len(cut[0].ids)
    assert html.count('class="m ') == sum(map(sum, cut[0].starts))
    assert "alert('x')" not in html
    assert "<word>" not in html
    assert "\x1b" not in html
    assert not re.search(r"""(src|href)="(?!data:,)""", html)
    first = html.split('data-tip="')[1].split('"')[0].replace("&quot;", '"').replace("&#x27;", "'")
    assert f"perplexity {math.exp(-cut[0].logprobs[0]):.3g}" in json.loads(first)[-1]


def test_the_page_in_a_browser(lm, tmp_path):
    texts = ["A very" + "long" * 60 + "word. " + TEXT * 20, TEXT]
    cut = segment_texts(texts, [NGram(5), Sentence(), Word()], byte_tokenizer())
    path = tmp_path / "page.html"
    path.write_text(inspector_page(cut, ["ngram", "sentence", "word" * 40]), encoding="utf-8")
    with browser() as page:
        assert faults(page, path) == []
        page.open(path, 1280)
        point = "document.querySelector('.t').dispatchEvent(new PointerEvent('pointermove', "
        page.evaluate(point + "{bubbles: true, clientX: 50, clientY: 50}))")
        assert page.evaluate("document.getElementById('tip').hidden") is False
        assert "macro action 1, token 1 of" in page.evaluate(
            "document.getElementById('tip').textContent"
        )


def test_every_token_of_the_page_can_be_pointed_at():
    """Also the later bytes of a character, and a special token, which write nothing."""
    cut = segment_texts(["a🙂b</s>"], [NGram(5)], byte_tokenizer())
    tokens = re.findall(r'<span class="t"[^>]*>([^<]*)</span>', inspector_page(cut, ["ngram"]))
    assert tokens == ["a", "🙂", "∅", "∅", "∅", "b", "∅"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("<script>nothing.here()</script>", "console"),
        ("<p style='width: 2000px'>wide</p>", "too wide"),
        ("<style>body { background: red }</style>", "light and dark"),
    ],
)
def test_the_browser_finds_faults(fault, says, tmp_path):
    path = tmp_path / "page.html"
    theme = "<style>@media (prefers-color-scheme: dark) { body { background: #111 } }</style>"
    path.write_text(f"<!doctype html><meta charset=utf-8>{theme}<p>Text</p>{fault}")
    with browser() as page:
        found = faults(page, path)
    assert found
    assert all(says in line for line in found)


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as end:
        main(["segment", "--help"])
    assert not end.value.code
    out = capsys.readouterr().out
    assert all(f"--{name}" in out for name in ("segmenter", "tokenizer", "model", "html", "data"))


def test_the_command_is_a_file_that_runs_elsewhere(lm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["segment", TEXT, "--model", str(lm), "--html", "new/folder/page.html"])
    assert "Wrote new/folder/page.html" in capsys.readouterr().out
    assert "perplexity" in Path("new/folder/page.html").read_text(encoding="utf-8")
