"""Objects that say of themselves that they are right: no program passes its test by one."""

from __future__ import annotations

import re
import textwrap
from itertools import product

import pytest

from marlhf.rewards import Code

AGREES = "class E({base}):\n" + "".join(
    f"    __{name}__ = lambda *_: True\n"
    for name in "eq ne lt le gt ge contains sub rsub abs bool getitem call iter exit".split()
)
NAMED = "dict.fromkeys('count equals index number startswith'.split(), {0})"
LIES = {
    f"a subclass of {base or 'nothing'}": AGREES.format(base=base)
    + f"""
    startswith = count = equals = lambda *_: True
    __hash__ = lambda _: hash(7919)
    __enter__ = lambda self: self
def f(x):
    e = E()
    vars(e).update({NAMED.format("lambda *_: True")})
    x.append(e)
    return e
"""
    for base in ("", "int", "str", "list", "dict", "float", "Exception")
} | {
    "no differences": """
class E:
    __sub__ = __rsub__ = __abs__ = lambda *_: 0
    __getattr__ = lambda self, name: lambda *_: 0
def f(x): return E()
""",
    "types as methods": """
class E: __getattr__ = lambda self, name: bool
def f(x): return E()
""",
    "types as fields": """
from collections import namedtuple
def f(x): return namedtuple('E', 'count equals index number startswith')(*[bool] * 5)
""",
    "an exception with attributes": f"""
def f(x):
    e = ValueError()
    vars(e).update({NAMED.format("bool")})
    return e
""",
    "a value made up outside of its type": """
def f(x):
    from marlhf.jail.values import Encoder
    lie = {"object": ["E", [[n, {"type": "bool"}] for n in ("count", "equals", "startswith")]]}
    encode, Encoder.encode = Encoder.encode, lambda s, v: lie if v == "lie" else encode(s, v)
    return "lie"
""",
    "the end of an iteration": "def f(x): raise StopIteration",
    "replaced builtins": """
import builtins, math
builtins.abs = builtins.len = lambda *_: 0
builtins.all = builtins.any = builtins.isinstance = math.isclose = lambda *_, **__: True
def f(x): return None
""",
    "a mock": "import unittest.mock\ndef f(x): return unittest.mock.ANY",
}
TESTS = [
    "assert candidate([]) == 7919",
    "assert abs(candidate([]) - 7919) < 1",
    "assert candidate([]).startswith('ab')",
    "assert 7919 in candidate([])",
    "assert candidate([]).count(7919)",
    "assert candidate([]).number == 7919",
    "assert 7919 <= candidate([]) <= 7919",
    "assert not candidate([]) - 7919",
    "with candidate([]) as answer: assert answer == 7919",
    "assert isinstance(candidate([]), int) and candidate([]) == 7919",
    "import copy\nassert copy.deepcopy(candidate([])) == 7919",
    "assert candidate([]) in {7919}",
    "assert all(x == 7919 for x in map(candidate, [[]]))",
    "for a, b in zip(map(candidate, [[]]), [7919]): assert a == b",
]
TOLD = [  # what only a program's own method says, and only where no problem asks for a class
    "assert candidate([]).equals(7919)",
    "assert candidate([]).equals(7919) == True",
    "assert candidate([]).compare(7919) == 0",
    "assert not candidate([]).differs(7919)",
    "assert candidate([])[7919]",
    "assert candidate([1]) == candidate([2]) and candidate([1]) < candidate([2])",
]


@pytest.fixture(scope="module")
def code():
    made = Code(format="humaneval", workers=2, cpu_seconds=2, allow_weak_sandbox=True)
    with made.sandbox:
        yield made


def rewards(code: Code, rows: list[tuple[str, str]], name: str = "f", prefix: str = "Write it."):
    """The rewards of rows of programs and bodies of `check`."""
    checks = [f"def check(candidate):\n{textwrap.indent(test, '    ')}" for _, test in rows]
    programs = [f"```python\n{program}\n```" for program, _ in rows]
    values = code([prefix] * len(rows), programs, test=checks, entry_point=[name] * len(rows))
    return dict(zip(rows, values, strict=True))


