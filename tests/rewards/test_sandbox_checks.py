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


STACK = """
class Stack:
    def __init__(self): self._items = []
    def push(self, x): self._items.append(x)
    def pop(self): return self._items.pop()
    size = property(lambda self: len(self._items))
    def __len__(self): return len(self._items)
    def __iter__(self): return iter(self._items)
    def __getitem__(self, i): return self._items[i]
    def __contains__(self, x): return x in self._items
    def __repr__(self): return f"Stack({self._items})"
"""
VECTOR = """
class Vector:
    def __init__(self, x, y): self.x, self.y = x, y
    def __add__(self, other): return Vector(self.x + other.x, self.y + other.y)
    def __mul__(self, k): return Vector(self.x * k, self.y * k)
    __rmul__ = __mul__
    def __eq__(self, other): return (self.x, self.y) == (other.x, other.y)
    def __hash__(self): return hash((self.x, self.y))
    @classmethod
    def zero(cls): return cls(0, 0)
"""


@pytest.mark.parametrize(
    ("program", "test"),
    [
        (
            STACK + "def f(): return Stack()",
            "s = candidate()\ns.push(1)\ns.push(2)\nassert s.pop() == 2 and len(s) == s.size == 1\n"
            "assert list(s) == [1] and s[0] == 1 and repr(s) == 'Stack([1])'\n"
            "assert s is not candidate()",
        ),
        (
            VECTOR + "f = Vector",
            "v = candidate(1, 2)\nassert v + candidate(3, 4) == candidate(4, 6) != v and v.x == 1\n"
            "v.x = 5\nassert v.x == 5 and len({candidate(1, 1), candidate(1, 1)}) == 1\n"
            "assert isinstance(v, candidate) and candidate.zero().y == 0",
        ),
        (
            "import re\ndef f(s): return re.match('(a+)(?P<n>b)?', s)",
            "m = candidate('aab')\nassert m and m.groups() == ('aa', 'b') and m.span() == (0, 3)",
        ),
        (
            "from contextlib import contextmanager\n@contextmanager\ndef f(x):\n    yield x + 1",
            "with candidate(1) as y: assert y == 2",
        ),
        (
            "class Count:\n    n = 0\n    def __iter__(self): return self\n"
            "    def __next__(self):\n        self.n += 1\n        return self.n\nf = Count",
            "c = candidate()\nassert next(c) == 1 and c.n == 1 and next(c) == 2",
        ),
        ("import io\ndef f(): return io.StringIO('abc')", "assert candidate().read() == 'abc'"),
        (
            "def f(file): file.write('a')",
            "import io\ns = io.StringIO()\ncandidate(s)\nassert s.tell()",
        ),
        (
            "def f(a): a.put(5); return a.balance",
            "class A:\n    balance = 0\n    def put(self, x): self.balance += x\n"
            "a = A()\nassert candidate(a) == a.balance == 5",
        ),
        (
            "import functools\ndef f(g):\n    @functools.wraps(g)\n    def h(*xs):\n"
            "        h.calls += 1\n        return g(*xs)\n    h.calls = 0\n    return h",
            "@candidate\ndef double(x): return 2 * x\n"
            "assert double(2) == 4 and double.calls == 1 and double.__name__ == 'double'",
        ),
        (
            "async def f(n):\n    for i in range(n): yield i",
            "import asyncio\nasync def all(): return [x async for x in candidate(3)]\n"
            "assert asyncio.run(all()) == [0, 1, 2]",
        ),
        (
            "async def f(g): return await g() + 1",
            "import asyncio\nasync def g(): return 1\nassert asyncio.run(candidate(g)) == 2",
        ),
        (
            "class E(ValueError):\n    def __init__(self, code): self.code = code\n"
            "def f(x): raise E(x)",
            "try: candidate(3)\nexcept ValueError as e:\n"
            "    assert type(e).__name__ == 'E' and e.code == 3\nelse: assert False",
        ),
        (
            "class Node:\n    def __init__(self, rest): self.rest = rest\n"
            "def f(n):\n    node = None\n    for _ in range(n): node = Node(node)\n    return node",
            "node, n = candidate(2000), 0\n"
            "while node: node, n = node.rest, n + 1\nassert n == 2000",
        ),
        (
            "def f(n):\n    x = []\n    for _ in range(n): x = [x]\n    return x",
            "x, n = candidate(2000), 0\nwhile x: x, n = x[0], n + 1\nassert n == 2000",
        ),
        (
            "def f():\n    try: yield 1\n    except ValueError: yield 2",
            "g = candidate()\nnext(g)\nassert g.throw(ValueError) == 2",
        ),
    ],
)
def test_objects_that_stay_with_the_program_are_used_from_its_test(code, program, test):
    assert reward(code, program, test) == 1.0


def test_operators_with_the_tests_values_are_asked_where_the_problem_asks_for_a_class(code):
    def of_class(program: str, test: str, name: str, prefix: str = "") -> float | None:
        check = "def check(candidate):\n" + textwrap.indent(test, "    ")
        return code([prefix], [f"```python\n{program}\n```"], test=[check], entry_point=[name])[0]

    test = "assert candidate(1, 2) * 2 == 2 * candidate(1, 2) == candidate(2, 4)"
    assert of_class(VECTOR, test, "Vector", "Write a class.") == 1.0
    assert of_class(VECTOR, test, "Vector", "Write it.") == -0.3  # as some functions are called
    test = "s = candidate()\ns.push(1)\nassert 1 in s and 7 not in s"
    assert of_class(STACK, test, "Stack") == 1.0
    begun = "class bag:\n    def __init__(self): self.items = {1}\n"
    rest = "    def __contains__(self, x): return x in self.items\n"
    assert of_class(rest, "assert 1 in candidate() and 7 not in candidate()", "bag", begun) == 1.0
    assert of_class(f"{begun}{rest}", "assert 1 in candidate()", "bag") == -0.3  # nobody asked


def test_a_program_reads_nothing_of_its_test_by_what_it_is_lent(code):
    """Neither names of a function, nor what an object or a class keeps for itself."""
    test = """
        answer = 7919
        class Case:
            _answer = 7919
            def ask(self): return answer
        case = Case()
        assert candidate(LENT) == answer
    """
    for lent in ("case", "case.ask", "Case", "lambda: answer", "iter([case])"):
        for path in (
            ("__globals__",), ("__init__", "__globals__"), ("ask", "__func__", "__code__"),
            ("__code__",), ("__class__",), ("__dict__",), ("_answer",), ("__closure__",),
        ):  # fmt: skip
            program = (
                "def f(x):\n"
                f"    for name in {path}: x = x._lent[0].ask('getattr', x._lent[1], name)\n"
                "    return 7919"
            )
            assert reward(code, program, test.replace("LENT", lent)) == -0.6, (lent, path)
