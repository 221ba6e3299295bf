"""The segmenter contract: what holds of every segmenter, the validator, and ways to name one."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nltk.tree import Tree
from support.responses import batch_of, piece_batch, sampled_ids
from support.strategies import fast
from support.tokenizer_families import FAMILIES, byte_level
from torch import Tensor

from marlhf.common.errors import UserError
from marlhf.common.types import ResponseBatch
from marlhf.segmenters import (
    SEGMENTERS,
    EntropyJump,
    Line,
    NGram,
    Parsing,
    Perplexity,
    Phrases,
    RandomNGram,
    Segmenter,
    Sentence,
    Sequence,
    Token,
    Union,
    Word,
    build_segmenter,
    close,
    from_lengths,
    from_text,
    segmenter_name,
    validate,
)


def halving_parser(text: str) -> Tree:
    words = text.split()
    middle = max(len(words) // 2, 1)
    return Tree("S", [Tree("A", words[:middle]), Tree("B", words[middle:])])


@from_text
def at_spaces(text: str) -> list[int]:
    return [at for at, char in enumerate(text) if char == " "]


@from_lengths
def fives(tokens: list[str]) -> list[int]:
    return [min(5, len(tokens) - at) for at in range(0, len(tokens), 5)]


def every_fourth(batch: ResponseBatch) -> Tensor:
    """A custom segmenter as a plain function; named by its import path below."""
    positions = torch.arange(batch.response_mask.shape[1])
    return (positions % 4 == 0) & batch.response_mask


BUILT_IN = [
    Token(),
    NGram(3),
    RandomNGram(),
    RandomNGram(lengths=(1, 4), seed=7),
    Sequence(),
    Perplexity(),
    Perplexity(logprobs="policy", shift=-1),
    Perplexity(shift=2),
    EntropyJump(0.3),
    Phrases(),
    Word(),
    Sentence(),
    Line(),
    Parsing(cutoff=4, parser=halving_parser),
    Union(of=(NGram(4), Sentence())),
]
EVERY = [
    *BUILT_IN,
    *(dataclasses.replace(segmenter, max_length=3) for segmenter in BUILT_IN),
    *(at_spaces, fives, every_fourth),
    from_text(lambda text: [len(text) // 2], max_length=2),
]


def label(segmenter) -> str:
    """A test id without addresses, the same in every worker."""
    return re.sub(r"<function (\w+).*?>", r"\1", segmenter_name(segmenter))


@st.composite
def batches(draw, padding: int | None = None) -> ResponseBatch:
    """Responses in any tokenizer family, empty ones among them, with NaN on padding."""
    tokenizer = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]()
    responses = draw(st.lists(sampled_ids(tokenizer), min_size=1, max_size=4))
    extra = draw(st.integers(0, 2)) if padding is None else padding
    batch = batch_of(tokenizer, responses, extra)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    noise = torch.randn(3, *batch.response_mask.shape, generator=generator).abs().neg()
    noise = noise.masked_fill(~batch.response_mask, math.nan)
    rows = draw(st.permutations(range(len(responses))))
    return dataclasses.replace(
        batch,
        logprobs=noise[0],
        ref_logprobs=noise[1],
        entropy=-noise[2],
        row_ids=torch.tensor(rows) + 5,
        step=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 3)),
    )


def rows_of(batch: ResponseBatch, order: list[int], padding: int = 0) -> ResponseBatch:
    """The same responses in another order, selection or width."""

    def take(x: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(x[order], (0, padding), value=fill)

    assert batch.logprobs is not None
    assert batch.ref_logprobs is not None
    assert batch.entropy is not None
    assert batch.row_ids is not None
    return dataclasses.replace(
        batch,
        token_ids=take(batch.token_ids, 3),
        response_mask=take(batch.response_mask, False),
        logprobs=take(batch.logprobs, -9.0),
        ref_logprobs=take(batch.ref_logprobs, 9.0),
        entropy=take(batch.entropy, 9.0),
        row_ids=batch.row_ids[order],
    )


@pytest.mark.parametrize("segmenter", EVERY, ids=label)
@fast
@given(batch=batches())
def test_starts_partition_every_response(segmenter, batch: ResponseBatch):
    starts = validate(segmenter(batch), batch, "it")
    for row, length in enumerate(batch.lengths):
        ids = (starts[row].cumsum(0) - 1)[:length].tolist()
        assert ids == sorted(ids)
        assert ids[:1] == [0][:length]
        assert not starts[row, length:].any()


@pytest.mark.parametrize("segmenter", EVERY, ids=label)
@fast
@given(batch=batches(), padding=st.integers(0, 3), data=st.data())
def test_a_response_is_cut_alike_in_any_batch(segmenter, batch: ResponseBatch, padding, data):
    """Whatever the padding, the order, and the rows beside it."""
    whole = segmenter(batch)
    order = data.draw(st.permutations(range(len(batch.lengths))))
    order = order[: data.draw(st.integers(1, len(order)))]
    part = segmenter(rows_of(batch, order, padding))
    assert part[:, : whole.shape[1]].equal(whole[order])


@pytest.mark.parametrize("segmenter", BUILT_IN, ids=label)
@fast
@given(batch=batches(), cap=st.integers(1, 4))
def test_max_length_splits_and_keeps_every_boundary(segmenter, batch: ResponseBatch, cap: int):
    free = segmenter(batch)
    capped = dataclasses.replace(segmenter, max_length=cap)(batch)
    for row, length in enumerate(batch.lengths):
        expected, since = [], 0
        for start in free[row, :length].tolist():
            since = 0 if start or since == cap else since
            expected.append(since == 0)
            since += 1
        assert capped[row, :length].tolist() == expected


@fast
@given(batch=batches(), data=st.data())
def test_union_is_a_boundary_of_either(batch: ResponseBatch, data):
    parts = data.draw(st.lists(st.sampled_from(EVERY), min_size=1, max_size=3))
    expected = torch.zeros_like(batch.response_mask)
    for part in parts:
        expected = expected | part(batch)
    assert Union(of=tuple(parts))(batch).equal(expected)


@pytest.mark.parametrize("segmenter", BUILT_IN, ids=label)
def test_built_in_segmenters_are_values(segmenter: Segmenter):
    assert hash(segmenter) == hash(dataclasses.replace(segmenter))
    assert pickle.loads(pickle.dumps(segmenter)) == segmenter
    with pytest.raises(dataclasses.FrozenInstanceError):
        segmenter.max_length = 2  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match="max_length: given 0"):
        dataclasses.replace(segmenter, max_length=0)


def starts_at(segmenter, length: int, **fields) -> list[int]:
    batch = dataclasses.replace(piece_batch(["x"] * length), **fields)
    return segmenter(batch)[0].nonzero().flatten().tolist()


def test_counts_by_hand():
    assert starts_at(Token(), 3) == [0, 1, 2]
    assert starts_at(Sequence(), 3) == [0]
    assert starts_at(NGram(), 12) == [0, 5, 10]
    assert starts_at(NGram(3), 6) == [0, 3]  # no empty macro action at the end
    assert starts_at(NGram(1), 3) == [0, 1, 2]
    assert starts_at(NGram(9), 3) == [0]
    assert starts_at(Sequence(max_length=2), 5) == [0, 2, 4]


def test_perplexity_by_hand():
    # ppl 2, 3, 1.5, 1.5, 4, 1, 2: it rises at tokens 1, 4 and 6; an equal one is no rise.
    logprobs = -torch.tensor([[2.0, 3.0, 1.5, 1.5, 4.0, 1.0, 2.0]]).log()
    assert starts_at(Perplexity(), 7, ref_logprobs=logprobs) == [0, 1, 4, 6]
    assert starts_at(Perplexity(shift=-1), 7, ref_logprobs=logprobs) == [0, 3, 5]
    assert starts_at(Perplexity(shift=1), 7, ref_logprobs=logprobs) == [0, 2, 5]
    assert starts_at(Perplexity(shift=-9), 7, ref_logprobs=logprobs) == [0]
    flat = torch.zeros(1, 7)
    assert starts_at(Perplexity("policy"), 7, logprobs=logprobs, ref_logprobs=flat) == [0, 1, 4, 6]


def test_perplexity_that_overflows_still_compares():
    logprobs = torch.tensor([[-1.0, -200.0, -300.0, -math.inf, -math.inf, -1.0]])
    assert starts_at(Perplexity(), 6, ref_logprobs=logprobs) == [0, 1, 2, 3]


def test_perplexity_ignores_the_token_after_the_end():
    """With shift -1 a rise on padding would put a boundary on the last response token."""
    batch = dataclasses.replace(
        piece_batch(["x"] * 3, padding=1), ref_logprobs=torch.tensor([[-1.0, -1.0, -1.0, -5.0]])
    )
    assert Perplexity(shift=-1)(batch).tolist() == [[True, False, False, False]]


def test_perplexity_needs_logprobs():
    with pytest.raises(UserError, match="the reference model's log-probabilities"):
        Perplexity()(piece_batch(["x"]))
    with pytest.raises(UserError, match="the policy's log-probabilities"):
        Perplexity(logprobs="policy")(piece_batch(["x"]))
    with pytest.raises(UserError, match="logprobs: given 'critic'"):
        Perplexity(logprobs="critic")  # pyright: ignore[reportArgumentType]


def random_lengths(segmenter: RandomNGram, row: int, step: int = 0, seed: int = 0) -> list[int]:
    fields = {"row_ids": torch.tensor([row]), "step": step, "seed": seed}
    starts = starts_at(segmenter, 400, **fields)
    return [b - a for a, b in itertools.pairwise(starts)]


def test_random_ngram_draws_every_length_and_no_other():
    lengths = random_lengths(RandomNGram(), row=0)
    assert set(lengths) == {2, 3, 5, 10}
    many = [n for row in range(40) for n in random_lengths(RandomNGram(), row)]
    for length in (2, 3, 5, 10):  # uniform: 0.25 each; 3 sd of 3000 draws is 0.024
        assert many.count(length) / len(many) == pytest.approx(0.25, abs=0.03)


def test_random_ngram_depends_on_seed_step_and_row_alone():
    base = random_lengths(RandomNGram(), row=3, step=2, seed=1)
    assert random_lengths(RandomNGram(), row=3, step=2, seed=1) == base
    others = [
        random_lengths(RandomNGram(), row=4, step=2, seed=1),
        random_lengths(RandomNGram(), row=3, step=3, seed=1),
        random_lengths(RandomNGram(), row=3, step=2, seed=2),
        random_lengths(RandomNGram(seed=1), row=3, step=2, seed=1),
        random_lengths(RandomNGram(), row=2, step=3, seed=1),
    ]
    assert base not in others
    assert len({tuple(lengths) for lengths in others}) >= 4
    torch.manual_seed(0)
    first = torch.rand(3)
    torch.manual_seed(0)
    random_lengths(RandomNGram(), row=0)
    assert torch.rand(3).equal(first)  # the global generator is left alone


def test_random_ngram_is_the_same_on_any_rank_layout():
    batch = dataclasses.replace(piece_batch(*[["x"] * 40] * 8), row_ids=torch.arange(8), step=5)
    whole = RandomNGram()(batch)
    for ranks in (2, 4):
        for rank in range(ranks):
            rows = torch.arange(rank, 8, ranks)
            part = dataclasses.replace(
                batch,
                token_ids=batch.token_ids[rows],
                response_mask=batch.response_mask[rows],
                row_ids=rows,
            )
            assert RandomNGram()(part).equal(whole[rows])


@pytest.mark.parametrize("lengths", [(), (0, 2), (-1,)])
def test_random_ngram_refuses_lengths(lengths):
    with pytest.raises(UserError, match="lengths"):
        RandomNGram(lengths=lengths)


def test_ngram_refuses_n():
    with pytest.raises(UserError, match="n: given 0"):
        NGram(0)


def test_close_leaves_its_argument_alone():
    starts = torch.tensor([[False, True, True]])
    mask = torch.tensor([[True, True, False]])
    assert close(starts, mask).tolist() == [[True, True, False]]
    assert starts.tolist() == [[False, True, True]]


def test_names_in_yaml():
    assert build_segmenter("token") == Token()
    assert build_segmenter({"name": "ngram", "n": 3, "max_length": 2}) == NGram(3, max_length=2)
    assert build_segmenter({"name": "random_ngram", "lengths": [1, 2]}) == RandomNGram((1, 2))
    assert build_segmenter({"name": "perplexity", "shift": -1}) == Perplexity(shift=-1)
    spec = {"name": "union", "of": [{"name": "ngram", "n": 5}, "sentence"]}
    assert build_segmenter(spec) == Union(of=(NGram(5), Sentence()))
    assert build_segmenter(f"{__name__}.every_fourth") is every_fourth
    assert build_segmenter(f"{__name__}.at_spaces") is at_spaces
    assert build_segmenter(every_fourth) is every_fourth
    for name in SEGMENTERS.factories:
        assert issubclass(SEGMENTERS.find(name), Segmenter)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ngrm", "did you mean 'ngram'"),
        ({"name": "ngram", "m": 3}, "ngram: given m; its parameters are n"),
        ({"name": "ngram", "n": "three"}, r"ngram.*n: given 'three'"),
        ({"name": "ngram", "n": 0}, "n: given 0"),
        ({"name": "perplexity", "logprobs": "critic"}, "logprobs: given 'critic'"),
        ({"n": 3}, "needs a `name`"),
        ("no_such_package.thing", "cannot import 'no_such_package.thing'"),
        ("marlhf.segmenters.nothing", "has no 'nothing'"),
        ({"name": "test_segmenters.every_fourth", "n": 3}, "takes no arguments; given n"),
        (5, "must be a name, a mapping or a callable"),
    ],
)
def test_a_bad_name_is_one_clear_error(spec, message: str):
    with pytest.raises(UserError, match=message) as error:
        build_segmenter(spec)
    assert "\n" not in str(error.value)


def test_registered_name(monkeypatch):
    monkeypatch.setattr(SEGMENTERS, "factories", dict(SEGMENTERS.factories))
    SEGMENTERS.register("fourths", f"{__name__}.every_fourth")
    assert build_segmenter("fourths") is every_fourth
    assert "fourths" in SEGMENTERS.names()


PLUG_IN = """
from marlhf.segmenters import from_lengths

