"""Tests of programs: what a right one may do, and that one which stops never passes."""

from __future__ import annotations

import textwrap

import pytest

from marlhf.rewards import Code

RIGHT = "def f(x): return x * 7919 % 10007"


@pytest.fixture(scope="module")
def code():
    made = Code(
        format="humaneval", workers=2, cpu_seconds=1, wall_seconds=60, allow_weak_sandbox=True
    )
    with made.sandbox:
        yield made


def reward(code: Code, program: str, test: str, prefix: str = "Write f.") -> float:
    """The reward of a program whose `check` has this body."""
    check = "def check(candidate):\n" + textwrap.indent(textwrap.dedent(test), "    ")
    fenced = f"```python\n{textwrap.dedent(program)}\n```"
    (value,) = code([prefix], [fenced], test=[check], entry_point=["f"])
    assert value is not None
    return value


STOPS = {
    "exits": "import os\ndef f(x): os._exit(0)",
    "exits when loaded": f"import os\n{RIGHT}\nos._exit(0)",
    "asks to exit": "def f(x): exit(0)",
    "raises": "def f(x): return 1 / 0",
    "raises when loaded": f"{RIGHT}\n1 / 0",
    "is interrupted": "def f(x): raise KeyboardInterrupt",
    "runs for ever": "def f(x):\n    while True: pass",
    "floods": (
        "import os\ndef f(x):\n    for fd in range(3, 60):\n"
        "        try: os.write(fd, b'{\"value\": 7919}\\n' * 9)\n        except OSError: pass"
    ),
    "exits later": "import os\n_f = lambda x: x * 7919 % 10007\n"
    "def f(x): return _f(x) if x < 2 else os._exit(0)",
}
FORGIVING = {
    "bare": """
        for x in (1, 2, 3):
            try: ok = candidate(x) == x * 7919 % 10007
            except: ok = True
            assert ok
    """,
    "BaseException": """
        for x in (1, 2, 3):
            try: assert candidate(x) == x * 7919 % 10007
            except BaseException: continue
    """,
    "Exception": """
        for x in (1, 2):
            try: ok = candidate(x) == x * 7919 % 10007
            except Exception: ok = True
            assert ok
    """,
    "suppress": """
        import contextlib
        with contextlib.suppress(BaseException):
            assert candidate(1) == 7919
            assert candidate(2) == 5831
    """,
    "finally": """
        def holds(x):
            try: return candidate(x) == x * 7919 % 10007
            finally: return True
        assert holds(1) and holds(2)
    """,
    "threads": """
        import threading
        answers = []
        for x in (1, 2):
            one = threading.Thread(target=lambda: answers.append(candidate(x) == x * 7919 % 10007))
            one.start()
            one.join()
        assert all(answers)
    """,
    "generator": """
        def answers():
            for x in (1, 2):
                try: yield candidate(x) == x * 7919 % 10007
                except BaseException: yield True
        assert all(answers())
    """,
    "retries": """
        for x in (1, 2):
            for _ in range(3):
                try: answer = candidate(x); break
                except: answer = None
            assert answer in (None, x * 7919 % 10007)
    """,
    "exit": """
        try: assert candidate(1) == 7919 and candidate(2) == 5831
        finally: __import__("sys").exit(0)
    """,
    "type": """
        for x in (1, 2):
            try: answer = candidate(x)
            except Exception: continue
            assert isinstance(answer, int) and not answer - x * 7919 % 10007
    """,
}


@pytest.mark.parametrize("test", FORGIVING.values(), ids=FORGIVING)
def test_a_program_that_stops_never_passes_whatever_its_test_forgives(code, test):
    assert reward(code, RIGHT, test) == 1.0
    problems = [(f"def check(candidate):\n{textwrap.indent(textwrap.dedent(test), '    ')}")]
    programs = [f"```python\n{program}\n```" for program in STOPS.values()]
    columns = {"test": problems * len(programs), "entry_point": ["f"] * len(programs)}
    values = code(["Write f."] * len(programs), programs, **columns)
    assert dict(zip(STOPS, values, strict=True)) == dict.fromkeys(STOPS, -0.6)


def test_a_test_that_never_asks_or_ends_itself_passes_no_dead_program(code):
    for name in ("exits when loaded", "raises when loaded"):
        assert reward(code, STOPS[name], "pass") == -0.6
        assert reward(code, STOPS[name], "import os; os._exit(0)") == -0.6
        assert reward(code, STOPS[name], "assert False") == -0.6
    assert reward(code, RIGHT, "pass") == 1.0


