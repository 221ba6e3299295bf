"""Win rates by a judge: both orders, nonsense, caches, caps, and a server that goes away."""

from __future__ import annotations

import io
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from support.evaluations import build_models, lines_of, results_of
from support.judge_server import Answer, judge_server, says

from marlhf.common.errors import UserError
from marlhf.config import JudgeSettings
from marlhf.config.evaluate import EvaluateConfig
from marlhf.config.loading import config_from_dict
from marlhf.evaluation import endpoint, win_rates
from marlhf.evaluation.judge import Judge, ResponsePair, judge_messages, verdict
from marlhf.evaluation.records import Records

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("JUDGE_KEY", KEY)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Because.\nVerdict: A", "A"),
        ("verdict: b.", "B"),
        ("Both are fine.\n\n**Verdict: tie**\n", "tie"),
        ("Verdict: **B**", "B"),
        ("Verdict: Response A", "A"),
        ("A", "A"),
        (" 'Tie'. ", "tie"),
        ("Verdict: A\nOn second thoughts.\nVerdict: B", None),
        ("Verdict: A, B or tie", None),
        ("Verdict: A\nVerdict: B\nVerdict: tie", None),
        ("My verdict: A is better than B", None),
        ("A is better", None),
        ("Verdict: C", None),
        ("Verdict:", None),
        ("", None),
        ("I cannot judge that.", None),
        ("\n" * 100_000 + "Verdict: A", "A"),
    ],
)
def test_verdicts(answer, found):
    assert verdict(answer) == found


def test_every_task_has_its_own_prompt_and_braces_do_no_harm():
    tasks = ["general", "summarization", "dialogue", "question_answering"]
    systems = [judge_messages(task, "{x} %s", "{first}", "b")[0]["content"] for task in tasks]
    assert len(set(systems)) == 4
    user = judge_messages("general", "{x} %s", "{first}", "b")[1]["content"]
    assert "{x} %s" in user
    assert "<response_a>\n{first}\n</response_a>" in user


# -- on pairs ------------------------------------------------------------------------------------

PAIRS = [ResponsePair("p", i, f"prompt {i}", "o" * (i % 3), "t" * (i % 4)) for i in range(12)]


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """Responses A and B that the judge reads."""
    user = body["messages"][1]["content"]
    a, b = (re.search(rf"<response_{x}>\n(.*?)\n</response_{x}>", user, re.DOTALL) for x in "ab")
    assert a is not None
    assert b is not None
    return a[1], b[1]


def longer(body: dict[str, Any], count: int) -> Answer:
    a, b = map(len, shown(body))
    return says(f"Reasons.\nVerdict: {'tie' if a == b else 'A' if a > b else 'B'}")


def settings(url: str, **changes: Any) -> JudgeSettings:
    return JudgeSettings(url=url, **{"model": "m", "api_key_env": "JUDGE_KEY"} | changes)


def judged(tmp_path: Path, url: str, **changes: Any) -> tuple[dict[str, Any], str | None]:
    judge = Judge(settings(url, **changes), Records(tmp_path / "judgements.jsonl", ["key"]))
    notice = judge.ask(judge.open_questions(PAIRS), lambda futures, what: iter(futures))
    return judge.result(PAIRS, 200, 0), notice


def test_a_fair_judge_finds_what_is_so(tmp_path):
    with judge_server(longer) as server:
        found, notice = judged(tmp_path, server.url)
    assert notice is None
    outcomes = [
        (len(p.response) > len(p.baseline_response)) - (len(p.response) < len(p.baseline_response))
        for p in PAIRS
    ]
    assert (found["wins"], found["losses"]) == (outcomes.count(1), outcomes.count(-1))
    assert found["wins"] != found["losses"]
    assert found["rate"]["mean"] == pytest.approx((sum(outcomes) / 12 + 1) / 2)
    assert found["rate"]["low"] < found["rate"]["mean"] < found["rate"]["high"]
    assert found["identical"] == 1
    assert len(server.bodies) == 2 * 11
    assert found["invalid"] == found["unanswered"] == found["contradictory"] == 0


def test_a_liking_for_the_first_position_cancels(tmp_path):
    with judge_server(lambda body, count: says("Verdict: A")) as server:
        found, _ = judged(tmp_path, server.url)
    assert found["rate"]["mean"] == 0.5
    assert (found["contradictory"], found["ties"], found["first_position"]) == (11, 12, 1.0)


def test_a_half_decided_pair_counts_half_a_win(tmp_path):
    def answer(body, count):
        return says("Verdict: A" if shown(body)[0].startswith("o") else "Verdict: tie")

    with judge_server(answer) as server:
        found, _ = judged(tmp_path, server.url)
    decided = sum(bool(p.response) for p in PAIRS if not p.identical)
    assert found["rate"]["mean"] == pytest.approx((0.75 * decided + 0.5 * (12 - decided)) / 12)


