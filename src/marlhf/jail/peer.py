"""Requests and replies between a program and its test, each in its own jail.

Either end asks the other to use one of its objects, such as a function, with arguments, and answers
requests while it waits. Arguments are copied; changes to them are copied back to the caller. Each
request has an unguessable number that its reply must repeat: whoever replies was alive to read it.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import sys
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, NoReturn

from marlhf.jail.lent import (
    ALWAYS,
    NAMES,
    NEVER,
    SPECIAL,
    Lent,
    class_of,
    generate,
    number_of,
    special_methods,
    wait_for,
)
from marlhf.jail.values import OWN_MODULES, Decoder, Encoder, deeply

LINE_LIMIT = 1 << 22  # characters
_PRINTED = 1 << 18  # bytes, of what is printed during one call

_ACTIONS: dict[str, Callable[..., Any]] = {
    "__call__": lambda thing, *arguments, **keywords: thing(*arguments, **keywords),
    "__next__": next,
    "__iter__": iter,
    "send": lambda thing, value: thing.send(value),
    "throw": lambda thing, error: thing.throw(error),
    "close": lambda thing: thing.close(),
    "isinstance": lambda thing, value: isinstance(value, thing),
    "ping": lambda _: None,
}
_OF_ATTRIBUTES: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
}


class Peer:
    """One end of a conversation. It lends objects by number; number 0 is the target of `serve`.

    classes: names that this end's code defines.
    trusts_other: whether the other end may write long lines, use every attribute of lent objects,
        and have this end import names of the standard library.
    trust: trust level of the other end's objects (see `marlhf.jail.lent`).
    """

    def __init__(self, reader: IO[str], writer: IO[str], trusts_other: bool) -> None:
        self.reader, self.writer, self.trusts_other = reader, writer, trusts_other
        self.classes: Mapping[str, Any] = {}
        self.trust = ALWAYS if trusts_other else NEVER
        self.lent: list[Any] = [None]
        self._shared: frozenset[str] = frozenset()  # classes that both ends define
        self._numbers: dict[int, int] = {}
        self._proxies: dict[tuple[int, int], Lent] = {}
        self._borrowed: dict[int, tuple[Any, int]] = {}  # generators, by their ids
        self._loop: Any = None
        self._prints: _Printed | None = None
        self._lock = threading.RLock()
        self._held = _Held()

    def ask(self, action: str, number: int, *arguments: Any, **keywords: Any) -> Any:
        """Have the other end run an action; returns or raises what it returns or raises.

        Calls `gone`, which does not return, where the other end cannot answer: an exception might
        be caught.
        """
        encoder = self._encoder()
        with deeply():
            content = encoder.encode([arguments, keywords])
        with self._lock, self._held, deeply():
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

    def ask_if_idle(self, action: str, number: int) -> None:
        """Ask, unless within another request, where the garbage collector may call this."""
        if not self._held.times:
            self.ask(action, number)

    def gone(self, error: BaseException) -> NoReturn:
        """Called where the other end has exited, hangs, or sends no valid reply."""
        os._exit(1)

    def crossed(self, error: Exception, action: str) -> Exception:
        """The exception to raise for one of the other end."""
        return error

    def converse(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request, and answer the other end's requests until it replies."""
        key = os.urandom(8).hex()
        self._write({**request, "key": key})
        while "do" in (message := self.read()):
            self._write(self.answer(message))
        if message["key"] != key:
            raise ValueError("a reply to something else")
        return message

    def meet(self, others: list[str] | None = None) -> list[str]:
        """Exchange the names of each end's classes."""
        names = [n for n, value in self.classes.items() if _is_own_class(value)]
        theirs: Any = self.ask("meet", 0, names) if others is None else others
        self._shared = frozenset(names).intersection(theirs)
        return names

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
        """The other end's next message. Raises EOFError at the end, ValueError if it is invalid."""
        with deeply():
            message = json.loads(self.line())
        if not isinstance(message, dict):
            raise ValueError("not a message")
        return message

    def line(self) -> str:
        """The text of the other end's next message."""
        line = self.reader.readline() if self.trusts_other else self.reader.readline(LINE_LIMIT)
        if not line:
            raise EOFError
        if not line.endswith("\n"):
            raise ValueError("not a line")
        return line

    def _write(self, message: dict[str, Any]) -> None:
        with deeply():
            self.writer.write(json.dumps(message) + "\n")
        self.writer.flush()

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Run a request, and return the reply."""
        decoder = self._decoder()
        with deeply():
            arguments, keywords = decoder.decode(message["with"])
            before = self._as_text(decoder.objects)
        kind = "value"
        try:
            result = self._do(message["do"], message["of"], *arguments, **keywords)
        except Exception as error:
            kind, result = "raise", error
        encoder = self._encoder(decoder.objects)
        with deeply():
            reply = {"key": message["key"], kind: encoder.encode(result), **self._printed()}
            if self._as_text(decoder.objects) != before:
                reply["objects"] = [encoder.encode(thing) for thing in decoder.objects]
        return reply

    def _do(self, action: str, number: int, *arguments: Any, **keywords: Any) -> Any:
        thing = self.lent[number]
        if action == "meet":
            return self.meet(*arguments)
        if action == "await":
            return self._run(thing)
        if action in _OF_ATTRIBUTES:
            if not (self.trusts_other or _is_open(thing, action, *arguments)):
                raise AttributeError(f"{type(thing).__name__!r} object has no attribute of yours")
            return _OF_ATTRIBUTES[action](thing, *arguments)
        if action in _ACTIONS:
            return _ACTIONS[action](thing, *arguments, **keywords)
        if action not in SPECIAL:
            raise ValueError("not an action")
        return getattr(type(thing), action)(thing, *arguments, **keywords)

    def _run(self, awaitable: Any) -> Any:
        """The result of an awaitable, in an event loop kept for this end's lifetime."""
        asyncio = importlib.import_module("asyncio")

        async def wait() -> Any:
            return await awaitable

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._loop = self._loop or asyncio.new_event_loop()
            return self._loop.run_until_complete(wait())
        # the loop of this thread is itself waiting for this result: use one in another thread
        with importlib.import_module("concurrent.futures").ThreadPoolExecutor(1) as pool:
            times = self._held.times
            for _ in range(times):
                self._lock.release()
            try:
                return pool.submit(asyncio.run, wait()).result()
            finally:
                for _ in range(times):
                    self._lock.acquire()

    def print_to_other(self) -> None:
        """Have the other end print what its requests print here."""
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
        return Encoder(numbered=True, known=known or (), export=self._lend, shared=self._shared)

    def _decoder(self, originals: list[Any] | None = None) -> Decoder:
        return Decoder(self.classes, originals, self._borrow, untrusted=not self.trusts_other)

    def _lend(self, value: Any) -> dict[str, Any] | None:
        """Name or number of an object that cannot be copied, else None."""
        if isinstance(value, Lent):
            return {"yours": number_of(value)}
        if id(value) in self._borrowed:
            return {"yours": self._borrowed[id(value)][1]}
        if (name := self._library_name(value)) is not None:
            return {"name": name}
        if isinstance(value, types.ModuleType) or not (self.trusts_other or _may_be_lent(value)):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.lent)
            self.lent.append(value)
        number = self._numbers[id(value)]
        if inspect.isgenerator(value):
            return {"generator": number}
        if inspect.isawaitable(value) and type(value).__module__ not in OWN_MODULES:
            return {"awaitable": number}
        if isinstance(value, type):
            return {"class": [number, value.__name__, ["__call__"]]}
        return {"thing": [number, type(value).__name__, special_methods(value)]}

    def _library_name(self, value: Any) -> list[str] | None:
        """Module and name of a standard-library object that the other end may use, else None."""
        module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
        if self.trusts_other or not callable(value) or not isinstance(module, str):
            return None
        if module not in sys.stdlib_module_names or not isinstance(name, str):
            return None
        is_public = getattr(sys.modules.get(module), name, None) is value
        return [module, name] if is_public else None

    def _borrow(self, kind: str, content: Any) -> Any:
        if kind == "yours":
            return self.lent[content]
        if kind == "name" and self.trusts_other:
            return getattr(importlib.import_module(content[0]), content[1])
        if kind == "awaitable":
            return wait_for(self, int(content))
        if kind == "generator":
            generator = generate(self, int(content))
            self._borrowed[id(generator)] = generator, content
            return generator
        if kind not in ("class", "thing"):
            raise ValueError(kind)
        number, name, special = content
        known = self._decoder().own_class(name) if kind == "class" else None
        return self.proxy(number, name, special, kind == "class") if known is None else known

    def proxy(
        self,
        number: int,
        name: str,
        special: Iterable[str],
        is_class: bool = False,
        trust: int | None = None,
    ) -> Lent:
        """The proxy of a remote object, at a trust level (default: this end's)."""
        trust = self.trust if trust is None else trust
        key = int(number), trust
        if key not in self._proxies:
            kind = class_of(name, tuple(special), is_class, trust)
            self._proxies[key] = kind(self, int(number))
        return self._proxies[key]

    def with_trust(self, proxy: Lent, trust: int) -> Lent:
        """A proxy of the same object at another trust level."""
        if self.trusts_other:
            return proxy
        kind = type(proxy)
        special = sorted(SPECIAL.intersection(vars(kind)))
        return self.proxy(number_of(proxy), kind.__name__, special, trust=trust)