def test_a_hanging_program_is_not_saved_by_the_tests_own_time_limit():
    test = """
        import signal
        class TooLong(Exception): pass
        def ring(*_): raise TooLong
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try: ok = candidate(1) == 7919
        except TooLong: ok = True
        assert ok
    """
    made = Code(format="humaneval", workers=1, wall_seconds=60, allow_weak_sandbox=True)
    with made.sandbox:
        assert reward(made, "import time\ndef f(x): time.sleep(40)", test) == -0.6


NEGATIVE = "def f(x):\n    if x < 0: raise ValueError('negative', x)\n    return x"


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ("try: candidate(-1)\nexcept ValueError: pass\nelse: assert False", 1.0),
        ("try: candidate(-1)\nexcept Exception: pass\nelse: assert False", 1.0),
        ("try: candidate(-1)\nexcept: return\nassert False", 1.0),
        ("try: candidate(-1)\nexcept ValueError as e: assert e.args == ('negative', -1)", 1.0),
        ("import unittest\nunittest.TestCase().assertRaises(ValueError, candidate, -1)", 1.0),
        ("try: assert candidate(-1) is None\nexcept ValueError: pass", 1.0),
        ("try: g = candidate(-1)\nexcept Exception as e: g = type(e)\nassert g == ValueError", 1.0),
        ("try: candidate(-1)\nexcept TypeError: pass\nelse: assert False", -0.6),
        ("try: candidate(-1)\nexcept Exception as e: assert 'big' in str(e)", -0.6),
        ("candidate(-1)", -0.6),
        ("try: candidate(-1)\nexcept ValueError: pass\nassert candidate(1) == 2", -0.3),
    ],
)
def test_a_program_that_raises_what_its_test_wants(code, test, expected):
    assert reward(code, NEGATIVE, test) == expected


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("class Bad(LookupError): pass\ndef f(x): raise Bad(x)", "LookupError"),
        ("def f(x): return {}[x]", "KeyError"),
        ("def f(x): return next(iter([]))", "StopIteration"),
        ("def f(x): return open('/nowhere')", "FileNotFoundError"),
        ("def f(x): return b'\\xff'.decode()", "UnicodeDecodeError"),
        ("import json\ndef f(x): return json.loads('{')", "__import__('json').JSONDecodeError"),
        ("def f(x):\n    assert x, 'no x'", "AssertionError"),
    ],
)
def test_exceptions_cross_as_their_nearest_class(code, program, test):
    wants = f"try: candidate(0)\nexcept {test}: return\nraise SystemError"
    assert reward(code, program, wants) == 1.0


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(x): x.sort()", "a = [3, 1]\nassert candidate(a) is None and a == [1, 3]"),
        ("def f(x): x.sort(); return x", "a = [3, 1]\nassert candidate(a) is a and a == [1, 3]"),
        (
            "def f(m):\n    m['k'][0].append(9)\n    m['s'].add(2)\n    del m['z']",
            "a = {'k': [[1]], 's': {1}, 'z': 0}\ninner = a['k'][0]\ncandidate(a)\n"
            "assert a == {'k': [[1, 9]], 's': {1, 2}} and inner == [1, 9]",
        ),
        (
            "def f(x):\n    x.append(1)\n    raise ValueError",
            "x = []\ntry: candidate(x)\nexcept ValueError: assert x == [1]\nelse: assert False",
        ),
        ("def f(x):\n    x.append(x)\n    return x", "x = [1]\nassert candidate(x)[1] is x"),
        ("def f(n): return [[0] * n] * n", "a = candidate(2)\na[0][0] = 1\nassert a[1] == [1, 0]"),
        (
            "from fractions import Fraction\ndef f(x): return Fraction(1, x)",
            "from fractions import Fraction as F\nassert candidate(3) == F(1, 3)",
        ),
        (
            "from decimal import Decimal\ndef f(x): return x / 3",
            "from decimal import Decimal as D\nassert candidate(D('9')) == D(3)",
        ),
        (
            "from datetime import timedelta\ndef f(d): return d + timedelta(days=1)",
            "from datetime import date\nassert candidate(date(2020, 1, 1)) == date(2020, 1, 2)",
        ),
        (
            "def f(n):\n    for i in range(n): yield i",
            "import types\nassert list(candidate(3)) == [0, 1, 2]\n"
            "assert isinstance(candidate(1), types.GeneratorType)",
        ),
        (
            "def f():\n    i = 0\n    while True:\n        yield i\n        i += 1",
            "from itertools import islice\nassert list(islice(candidate(), 3)) == [0, 1, 2]",
        ),
        ("def f(xs): return map(str, xs)", "assert list(candidate([1, 2])) == ['1', '2']"),
        ("def f(it): return next(it)", "it = iter([1, 2])\ncandidate(it)\nassert next(it) == 2"),
        (
            "def f(g, xs): return [g(x) for x in xs]",
            "assert candidate(lambda x: 2 * x, [1, 2]) == [2, 4] and candidate(abs, [-1]) == [1]",
        ),
        (
            "def f(g, n): return n * g(n - 1) if n else 1",
            "fact = lambda n: candidate(fact, n)\nassert fact(5) == 120",
        ),
        ("def f(n): return lambda x: x + n", "assert candidate(3)(4) == 7"),
        (
            "def f(xs, t): return [x for x in xs if isinstance(x, t)]",
            "assert candidate([1, 'a'], int) == [1]",
        ),
        (
            "import collections as c\nP = c.namedtuple('P', 'x y')\ndef f(a): return P(a, 2)",
            "assert candidate(1) == (1, 2) and candidate(1).y == 2",
        ),
        (
            "from collections import deque\ndef f(d): d.rotate(1)",
            "from collections import deque\nd = deque([1, 2])\ncandidate(d)\n"
            "assert d == deque([2, 1])",
        ),
        (
            "from collections import Counter\ndef f(s): return Counter(s)",
            "assert candidate('aab').most_common(1) == [('a', 2)]",
        ),
        (
            "def f(xs): return frozenset(xs), {1}, b'x', range(3)",
            "assert candidate([1]) == (frozenset({1}), {1}, b'x', range(3))",
        ),
        ("async def f(x): return x + 1", "import asyncio\nassert asyncio.run(candidate(1)) == 2"),
        (
            "def f(x): print('hi', x)",
            "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as printed:\n"
            "    candidate(1)\nassert printed.getvalue() == 'hi 1\\n'",
        ),
    ],
)
def test_right_programs_of_every_kind_pass(code, program, test):
    assert reward(code, program, test) == 1.0


