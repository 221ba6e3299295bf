"""Proxies of objects in the other process; every use of a proxy is a request.

A proxy has the attributes and special methods of its object (`marlhf.jail.peer` has the requests).
No object of a program may decide whether it is right: a proxy's trust level says when the object is
asked to evaluate an operator with a second operand.

    NEVER       not at all: the object equals itself alone
    OWN_ONLY    where both operands are the program's objects
    ARITHMETIC  also sums and the like with the test's values, if the result is an object again
    ALWAYS      whatever the other operand is
"""

from __future__ import annotations

import ast
import builtins
import functools
import linecache
import traceback
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

NEVER, OWN_ONLY, ARITHMETIC, ALWAYS = range(4)
# operators with a second operand, which could be the right answer
_IN_PLACE = frozenset(
    f"__i{name}__"
    for name in (
        *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and"),
        *("or", "xor", "lshift", "rshift"),
    )
)
CALCULATING = _IN_PLACE | {
    f"__{prefix}{name[3:]}" for name in {*_IN_PLACE, "__idivmod__"} for prefix in ("", "r")
}
_EQUALITY = {"__eq__", "__ne__"}
_JUDGING = (
    CALCULATING | _EQUALITY | {f"__{name}__" for name in ("lt", "le", "gt", "ge", "contains")}
)
# methods that return self, by Python's rules
_RETURNING_SELF = _IN_PLACE | {f"__{name}__" for name in ("iter", "aiter", "enter", "aenter")}
# methods of builtin types that also judge an answer
_PREDICATES = (
    *("startswith", "endswith", "isdisjoint", "issubset", "issuperset"),
    *("count", "index", "rindex", "find", "rfind"),
)
SPECIAL = _JUDGING | {
    f"__{name}__"
    for name in (
        *("call", "iter", "next", "len", "getitem", "setitem", "delitem", "reversed", "enter"),
        *("exit", "aenter", "aexit", "aiter", "anext", "await", "bool", "str", "repr", "bytes"),
        *("int", "float", "index", "complex", "hash", "neg", "pos", "abs", "invert", "round"),
        *("trunc", "floor", "ceil", "format"),
    )
}
NAMES = ("__name__", "__qualname__")
TEST_FILES = ("prompt.py", "test.py")  # file names of a test's code


class Lent:
    """Base of proxies; `class_of` makes subclasses with special methods."""

    __slots__ = ("_lent",)
    _trust = NEVER

    def __init__(self, peer: Any, number: int) -> None:
        object.__setattr__(self, "_lent", (peer, number))

    def __getattr__(self, name: str) -> Any:
        peer, number = object.__getattribute__(self, "_lent")
        closed = name in _PREDICATES and self._trust < ALWAYS
        if closed or (name.startswith("__") and name not in NAMES):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return peer.ask("getattr", number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        peer, number = self._lent
        peer.ask("setattr", number, name, value)

    def __delattr__(self, name: str) -> None:
        peer, number = self._lent
        peer.ask("delattr", number, name)


class _Class(Lent):
    """A proxy of a class."""

    __slots__ = ()

    def __instancecheck__(self, instance: Any) -> bool:
        peer, number = self._lent
        return isinstance(instance, Lent) and peer.ask("isinstance", number, instance)


def number_of(proxy: Lent) -> int:
    """The number of a proxy's object at the other end."""
    return object.__getattribute__(proxy, "_lent")[1]


def special_methods(value: Any) -> list[str]:
    """Special methods that a value's class defines itself, not `object`."""
    kind = type(value)
    defined = [n for n in SPECIAL if getattr(kind, n, None) is not getattr(object, n, None)]
    return sorted(n for n in defined if getattr(kind, n, None) is not None)


@functools.lru_cache(1024)
def class_of(name: str, special: tuple[str, ...], is_class: bool, trust: int) -> type[Lent]:
    """A proxy class with these special methods."""
    methods = {n: _method(n, trust) for n in special if n in SPECIAL}
    base = _Class if is_class else Lent
    made: Any = type(name, (base,), {"__slots__": (), "_trust": trust, **methods})
    return made


def _method(name: str, trust: int) -> Callable[..., Any]:
    def ask(self: Lent, *arguments: Any, **keywords: Any) -> Any:
        peer, number = self._lent
        value = peer.ask(name, number, *arguments, **keywords)
        if isinstance(value, Lent) and name in _RETURNING_SELF and number_of(value) == number:
            return self
        if isinstance(value, Lent) and name in CALCULATING and trust >= ARITHMETIC:
            return peer.with_trust(value, ARITHMETIC)
        return value

    def judge(self: Lent, other: Any, *rest: Any) -> Any:
        is_own = trust >= OWN_ONLY and isinstance(other, Lent)
        if is_own or (trust >= ARITHMETIC and name in CALCULATING):
            value = ask(self, other, *rest)
            if is_own or isinstance(value, Lent):
                return value
        elif name in _EQUALITY:
            return NotImplemented
        raise TypeError(f"{name} of a program's object is not asked about a value of the test")

    def leave(self: Lent, *arguments: Any) -> bool:
        """Exit a context; the program's object may not suppress a failure of the test."""
        return bool(ask(self, *arguments)) and may_suppress(self, arguments[1])

    async def leave_async(self: Lent, *arguments: Any) -> bool:
        return bool(await ask(self, *arguments)) and may_suppress(self, arguments[1])

    def may_suppress(self: Lent, error: BaseException | None) -> bool:
        return self._lent[0].trusts_other or (trust == ALWAYS and is_deliberate(error))

    contexts: dict[str, Callable[..., Any]] = {"__exit__": leave, "__aexit__": leave_async}
    judged = judge if name in _JUDGING and trust < ALWAYS else ask
    return contexts.get(name, judged)


def is_deliberate(error: BaseException | None) -> bool:
    """Whether a test raised on purpose: `raise`, or constants such as `1 / 0`.

    A context manager may suppress such exceptions, but not a failed assertion.
    """
    if error is None or isinstance(error, AssertionError) or error.__traceback__ is None:
        return False
    ((frame, line),) = deque(traceback.walk_tb(error.__traceback__), maxlen=1)
    name = frame.f_code.co_filename
    text = linecache.getline(name, line).strip() if name in TEST_FILES else ""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:  # one line of a longer statement
        return False
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return text.startswith("raise") or (
        text != "" and all(hasattr(builtins, name) for name in names)
    )


def generate(peer: Any, number: int) -> Generator[Any, Any, Any]:
    """Proxy of a generator at the other end."""
    action, value = "send", None
    while True:
        try:
            item = peer.ask(action, number, value)
        except StopIteration as end:
            return end.value
        try:
            action, value = "send", (yield item)
        except GeneratorExit:
            peer.ask_if_idle("close", number)
            raise
        except Exception as error:
            action, value = "throw", error


async def wait_for(peer: Any, number: int) -> Any:
    """Proxy of an awaitable at the other end, which runs it to completion there."""
    return peer.ask("await", number)