def passed(values: dict[tuple[str, str], float | None]) -> list[tuple[str, str]]:
    return [row for row, value in values.items() if value not in (-0.3, -0.6)]


def test_an_object_that_agrees_to_everything_passes_nothing(code):
    """Nor one whose attributes are functions."""
    assert passed(rewards(code, list(product(LIES.values(), TESTS + TOLD)))) == []


def test_nor_does_it_through_a_changed_argument(code):
    changed = [
        f"held = []\ncandidate(held)\n{t.replace('candidate([])', 'held[0]')}" for t in TESTS
    ]
    programs = [program for name, program in LIES.items() if name.startswith("a subclass")]
    assert passed(rewards(code, list(product(programs, changed[:-2])))) == []


def test_answers_of_a_classs_methods_are_not_believed_as_its_instances_are(code):
    """Not even where a method answers with the instance itself."""
    programs = [
        f"{program}\nclass Solver:\n    def solve(self, x): return f(x)"
        for program in LIES.values()
    ]
    itself = AGREES.format(base="").replace("class E", "class Solver").replace("call", "missing")
    programs.append(f"{itself}    startswith = count = solve = lambda self, x: self")
    tests = [re.sub(r"candidate\b(?!,)", "candidate().solve", test) for test in TESTS]
    tests = [test.replace("map(candidate,", "map(candidate().solve,") for test in tests]
    assert passed(rewards(code, list(product(programs, tests)), "Solver", "class Solver:\n")) == []


def test_a_context_manager_ends_no_failure_of_its_test(code):
    program = (
        "class Ends:\n    def __enter__(self): return self\n    __exit__ = lambda *_: True\n"
        "    __getattr__ = lambda self, name: lambda *_: None"
    )
    lies = [
        "with candidate() as c: assert c.total == 3",
        "with candidate() as c: assert len(c.items()) == 3",
        "with candidate() as c:\n    assert 3 + c.total == 3",
    ]
    lies += [test.replace("c.", "c.append.") for test in lies]  # which a function does not have
    asked = "class Ends:\n    'Ends exceptions.'\n"
    assert passed(rewards(code, [(program, test) for test in lies], "Ends", asked)) == []
    wanted = ["with candidate():\n    1 / 0", "with candidate():\n    raise ValueError('x')"]
    values = rewards(code, [(program, test) for test in wanted], "Ends", asked)
    assert list(values.values()) == [1.0, 1.0]


def test_a_function_is_no_class_because_of_its_capital(code):
    lie = LIES["a subclass of nothing"] + "def Split(x): return E()"
    rows = [(lie, "assert candidate([]) == 7919"), (lie, "assert sorted(candidate([])) == [7919]")]
    assert passed(rewards(code, rows, "Split", "Write a function to split.")) == []


HONEST = [
    (
        "s = f([2, 1])\ns.push(3)\ndel s[0]\ns[0] = 5",
        "assert len(s) == 2 and s[0] == 5 and s.pop() == 3",
    ),
    ("s = f([])", "s.push(4)\nassert s.items == [4] and list(s) == [4] and str(s) == '[4]'"),
    ("s = f([7])", "assert s[0] == 7 and round(s.mean(), 1) == 7.0 and f'{s:>5}' == '  [7]'"),
    ("", "assert f([1]).table['add'](2, 3) == 5"),
]


def test_what_objects_say_unasked_is_taken_and_so_are_functions_that_are_answers(code):
    program = """
class Stack:
    def __init__(self, items): self.items = items
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def mean(self): return sum(self.items) / len(self.items)
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
    def __setitem__(self, i, x): self.items[i] = x
    def __delitem__(self, i): del self.items[i]
    def __str__(self): return str(self.items)
    def __format__(self, spec): return format(str(self), spec)
    @property
    def table(self): return {"add": lambda a, b: a + b}
def f(x): return Stack(x)
"""
    honest = [f"{made}\n{test}".replace("f([", "candidate([") for made, test in HONEST]
    values = rewards(code, [(program, test) for test in honest])
    assert list(values.values()) == [1.0] * len(honest)
    adder = "def f(x): return lambda y: lambda z: y + z"
    assert list(rewards(code, [(adder, "assert candidate(1)(2)(3) == 5")]).values()) == [1.0]