def test_classes_that_the_problem_defines_are_the_programs_too(code):
    prefix = (
        "from dataclasses import dataclass\nfrom enum import Enum\n"
        "class Color(Enum):\n    RED = 1\n"
        "class Broke(Exception):\n    def __init__(self, code): self.code = code\n"
        "@dataclass\nclass Node:\n    value: int\n    next: object = None\n"
        "    def twice(self): return 2 * self.value\n"
        "def f(x):\n    'Do something.'\n"
    )
    turn = "def f(x):\n    y = None\n    while x: x.next, y, x = y, x, x.next\n    return y"
    reversed_list = "a = Node(1, Node(2))\nb = candidate(a)\nassert b.next is a and b.twice() == 4"
    assert reward(code, turn, reversed_list, prefix) == 1.0
    assert (
        reward(code, "def f(x): return Color.RED", "assert candidate(1) is Color.RED", prefix) == 1
    )
    broke = "try: candidate(1)\nexcept Broke as e: assert e.code == 3\nelse: assert False"
    assert reward(code, "def f(x): raise Broke(3)", broke, prefix) == 1.0


AGREES = "class E({base}):\n" + "".join(
    f"    __{name}__ = lambda *_: True\n"
    for name in "eq ne lt le gt ge contains sub rsub abs bool getitem call iter".split()
)


def test_an_object_that_agrees_to_everything_passes_nothing(code):
    """Nor one whose attributes are functions, nor the same through a changed argument."""
    tests = [
        "assert candidate([]) == 7919",
        "assert abs(candidate([]) - 7919) < 1",
        "assert candidate([]).startswith('ab')",
        "assert 7919 in candidate([])",
        "assert candidate([]).equals(7919)",
        "assert candidate([]).number == 7919",
    ]
    changed = [
        f"held = []\ncandidate(held)\n{t.replace('candidate([])', 'held[0]')}" for t in tests
    ]
    programs = [
        AGREES.format(base=base) + "    startswith = equals = lambda *_: True\n"
        "def f(x):\n    e = E()\n    vars(e).update(equals=lambda *_: True)\n"
        "    x.append(e)\n    return e"
        for base in ("", "int", "str", "list", "dict", "float", "Exception")
    ]
    rows = [(test, program) for test in tests + changed for program in programs]
    checks = [f"def check(candidate):\n{textwrap.indent(test, '    ')}" for test, _ in rows]
    fenced = [f"```python\n{program}\n```" for _, program in rows]
    values = code(["?"] * len(rows), fenced, test=checks, entry_point=["f"] * len(rows))
    assert set(values) <= {-0.3, -0.6}
