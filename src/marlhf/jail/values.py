"""Serialisation of values between a program and its test, in JSON's types.

Decoding runs no code of the other side: a value is built from types that this side knows, among
them classes by name. A value of another type becomes `Opaque`.
"""

from __future__ import annotations

import builtins
import enum
import functools
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import UUID


class Opaque:
    """Placeholder for a value of an unknown type, with its plain attributes; equals nothing."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


# types whose values are made from a few others: name -> (type, value -> parts, parts -> value)
_MADE: dict[str, tuple[type, Callable[[Any], list[Any]], Callable[..., Any]]] = {
    "fraction": (Fraction, lambda x: [x.numerator, x.denominator], Fraction),
    "decimal": (Decimal, lambda x: [str(x)], Decimal),
    "datetime": (
        datetime,
        lambda x: [*x.timetuple()[:6], x.microsecond, x.utcoffset()],
        lambda *x: datetime(*x[:7], tzinfo=None if x[7] is None else timezone(x[7])),
    ),
    "date": (date, lambda x: [x.year, x.month, x.day], date),
    "time": (time, lambda x: [x.hour, x.minute, x.second, x.microsecond], time),
    "timedelta": (timedelta, lambda x: [x.days, x.seconds, x.microseconds], timedelta),
    "range": (range, lambda x: [x.start, x.stop, x.step], range),
    "slice": (slice, lambda x: [x.start, x.stop, x.step], slice),
    "keys": (type({}.keys()), lambda x: [dict.fromkeys(x)], lambda x: x.keys()),
    "values": (type({}.values()), lambda x: [dict(enumerate(x))], lambda x: x.values()),
    "items": (type({}.items()), lambda x: [dict(x)], lambda x: x.items()),
    "path": (type(Path()), lambda x: [str(x)], Path),
    "uuid": (UUID, lambda x: [x.int], lambda x: UUID(int=x)),
    "ellipsis": (type(...), lambda _: [], lambda: ...),
    "notimplemented": (type(NotImplemented), lambda _: [], lambda: NotImplemented),
}
_CONTAINERS = (list, dict, set, bytearray, deque)
_CHANGEABLE = {
    **{kind.__name__: kind for kind in _CONTAINERS},
    "object": object,
    "error": BaseException,
}
_MADE_NAMES = {kind: name for name, (kind, _, _) in _MADE.items()}
_DEEPEST = 50_000  # frames
OWN_MODULES = ("program", "__main__")  # of classes that a program or a test defines
_DICTS: dict[str, type[dict]] = {"counter": Counter, "ordered": OrderedDict, "dict": dict}


class Encoder:
    """Encodes values in JSON's types.

    numbered: number mutable objects in order of first appearance, so that an object that appears
        twice, or within itself, is one object for the reader too; else values are written as trees.
    known: objects that came from the reader, which map back to the reader's originals.
    export: a reference by which the reader can use an object that cannot be encoded, such as a
        function.
    shared: names of classes that writer and reader both define; their objects are copied.
    """

    def __init__(
        self,
        numbered: bool = False,
        known: Iterable[Any] = (),
        export: Callable[[Any], dict[str, Any] | None] = lambda _: None,
        shared: frozenset[str] = frozenset(),
    ) -> None:
        self.shared = shared
        self.numbered = numbered
        self.known = {id(thing): number for number, thing in enumerate(known)}
        self.export = export
        self.numbers: dict[int, int] = {}
        self.objects: list[Any] = []  # kept alive, so that no other object gets its id

    def encode(self, value: Any) -> Any:
        """A value in JSON's types."""
        if value is None or isinstance(value, bool):
            return value
        copied = self._is_shared(type(value))
        if isinstance(value, enum.Enum) and copied:
            return {"member": [type(value).__name__, value.name, self.encode(value.value)]}
        if isinstance(value, str):
            return str(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, int):
            # JSON's decimal digits would take quadratic time, and Python limits their number
            return int(value) if abs(value) < 1 << 53 else {"int": hex(value)}
        if isinstance(value, tuple):
            items = [self.encode(x) for x in value]
            fields = getattr(type(value), "_fields", None)
            if fields is None or not self.numbered:
                return {"tuple": items}
            return {"namedtuple": [type(value).__name__, list(fields), items]}
        if isinstance(value, frozenset):
            return {"frozenset": [self.encode(x) for x in value]}
        if isinstance(value, bytes):
            return {"bytes": bytes(value).hex()}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, list | dict | set | bytearray | deque):
            return self._changeable(value, self._container)
        if type(value) in _MADE_NAMES and self.numbered:
            name = _MADE_NAMES[type(value)]
            return {"made": [name, *(self.encode(x) for x in _MADE[name][1](value))]}
        if isinstance(value, BaseException) and self.numbered:
            return self._changeable(value, self._error)
        if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
            return {"type": value.__name__}
        if copied and not callable(value) and not hasattr(value, "__next__"):
            return self._changeable(value, self._object)
        exported = self.export(value) if self.numbered else None
        if exported is not None:
            return exported
        return {"opaque": type(value).__name__}

    def _is_shared(self, kind: type) -> bool:
        return self.numbered and kind.__module__ in OWN_MODULES and kind.__name__ in self.shared

    def _changeable(self, value: Any, write: Callable[[Any], Any]) -> Any:
        if not self.numbered:
            return write(value)
        if id(value) in self.numbers:
            return {"same": self.numbers[id(value)]}
        self.numbers[id(value)] = len(self.objects)
        self.objects.append(value)
        if id(value) in self.known:
            return {"was": [self.known[id(value)], write(value)]}
        return write(value)

    def _container(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.encode(x) for x in value]
        if isinstance(value, set):
            return {"set": [self.encode(x) for x in value]}
        if isinstance(value, bytearray):
            return {"bytearray" if self.numbered else "bytes": value.hex()}
        if isinstance(value, deque):
            if not self.numbered:
                return {"opaque": "deque"}
            return {"deque": [value.maxlen, [self.encode(x) for x in value]]}
        items = [[self.encode(k), self.encode(x)] for k, x in value.items()]
        if isinstance(value, defaultdict) and self.numbered:
            return {"defaultdict": [self.encode(value.default_factory), items]}
        kinds = (name for name, kind in _DICTS.items() if isinstance(value, kind))
        return {next(kinds) if self.numbered else "dict": items}

    def _object(self, value: Any) -> Any:
        return {"object": [type(value).__name__, self._attributes(value)]}

    def _error(self, value: BaseException) -> Any:
        kinds = [(kind.__module__, kind.__qualname__) for kind in type(value).__mro__]
        arguments = value.args
        if isinstance(value, OSError) and value.filename is not None:
            arguments = (*value.args[:2], value.filename)
        return {
            "error": [
                kinds,
                [self.encode(x) for x in arguments],
                self._attributes(value),
                self.encode(value.__cause__),
            ]
        }

    def _attributes(self, value: Any) -> list[Any]:
        slots = [n for kind in type(value).__mro__ for n in _names(getattr(kind, "__slots__", ()))]
        attributes = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        attributes |= getattr(value, "__dict__", {})
        public = {name: x for name, x in attributes.items() if not name.startswith("__")}
        return [[name, self.encode(x)] for name, x in public.items()]


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


