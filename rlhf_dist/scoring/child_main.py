"""The process in which a user's function or pattern runs: read a request, do it, answer, until the other end closes.

Started by `child.py` as a script, so that it needs nothing but the standard library and the user's own modules. It is
the main thread that runs them: signals and event loops work there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import difflib
import importlib
import inspect
import json
import os
import re
import resource
import signal
import socket
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

PR_SET_PDEATHSIG = 1
HEADER = 8
"""Bytes before each message: its length."""


class Refused(Exception):
    """The user's function cannot be used; the message says why."""


def receive(channel: socket.socket, before: Callable[[], None] | None = None, most: int = 1 << 40) -> Any | None:
    """The next message; None when the other end has closed. `before` is called before each wait for a part of it.

    `most`: bytes that it may have. Raises ValueError or RecursionError for what is no message."""
    header = _exactly(channel, HEADER, before)
    size = 0 if header is None else int.from_bytes(header, "big")
    if size > most:
        raise ValueError(f"a message of {size} bytes")
    body = None if header is None else _exactly(channel, size, before)
    return None if body is None else json.loads(body)


def send(channel: socket.socket, message: Any) -> None:
    """One message, JSON; NaN and infinity as Python writes them."""
    body = json.dumps(message).encode()
    channel.sendall(len(body).to_bytes(HEADER, "big") + body)


def _exactly(channel: socket.socket, size: int, before: Callable[[], None] | None) -> bytes | None:
    body = bytearray()
    while len(body) < size:
        if before is not None:
            before()
        part = channel.recv(min(size - len(body), 1 << 20))
        if not part:
            return None
        body += part
    return bytes(body)


def main() -> None:
    """Serve one task over the socket whose number is the argument."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(channel.fileno(), False)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a pattern that hangs would outlive the run
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # what the parent's thread blocked is no business of the user's
    start = receive(channel)
    if start is None or os.getppid() != start.get("parent", os.getppid()):
        return
    for name, most in start.get("limits", {}).items():
        _limit(getattr(resource, f"RLIMIT_{name}"), most)
    for stream in (sys.stdout, sys.stderr):  # the process is killed at its end, so nothing may wait in a buffer
        stream.reconfigure(errors="backslashreplace", line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv = [""]
    sys.path[:] = start["path"]
    made = {"function": _function, "pattern": _pattern, "verifier": _verifier, "library": _library}
    (answer,) = [make(start[task], channel) for task, make in made.items() if task in start]
    while (request := receive(channel)) is not None:
        send(channel, answer(request))


def _limit(kind: int, most: int) -> None:
    """Set one of the limits; where a lower one is set already, that stays: it cannot be raised."""
    _, there = resource.getrlimit(kind)
    most = most if there == resource.RLIM_INFINITY else min(most, there)
    resource.setrlimit(kind, (most, most))


def _pattern(pattern: str, channel: socket.socket) -> Callable[[Any], Any]:
    compiled = re.compile(pattern, re.DOTALL)
    send(channel, {"loaded": True})
    return lambda response: compiled.fullmatch(response) is not None


def _verifier(library: str, channel: socket.socket) -> Callable[[Any], Any]:
    from rlhf_dist.scoring.verifier_main import answerer

    try:
        answer = answerer()
    except BaseException as error:
        send(channel, {"refused": f"importing {library} raised {told(error, None)}"})
        return lambda request: False
    send(channel, {"loaded": library})
    return answer


def _library(setting: str, channel: socket.socket) -> Callable[[Any], Any]:
    from rlhf_dist.scoring import library_main

    try:
        call = library_main.reward(json.loads(setting))
    except BaseException as error:
        refused = str(error) if isinstance(error, library_main.Refused) else f"loading it raised {told(error, None)}"
        send(channel, {"refused": refused})
        return lambda request: {"refused": "it could not be loaded"}
    send(channel, {"loaded": setting})
    return _calls(call, None)


def _function(path: str, channel: socket.socket) -> Callable[[Any], Any]:
    """Imports the function and says so; after that, each request is a call."""
    try:
        module, function = load(path)
    except Refused as refused:
        send(channel, {"refused": str(refused)})
        return lambda request: {"refused": "it could not be loaded"}
    send(channel, {"loaded": path})
    return _calls(function, module)


def _calls(function: Callable[..., Any], module: ModuleType | None) -> Callable[[Any], Any]:
    """(prompts, responses, answers) -> what the function gave, or why there is nothing. `module`: the user's."""
    loop = asyncio.new_event_loop()  # one for all calls: what a user opened in the first belongs to its loop

    def call(request: list[list[str]]) -> dict[str, Any]:
        from rlhf_dist.scoring.score_list import NotNumbers, plain_numbers

        responses = list(request[1])
        try:
            return {"values": plain_numbers(_finished(function(*request), loop), responses)}
        except NotNumbers as wrong:
            return {"wrong": str(wrong)}
        except BaseException as error:  # SystemExit too: it would end this process without a word
            return {"raised": told(error, module)}

    return call


