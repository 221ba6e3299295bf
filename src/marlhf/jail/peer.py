"""A conversation of a program and its test, each in a jail of its own.

Either asks the other to use a thing of its own, a function say, with arguments, and answers what
it is asked meanwhile. Arguments are copies; what was changed in them is changed at the caller's
too. Each request has a number that nobody can guess, which its reply must give back: who replies
was alive to read it.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import IO, Any, NoReturn

from marlhf.jail.values import Decoder, Encoder

LINE_LIMIT = 1 << 22  # characters
_PRINTED = 1 << 18  # bytes, of what is printed during one call

_ACTIONS: dict[str, Callable[..., Any]] = {
    "call": lambda thing, *arguments, **keywords: thing(*arguments, **keywords),
    "next": next,
    "iter": iter,
    "send": lambda thing, value: thing.send(value),
    "await": lambda thing: importlib.import_module("asyncio").run(thing),
    "ping": lambda _: None,
}


class Peer:
    """One end. It lends things out by number: `target`, which it answers for, is number 0.

    classes: names that this end's code defines.
    believes: whether the other end is trusted: it may write long lines, and name what this end is
        to import of the standard library.
    """

    def __init__(self, reader: IO[str], writer: IO[str], believes: bool) -> None:
        self.reader, self.writer, self.believes = reader, writer, believes
        self.classes: Mapping[str, Any] = {}
        self.lent: list[Any] = [None]
        self._numbers: dict[int, int] = {}
        self._borrowed: dict[int, tuple[Any, int]] = {}  # generators, by their ids
        self._prints: _Printed | None = None
        self._lock = threading.RLock()

    def ask(self, action: str, number: int, *arguments: Any, **keywords: Any) -> Any:
        """Have the other end do something; what it raises is raised here.

        Does not return if it cannot answer, whatever the caller would have made of an exception.
        """
        encoder = self._encoder()
        content = encoder.encode([arguments, keywords])
        with self._lock:
            try:
                reply = self.converse({"do": action, "of": number, "with": content})
                decoder = self._decoder(encoder.objects)
                value = decoder.decode(reply["raise" if "raise" in reply else "value"])
                for thing in reply.get("objects", ()):
                    decoder.decode(thing)
                sys.stdout.write(reply.get("printed", ""))
                if "raise" not in reply:
                    return value
                if not isinstance(value, Exception):
                    raise ValueError("not an exception")
            except BaseException as error:
                self.gone(error)
        raise self.crossed(value, action)

    def gone(self, error: BaseException) -> NoReturn:
        """Called where the other end has ended, hangs, or says what is no reply."""
        os._exit(1)

    def crossed(self, error: Exception, action: str) -> Exception:
        """What to raise for an exception of the other end's."""
        return error

    def converse(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and do what the other end asks for until it replies."""
        key = os.urandom(8).hex()
        self._write({**request, "key": key})
        while "do" in (message := self.read()):
            self._write(self.answer(message))
        if message["key"] != key:
            raise ValueError("a reply to something else")
        return message

    def serve(self, target: Any) -> None:
        """Answer requests for `target` until the other end closes."""
        self.lent[0] = target
        while True:
            with self._lock:
                try:
                    message = self.read()
                except EOFError:
                    return
            reply = self.answer(message)
            with self._lock:
                self._write(reply)

    def read(self) -> dict[str, Any]:
        """The other end's next message. Raises EOFError at the end, ValueError for no message."""
        message = json.loads(self.line())
        if not isinstance(message, dict):
            raise ValueError("not a message")
        return message

    def line(self) -> str:
        """The text of the other end's next message."""
        line = self.reader.readline() if self.believes else self.reader.readline(LINE_LIMIT)
        if not line:
            raise EOFError
        if not line.endswith("\n"):
            raise ValueError("not a line")
        return line

    def _write(self, message: dict[str, Any]) -> None:
        self.writer.write(json.dumps(message) + "\n")
        self.writer.flush()

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks for."""
        decoder = self._decoder()
        arguments, keywords = decoder.decode(message["with"])
        before = self._as_text(decoder.objects)
        action, thing = _ACTIONS[message["do"]], self.lent[message["of"]]
        kind = "value"
        try:
            result = action(thing, *arguments, **keywords)
        except Exception as error:
            kind, result = "raise", error
        encoder = self._encoder(decoder.objects)
        reply = {"key": message["key"], kind: encoder.encode(result), **self._printed()}
        if self._as_text(decoder.objects) != before:
            reply["objects"] = [encoder.encode(thing) for thing in decoder.objects]
        return reply

    def print_to_other(self) -> None:
        """Have what is printed here while the other end is answered printed there."""
        self._prints = _Printed()
        sys.stdout = io.TextIOWrapper(self._prints, "utf-8", "replace", write_through=True)

    def _printed(self) -> dict[str, str]:
        if self._prints is None or not self._prints.tell():
            return {}
        text = self._prints.getvalue().decode("utf-8", "replace")
        self._prints.seek(0)
        self._prints.truncate()
        return {"printed": text}

    def _as_text(self, objects: list[Any]) -> str:
        return json.dumps(self._encoder().encode(objects)) if objects else ""

    def _encoder(self, known: list[Any] | None = None) -> Encoder:
        return Encoder(numbered=True, known=known or (), export=self._lend)

    def _decoder(self, given: list[Any] | None = None) -> Decoder:
        return Decoder(self.classes, given, self._borrow)

    def _lend(self, value: Any) -> dict[str, Any] | None:
        """The name or number of what cannot be copied; None where it can."""
        if isinstance(value, Lent) or id(value) in self._borrowed:
            is_lent = isinstance(value, Lent)
            return {"yours": value.number if is_lent else self._borrowed[id(value)][1]}
        if (name := self._library_name(value)) is not None:
            return {"name": name}
        kind = next((name for name, fits in _LENT.items() if fits(value)), None)
        if kind is None:
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.lent)
            self.lent.append(value)
        number = self._numbers[id(value)]
        return {"class": [value.__name__, number]} if isinstance(value, type) else {kind: number}

    def _library_name(self, value: Any) -> list[str] | None:
        """A function's or class's place in the standard library, if the other end may know it."""
        module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
        if self.believes or not callable(value) or not isinstance(module, str):
            return None
        if module not in sys.stdlib_module_names or not isinstance(name, str):
            return None
        found = getattr(sys.modules.get(module), name, None)
        return [module, name] if found is value else None

    def _borrow(self, kind: str, content: Any) -> Any:
        if kind == "yours":
            return self.lent[content]
        if kind == "name" and self.believes:
            return getattr(importlib.import_module(content[0]), content[1])
        if kind == "awaitable":
            return _wait_for(self, content)
        if kind == "class":
            known = self._decoder().own_class(content[0])
            return Function(self, content[1]) if known is None else known
        if kind == "generator":
            generator = _generate(self, content)
            self._borrowed[id(generator)] = generator, content
            return generator
        return {"function": Function, "iterator": LentIterator, "iterable": Lent}[kind](
            self, content
        )


_LENT: dict[str, Callable[[Any], bool]] = {
    "awaitable": inspect.iscoroutine,
    "generator": inspect.isgenerator,
    "iterator": lambda x: hasattr(type(x), "__next__"),
    "function": lambda x: inspect.isroutine(x) or isinstance(x, type) or _called_alone(x),
    "iterable": lambda x: hasattr(type(x), "__iter__"),
}


def _called_alone(value: Any) -> bool:
    """Whether a value is an object whose use is to be called, as a partial function is."""
    return callable(value) and not hasattr(type(value), "__iter__")


class _Printed(io.BytesIO):
    """Keeps the first of what is written to it."""

    def write(self, data: Any, /) -> int:
        super().write(bytes(data)[: max(_PRINTED - self.tell(), 0)])
        return len(data)


class Lent:
    """Something that stays at the other end: it can be gone through, and compared with nothing."""

    def __init__(self, peer: Peer, number: int) -> None:
        self.number = int(number)
        self._ask = peer.ask

    def __iter__(self) -> Iterator[Any]:
        return self._ask("iter", self.number)


class LentIterator(Lent):
    """An iterator that stays at the other end."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._ask("next", self.number)


class Function(Lent):
    """A function that stays at the other end."""

    __iter__ = None  # type: ignore[assignment]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._ask("call", self.number, *arguments, **keywords)


def _generate(peer: Peer, number: int) -> Generator[Any, Any, Any]:
    """A generator that stays at the other end."""
    sent = None
    try:
        while True:
            sent = yield peer.ask("send", number, sent)
    except StopIteration as end:
        return end.value


async def _wait_for(peer: Peer, number: int) -> Any:
    return peer.ask("await", int(number))