@from_lengths
def pairs(tokens):
    return [2] * (len(tokens) // 2) + [1] * (len(tokens) % 2)
"""
USE = """
import torch
from marlhf.segmenters import SEGMENTERS, build_segmenter
from marlhf.common.types import ResponseBatch

class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return "x" * len(ids)

batch = ResponseBatch(torch.zeros(1, 5).long(), torch.ones(1, 5).bool(), tokenizer=Tokenizer())
for name in ("tiny_pairs", "tiny_plug_in.pairs"):
    print(build_segmenter(name)(batch)[0].int().tolist())
assert "tiny_pairs" in SEGMENTERS.names()
"""


def test_entry_point_on_the_path(tmp_path: Path, monkeypatch):
    (tmp_path / "tiny_plug_in_a.py").write_text(PLUG_IN)
    metadata = tmp_path / "tiny_plug_in_a-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tiny-plug-in-a\nVersion: 1.0\n"
    )
    (metadata / "entry_points.txt").write_text(
        "[marlhf.segmenters]\ntiny_pairs_a = tiny_plug_in_a:pairs\n"
    )
    with pytest.raises(UserError, match="no segmenter is called 'tiny_pairs_a'"):
        build_segmenter("tiny_pairs_a")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    segmenter = build_segmenter("tiny_pairs_a")
    assert starts_at(segmenter, 5) == [0, 2, 4]


def test_installed_package_is_found_by_name(tmp_path: Path):
    """A user's package, really installed by pip beside marlhf: no fork, no edit of the library."""
    if not all(map(importlib.util.find_spec, ("pip", "setuptools"))):
        pytest.skip("pip and setuptools build and install a tiny package")
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "tiny_plug_in.py").write_text(PLUG_IN)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "tiny-plug-in"\nversion = "1.0"\n'
        '[project.entry-points."marlhf.segmenters"]\ntiny_pairs = "tiny_plug_in:pairs"\n'
        '[tool.setuptools]\npy-modules = ["tiny_plug_in"]\n'
    )
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target"]
    install = [sys.executable, "-m", "pip", "install", *options, str(target), str(source)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    script = f"import sys; sys.path.insert(0, {str(target)!r})\n{USE}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[1, 0, 1, 0, 1]"] * 2


def test_text_segmenters_read_only_the_response():
    """Tokens on padding never reach the text."""
    tokenizer = byte_level()
    batch = batch_of(tokenizer, [tokenizer("One. Two.").input_ids], padding=3)
    noisy = batch.token_ids.masked_fill(~batch.response_mask, tokenizer("!").input_ids[0])
    assert Sentence()(dataclasses.replace(batch, token_ids=noisy)).equal(Sentence()(batch))