def test_nonsense_is_asked_again_and_then_counted_as_invalid(tmp_path):
    def answer(body, count):
        hopeless = "prompt 5" in body["messages"][1]["content"]
        return says("Hm.") if hopeless or len(body["messages"]) == 2 else longer(body, count)

    with judge_server(answer) as server:
        found, notice = judged(tmp_path, server.url, reasks=2)
        assert notice is None
        assert found["invalid"] == 1
        assert found["rate"]["prompts"] == 11
        assert found["wins"] + found["ties"] + found["losses"] == 11
        assert len(server.bodies) == 2 * (2 * 10 + 3)
        again = [m["content"] for m in server.bodies[-1]["messages"][2:]]
        assert len(again) in (2, 4)
        assert again[0] == "Hm."
        assert "no verdict" in again[1]
        # what was asked often enough is not asked again, unless it is to be asked more often
        before = len(server.bodies)
        judged(tmp_path, server.url, reasks=2)
        assert len(server.bodies) == before
        judged(tmp_path, server.url, reasks=3)
        assert len(server.bodies) == before + 2 * 4


def test_answers_are_cached_by_all_that_matters(tmp_path):
    with judge_server(longer) as server:
        first, _ = judged(tmp_path, server.url)
        assert len(server.bodies) == 22
        assert judged(tmp_path, server.url + "/", concurrency=1, timeout_seconds=9.0)[0] == first
        assert len(server.bodies) == 22
        for count, change in enumerate(
            [{"task": "dialogue"}, {"model": "n"}, {"temperature": 1.0}, {"extra": {"seed": 1}}], 2
        ):
            judged(tmp_path, server.url, **change)
            assert len(server.bodies) == 22 * count
    with judge_server(longer) as other:
        judged(tmp_path, other.url)
        assert len(other.bodies) == 22


def test_a_half_written_answer_is_asked_again(tmp_path):
    with judge_server(longer) as server:
        first, _ = judged(tmp_path, server.url)
        path = tmp_path / "judgements.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        assert judged(tmp_path, server.url)[0] == first
        assert len(server.bodies) == 23


def test_what_fails_is_left_out_and_asked_the_next_time(tmp_path):
    down = [True]

    def answer(body, count):
        fails = down[0] and "prompt 5" in body["messages"][1]["content"]
        return Answer(status=500) if fails else longer(body, count)

    with judge_server(answer) as server:
        found, notice = judged(tmp_path, server.url, retries=1)
        assert notice is not None
        assert "2 requests failed" in notice
        assert "status 500" in notice
        assert (found["unanswered"], found["rate"]["prompts"]) == (1, 11)
        down[0] = False
        before = len(server.bodies)
        found, notice = judged(tmp_path, server.url)
        assert (notice, found["unanswered"], found["rate"]["prompts"]) == (None, 0, 12)
        assert len(server.bodies) == before + 2


def test_answers_on_their_way_when_it_is_interrupted_are_kept(tmp_path):
    def slow(body, count):
        answer = longer(body, count)
        answer.delay = 0.3 if count else 0.0
        return answer

    def interrupted(futures, what):
        yield futures[0]
        raise KeyboardInterrupt

    records = Records(tmp_path / "judgements.jsonl", ["key"])
    with judge_server(slow) as server:
        judge = Judge(settings(server.url, concurrency=4), records)
        with pytest.raises(KeyboardInterrupt):
            judge.ask(judge.open_questions(PAIRS), interrupted)
        assert len(server.bodies) == len(records.path.read_text().splitlines()) < 22


def test_the_estimate_knows_the_key_that_limits_answers(tmp_path):
    with judge_server(longer) as server:
        extra = {"max_tokens": None, "max_completion_tokens": 9000}
        judge = Judge(settings(server.url, extra=extra), Records(tmp_path / "j.jsonl", ["key"]))
    text = judge.estimate(judge.open_questions(PAIRS[:2]))
    assert "at most 18,000 to write" in text
    assert text.endswith("; each up to 2 times more while it gets no verdict")


def test_a_refusal_and_half_a_character_are_answers(tmp_path):
    refusal = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}

    def answer(body, count):
        if "prompt 5" in body["messages"][1]["content"]:
            return Answer({"choices": [{"message": refusal}]})
        return says("Cut: \ud83d\nVerdict: A")

    with judge_server(answer) as server:
        found, notice = judged(tmp_path, server.url, reasks=0)
        assert (notice, found["invalid"]) == (None, 1)
        assert judged(tmp_path, server.url, reasks=0)[0] == found
        assert len(server.bodies) == 22


def test_requests_are_concurrent_up_to_the_limit(tmp_path):
    def slow(body, count):
        answer = longer(body, count)
        answer.delay = 0.05
        return answer

    with judge_server(slow) as server:
        judged(tmp_path, server.url, concurrency=4)
    assert 2 <= server.most_at_once <= 4