def _finished(result: Any, loop: asyncio.AbstractEventLoop) -> Any:
    """What an `async def` returns is awaited, and a generator's values are taken."""
    if inspect.isawaitable(result):
        result = loop.run_until_complete(_awaited(result))
    if inspect.isasyncgen(result):
        result = loop.run_until_complete(_listed(result))
    # A 0-d array has no items; a dict or a set has no order that responses have.
    many = hasattr(result, "__iter__") and getattr(result, "ndim", 1) > 0
    return list(result) if many and not isinstance(result, (dict, set, frozenset, str, bytes)) else result


async def _awaited(result: Any) -> Any:
    return await result


async def _listed(result: Any) -> list[Any]:
    return [value async for value in result]


def load(path: str) -> tuple[ModuleType, Callable[..., Any]]:
    """The module and the function of `package.module:function`. Raises Refused."""
    module_name, _, attribute = path.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # at the end: a file here cannot hide an installed package
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise Refused(_missing(error, module_name, here)) from error
    except BaseException as error:
        raise Refused(f"importing {module_name} raised {told(error, None)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        near = difflib.get_close_matches(attribute, names, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        kind = f" ({attribute} is {type(getattr(module, attribute)).__name__})" if hasattr(module, attribute) else ""
        raise Refused(
            f"{module.__file__} has no function {attribute!r}{kind}; it has {', '.join(names) or 'none'}{meant}"
        )
    _check_signature(attribute, function)
    return module, function


def _missing(error: ModuleNotFoundError, module_name: str, here: str) -> str:
    message = f"no module named {error.name!r}; it has to be installed or in PYTHONPATH or {here}"
    if error.name not in (module_name, module_name.partition(".")[0]):
        return f"{message}; it is imported at {_place(error, None)}"
    near = difflib.get_close_matches(module_name, [file.stem for file in Path(here).glob("*.py")], 1)
    return f"{message}; did you mean {near[0]}?" if near else message


def _check_signature(attribute: str, function: Callable[..., Any]) -> None:
    called = "it is called with (prompts, responses, answers)"
    if inspect.isclass(function):
        raise Refused(f"{attribute} is a class; name a function, or an object of the class that can be called")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise Refused(f"{attribute} does not say which arguments it takes; wrap it in a function; {called}") from None
    try:
        signature.bind([], [], [])
    except TypeError as error:
        raise Refused(f"is {attribute}{signature}; {called}") from error
    order = ["prompts", "responses", "answers"]
    given = list(signature.parameters)[:3]
    if any(name in order and order.index(name) != place for place, name in enumerate(given)):
        raise Refused(f"is {attribute}{signature}; {called}, in this order")


def told(error: BaseException, module: ModuleType | None) -> str:
    """Type, message and the user's line."""
    with contextlib.suppress(Exception):
        if isinstance(error, SyntaxError):
            return f"{type(error).__name__}: {error.msg} at {error.filename}:{error.lineno}"
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return f"{message} at {_place(error, module)}"
    return f"{type(error).__name__}, whose message cannot be shown"


def _place(error: BaseException, module: ModuleType | None) -> str:
    """The deepest line in the function's own file, else the deepest outside Python's own and installed libraries."""
    frames = list(traceback.extract_tb(error.__traceback__))
    paths = sysconfig.get_paths()
    libraries = tuple(os.path.join(paths[name], "") for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    mine = [frame for frame in frames if not frame.filename.startswith((*libraries, "<", __file__))]
    own = [frame for frame in frames if module is not None and frame.filename == module.__file__]
    where = (own or mine or frames)[-1]
    return f"{where.filename}:{where.lineno}"


if __name__ == "__main__":
    main()