def _is_own_class(value: Any) -> bool:
    return isinstance(value, type) and value.__module__ in OWN_MODULES


def _is_open(thing: Any, action: str, name: str, value: Any = None) -> bool:
    """Whether a program may read or set an attribute of one of its test's objects."""
    is_own = _is_own_class(thing) or type(thing).__module__ in OWN_MODULES
    if name in NAMES and action == "getattr":
        return True
    if name.startswith("_") or not (
        is_own or (action == "getattr" and isinstance(thing, io.IOBase))
    ):
        return False
    return action == "getattr" or not (callable(value) or callable(getattr(thing, name, None)))


def _may_be_lent(value: Any) -> bool:
    """Whether a program may use a value of its test (not a frame, for example)."""
    kinds = ("__iter__", "__next__", "__call__", "__await__")
    return type(value).__module__ in OWN_MODULES or any(hasattr(type(value), n) for n in kinds)


class _Held(threading.local):
    """Number of requests of this thread that are in progress."""

    times = 0

    def __enter__(self) -> None:
        self.times += 1

    def __exit__(self, *_: object) -> None:
        self.times -= 1


class _Printed(io.BytesIO):
    """A buffer that keeps only the beginning of what is written to it."""

    def write(self, data: Any, /) -> int:
        super().write(bytes(data)[: max(_PRINTED - self.tell(), 0)])
        return len(data)
