"""The example of a custom segmenter and those of the documentation, run as users run them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from support.responses import piece_batch, pieces
from support.tiny_models import BYTES_VOCAB, byte_tokenizer, tiny_causal_lm
from support.tokenizer_families import byte_level

from marlhf.segmenters import SEGMENTERS, build_segmenter, validate

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_segmenter.py"
PAGE = (EXAMPLE.parent.parent / "docs" / "segmenters.md").read_text(encoding="utf-8")


def run(*arguments: str) -> list[tuple[int, str]]:
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split(" tokens  ") for line in result.stdout.splitlines()]
    return [(int(count), ast.literal_eval(text)) for count, text in lines]


def test_clauses_of_the_sample_text():
    assert [text for _, text in run()] == [
        "When it rains,",
        " the streets are empty;",
        " nobody sings.\n",
        "Still,",
        " some of us dance:",
        " gladly 😀!",
    ]


def test_own_tokenizer_text_and_segmenter(tmp_path: Path):
    byte_level().save_pretrained(tmp_path)
    found = run("--tokenizer", str(tmp_path), "--text", "One two. Three", "--segmenter", "sentence")
    assert [text for _, text in found] == ["One two.", " Three"]
    assert sum(count for count, _ in found) == len(byte_level()("One two. Three").input_ids)


def test_the_command_finds_a_package_of_the_working_folder(tmp_path: Path):
    """The segmenter of the README, with the installed command, which Python starts elsewhere."""
    readme = (EXAMPLE.parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# my_package/segmenters.py.*?)```", readme, re.DOTALL)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "segmenters.py").write_text(code, encoding="utf-8")
    byte_tokenizer().save_pretrained(tmp_path)
    tiny_causal_lm("llama", BYTES_VOCAB).config.save_pretrained(tmp_path)
    command = [str(Path(sys.executable).with_name("marlhf")), "segment", "One, two; three"]
    result = subprocess.run(
        [*command, "--tokenizer", str(tmp_path), "--segmenter", "my_package.segmenters.clauses"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "One,| two;| three" in result.stdout


def test_segmenters_of_the_page_work():
    names: dict = {"__name__": "__main__"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    batch = piece_batch(["One", ",", " two", ";", " three"])
    assert pieces(validate(names["clauses"](batch), batch, "c"), batch) == [
        "One,",
        " two;",
        " three",
    ]
    assert pieces(names["pairs"](batch), batch) == ["One,", " two;", " three"]
    assert pieces(names["Clauses"](";")(batch), batch) == ["One, two;", " three"]
    logprobs = torch.tensor([[0.5, 0.5, 0.001, 0.5, 0.001]]).log()
    surprised = names["Surprise"]()(piece_batch(["a"] * 5, ref_logprobs=logprobs))
    assert surprised.tolist() == [[True, False, True, False, True]]


def test_yaml_and_table_of_the_page():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    specs = [yaml.safe_load(line)["segmenter"] for line in block.splitlines()]
    assert len(specs) == 6
    for spec in specs:
        if "my_package" not in str(spec):
            assert build_segmenter(spec)
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == set(SEGMENTERS.factories)