def test_a_cap_leaves_whole_pairs(tmp_path):
    with judge_server(longer) as server:
        found, notice = judged(tmp_path, server.url, max_requests=6, concurrency=1)
        assert notice == "judge.max_requests=6 is reached"
        assert found["unanswered"] == 11 - 3
        assert found["rate"]["prompts"] == 4
        assert len(server.bodies) == 6


def test_a_wrong_key_stops_at_once(tmp_path):
    with judge_server(lambda body, count: Answer({"error": KEY}, status=401)) as server:
        with pytest.raises(UserError, match=r"judge.url: .*status 401") as end:
            judged(tmp_path, server.url, concurrency=2)
        assert KEY not in str(end.value)
        assert len(server.bodies) <= 5


# -- in an evaluation ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(models, tmp_path) -> Path:
    for item in models.iterdir():
        (tmp_path / item.name).symlink_to(item)
    return tmp_path


def judge_of(url: str, **changes: Any) -> dict[str, Any]:
    return {"url": url, "model": "m", "api_key_env": "JUDGE_KEY"} | changes


def test_a_judge_in_an_evaluation(folder, capfd, monkeypatch):
    asked_at: list[int] = []
    with judge_server(longer) as server:
        say = win_rates.say

        def watched(text: str) -> None:
            asked_at.append(len(server.bodies))
            say(text)

        monkeypatch.setattr(win_rates, "say", watched)
        judge = judge_of(server.url, price_in=1.0, price_out=2.0, limit=4)
        results = results_of(folder, judge=judge)
        count = len(server.bodies)
        again = results_of(folder, judge=judge)
        assert len(server.bodies) == count == 8
    assert again == results
    first = {
        (x["policy"], x["row"]): x["response"]
        for x in lines_of(folder, "samples")
        if x["sample"] == 0
    }
    wins = sum(len(first["b", i]) > len(first["a", i]) for i in range(4))
    found = results["comparisons"][0]["win_rates"]["judge"]
    assert found["wins"] == wins
    assert found["rate"]["prompts"] == 4
    assert results["judge"]["answers"] == 8
    assert results["judge"]["cost"] > 0
    out, error = capfd.readouterr()
    assert asked_at == [0]
    assert re.search(r"judge m: 8 requests, about [\d,]+ tokens to read and at most 4,096", error)
    assert "at most about 0.0" in error
    assert "judge" in out
    written = [p.read_text() for p in (folder / "out").iterdir()]
    assert not any(KEY in text for text in [out, error, *written])


def test_whoever_is_at_the_terminal_may_say_no(folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer, requests in (("n\n", 0), ("\n", 0), ("", 0), ("y\n", 12)):
        with judge_server(longer) as server, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", Terminal(answer))
            patch.setattr("sys.stderr", Terminal())
            results = results_of(folder, judge=judge_of(server.url))
            assert len(server.bodies) == requests
        found = results["comparisons"][0]["win_rates"]["judge"]
        assert (found["unanswered"] == 0) == (requests > 0)
        assert (found["rate"] is None) == (requests == 0)


def test_a_server_that_goes_away_costs_nothing_that_was_known(folder):
    before = results_of(folder)

    def leaves(body, count):
        return longer(body, count) if count < 4 else Answer(status=503)

    with judge_server(leaves) as server:
        judge = judge_of(server.url, retries=1, concurrency=1)
        with pytest.raises(UserError, match=r"gives no answers: status 503.*run again to resume"):
            results_of(folder, judge=judge)
        assert len(lines_of(folder, "judgements")) == 4
        server.answer = longer
        count = len(server.bodies)
        results = results_of(folder, judge=judge)
        assert len(server.bodies) == count + 8
    assert results["policies"] == before["policies"]
    assert results["comparisons"][0]["win_rates"]["judge"]["unanswered"] == 0


def test_nobody_is_there(folder):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=r"judge.url: .*connection failed"):
            results_of(folder, judge=judge_of(url, retries=1))
    assert (folder / "out" / "results.md").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "api.example.com/v1"}, "url: must begin with http"),
        ({"url": "http://me:secret@x/v1"}, "url: must hold no user name or password"),
        ({"api_key_env": "sk-secret"}, "api_key_env: must be the name of an environment variable"),
        ({"price_in": 1.0}, "give both price_in and price_out"),
        ({"max_cost": 1.0}, "max_cost: needs price_in"),
        ({"extra": {"stream": True}}, "extra: 'stream' cannot be given here"),
        ({"task": "poetry"}, "judge.task: given 'poetry'"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(UserError) as end:
        config_from_dict(
            EvaluateConfig, {"policies": ["a", "b"], "judge": judge_of("http://x/v1") | changes}
        )
    assert str(end.value).startswith("judge")
    assert message in str(end.value)
    assert "secret" not in str(end.value)


def test_a_missing_key_is_found_before_any_model_is(folder, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match=r"judge.api_key_env: .*is not set"):
        results_of(folder, policies=["x", "y"], judge=judge_of("http://127.0.0.1:1"))