class Decoder:
    """Decodes the output of an `Encoder`. Raises ValueError for anything else.

    classes: names that the reader's code defines; objects of a class of that name become its own.
    originals: the reader's objects behind the writer's `known`, changed in place as the writer's.
    imported: resolves a reference that the writer exported, or one to an object of the reader.
    untrusted: whether the writer is untrusted; then nothing callable, such as `bool`, is accepted
        under a name that could be a method's.
    """

    def __init__(
        self,
        classes: Mapping[str, Any] | None = None,
        originals: list[Any] | None = None,
        imported: Callable[[str, Any], Any] | None = None,
        untrusted: bool = False,
    ) -> None:
        self.untrusted = untrusted
        self.classes = classes or {}
        self.originals = originals or []
        self.imported = imported
        self.objects: list[Any] = []

    def decode(self, value: Any) -> Any:
        """A value from JSON's types."""
        if isinstance(value, list):
            return self._fill([], value)
        if not isinstance(value, dict):
            return value
        try:
            ((kind, content),) = value.items()
            return self._kind(kind, content)
        except (
            *(ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError),
        ) as error:
            raise ValueError(f"not an encoded value: {error}") from None

    def _kind(self, kind: str, content: Any) -> Any:
        if kind == "int":
            return int(content, 16)
        if kind == "tuple":
            return tuple(map(self.decode, content))
        if kind == "frozenset":
            return frozenset(map(self.decode, content))
        if kind == "namedtuple":
            return self._namedtuple(*content)
        if kind == "bytes":
            return bytes.fromhex(content)
        if kind == "complex":
            return complex(*content)
        if kind == "made":
            return _MADE[content[0]][2](*map(self.decode, content[1:]))
        if kind == "member":
            return self._member(*content)
        if kind == "type":
            builtin = getattr(builtins, content)
            return builtin if isinstance(builtin, type) else Opaque()
        if kind == "opaque":
            return Opaque()
        if kind == "same":
            return self.objects[content]
        if kind == "was":
            return self._changed(*content)
        if kind == "error":
            return self._new_error(*content)
        if kind in ("set", "bytearray", "deque", "defaultdict", "object", *_DICTS):
            return self._fill(self._empty(kind, content), {kind: content})
        if self.imported is None:
            raise ValueError(kind)
        return self.imported(kind, content)

    def _empty(self, kind: str, content: Any) -> Any:
        if kind == "deque":
            return deque(maxlen=content[0])
        if kind == "defaultdict":
            return defaultdict(self.decode(content[0]))
        if kind == "object":
            known = self.own_class(content[0])
            return Opaque() if known is None else object.__new__(known)
        return {"set": set, "bytearray": bytearray, **_DICTS}[kind]()

    def _changed(self, number: int, content: Any) -> Any:
        """One of the reader's objects, changed in place as the writer changed its copy."""
        original = self.originals[number]
        kind = "list" if isinstance(content, list) else next(iter(content))
        expected = _CHANGEABLE.get(kind, dict)
        is_container = isinstance(original, _CONTAINERS)
        if not isinstance(original, expected) or (expected is object and is_container):
            raise ValueError(kind)
        return self._fill(original, content)

    def _fill(self, thing: Any, content: Any) -> Any:
        """Number an object, then set its content, which may contain the object itself."""
        self.objects.append(thing)
        if isinstance(content, list):
            thing[:] = [self.decode(x) for x in content]
            return thing
        ((kind, content),) = content.items()
        if kind == "bytearray":
            thing[:] = bytes.fromhex(content)
        elif kind == "error":
            _ = [self.decode(x) for x in content[1]]  # numbered, though not changed
            self._set_attributes(thing, content[2])
            self.decode(content[3])
        elif kind == "object":
            self._set_attributes(thing, content[1])
        elif kind in ("set", "deque"):
            items = [self.decode(x) for x in (content[1] if kind == "deque" else content)]
            thing.clear()
            (thing.update if kind == "set" else thing.extend)(items)
        else:
            pairs = content[1] if kind == "defaultdict" else content
            items = [(self.decode(k), self.decode(x)) for k, x in pairs]
            thing.clear()
            for key, item in items:
                thing[key] = item
        return thing

    def _set_attributes(self, thing: Any, attributes: Any) -> None:
        """Set plain attributes; none may replace a method of the reader's class."""
        for name, content in attributes:
            item = self.decode(content)
            taken = callable(getattr(type(thing), name, None)) or name.startswith("__")
            declared = not self.untrusted or name in getattr(
                type(thing), "__dataclass_fields__", ()
            )
            if not taken and (not callable(item) or (declared and isinstance(item, type))):
                object.__setattr__(thing, name, item)

    def _new_error(self, kinds: Any, arguments: Any, attributes: Any, cause: Any) -> BaseException:
        """An exception of the nearest class that this side knows."""
        index = len(self.objects)
        self.objects.append(None)
        values = [self.decode(x) for x in arguments]
        kind = self._nearest_error_class(kinds)
        error = None
        if kind.__module__ not in (*OWN_MODULES, __name__):
            with suppress(Exception):  # some take other arguments than those in `args`
                error = kind(*values)
        if error is None:
            error = kind.__new__(kind, *values)
            error.args = tuple(values)
        self.objects[index] = error
        self._set_attributes(error, attributes)
        error.__cause__ = self.decode(cause)
        return error

    def _nearest_error_class(self, kinds: list[list[str]]) -> type[BaseException]:
        """The class itself if known, else one of its name on the nearest known base."""
        nearest = next(filter(None, (self._error_class(*names) for names in kinds)))
        (module, name), *_ = kinds
        if module not in OWN_MODULES or self._error_class(module, name) is not None:
            return nearest
        return _class_of_error(name.rpartition(".")[2], nearest)

    def _error_class(self, module: str, name: str) -> type[BaseException] | None:
        other = getattr(sys.modules.get(module), "__dict__", {})
        known = (self.classes if module in OWN_MODULES else other).get(name)
        return known if isinstance(known, type) and issubclass(known, BaseException) else None

    def own_class(self, name: str) -> type | None:
        """A class that the reader's code defines, rather than imports; None without one."""
        known = self.classes.get(name)
        is_own = isinstance(known, type) and known.__module__ in OWN_MODULES
        return known if is_own else None

    def _namedtuple(self, name: str, fields: list[str], items: list[Any]) -> Any:
        kind: Any = self.own_class(name)
        if list(getattr(kind, "_fields", ())) != fields:
            kind = namedtuple(name, fields)
        values = map(self.decode, items)
        return tuple.__new__(kind, (self.uncalled(value) for value in values))

    def uncalled(self, value: Any) -> Any:
        """The value, but `Opaque` for an untrusted callable, which a test could call."""
        return Opaque() if self.untrusted and callable(value) else value

    def _member(self, name: str, member: str, value: Any) -> Any:
        kind = self.own_class(name)
        if kind is not None and issubclass(kind, enum.Enum):
            return kind[member]
        plain = self.decode(value)
        return plain if isinstance(plain, int | str) else Opaque()


@functools.lru_cache(1024)
def _class_of_error(name: str, base: type[BaseException]) -> type[BaseException]:
    return type(name, (base,), {"__module__": __name__})


@contextmanager
def deeply() -> Iterator[None]:
    """Context with a recursion limit high enough for deeply nested values, such as linked lists."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, _DEEPEST))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def encode(value: Any) -> Any:
    """Plain data in JSON's types, as a tree."""
    return Encoder().encode(value)


def decode(value: Any) -> Any:
    """The inverse of `encode`. Raises ValueError for what `encode` does not write."""
    return Decoder().decode(value)
