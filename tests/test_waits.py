"""The rule of waits, read from the source: each has a limit, or a reason why it needs none of its own.

Not seen: `with lock:` (held for moments only), and collective operations of torch, which have the limit of their
process group.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_dist"
ELSEWHERE = {
    ("cli/label.py", "serve", "serve_forever"): "a server that runs until it is told to stop",
    ("cli/serve_reward.py", "_serve", "serve_forever"): "a server that runs until it is told to stop",
    ("cli/submit.py", "asks_to_stop", "input"): "a question to somebody at the keyboard, who may press Ctrl-C",
    ("cluster/jobs.py", "_follow", "exception"): "of a task that is done",
    (
        "rollout/vllm_engine.py",
        "prepare_weights",
        "result",
    ): "a plain call in a thread of its own; who asks has a limit",
    ("scoring/child.py", "_keep", "wait"): "a thread that lives as long as the child, whose calls have limits",
    (
        "scoring/child_main.py",
        "_exactly",
        "recv",
    ): "a child waits for requests; the end of its parent closes the channel",
    ("weights/relay.py", "_serve", "accept"): "a thread that lives as long as its process; `close` wakes it",
    ("scoring/time_limits.py", "take", "acquire"): "a run gives a limit; without one, who has the turn has one",
}
"""(file, function, call) -> why a wait there has no limit of its own."""

FUNCTIONS = {
    "ray.get": 2,
    "ray.wait": 9,
    "subprocess.run": 9,
    "subprocess.call": 9,
    "subprocess.check_call": 9,
    "subprocess.check_output": 9,
    "concurrent.futures.wait": 2,
    "concurrent.futures.as_completed": 2,
    "asyncio.wait": 9,
    "asyncio.wait_for": 2,
    "select.select": 4,
    "socket.create_connection": 2,
    "urllib.request.urlopen": 3,
    "multiprocessing.connection.wait": 2,
    "signal.sigwait": 9,
    "signal.pause": 9,
    "os.wait": 9,
    "input": 9,
}
"""Function -> with how many arguments the last of them is a limit; 9: none is."""
METHODS = {
    "result": 1,
    "exception": 1,
    "join": 1,
    "wait": 1,
    "wait_for": 2,
    "communicate": 2,
    "select": 1,
    "acquire": 2,
    "serve_forever": 9,
}
"""The same of methods, by name alone. What is something else by that name, as `", ".join(names)`, has arguments."""
QUEUES = ("Queue", "SimpleQueue", "LifoQueue", "PriorityQueue", "JoinableQueue")
SOCKETS = ("accept", "recv", "recv_into", "recvfrom")
"""Have the socket's own limit, which the same function has to set."""
LIMITS = ("timeout", "timeout_s", "limit_s", "seconds")


class Waits(ast.NodeVisitor):
    """Finds (function, call) of those without a limit."""

    def __init__(self, tree: ast.Module) -> None:
        self.found: list[tuple[str, str]] = []
        self._within = [""]
        self._names: dict[str, str] = {}
        """Name in this file -> what it stands for, of imports."""
        self._queues: set[str] = set()
        """Names, also of attributes, that queues are bound to."""
        self._sets_limits = [_sets_limits(tree)]
        for node in ast.walk(tree):
            self._learn(node)
        self.visit(tree)

    def _learn(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            self._names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            self._names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign) and _makes_queue(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            self._queues |= {_last(target) for target in targets}

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._within.append(node.name)
        self._sets_limits.append(_sets_limits(node))
        self.generic_visit(node)
        self._within.pop()
        self._sets_limits.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Call(self, node: ast.Call) -> None:
        if name := self._without_limit(node):
            self.found.append((self._within[-1], name))
        self.generic_visit(node)

    def _without_limit(self, node: ast.Call) -> str:
        """The name of what waits as long as it takes; empty: it does not."""
        first, _, rest = ast.unparse(node.func).partition(".")
        name = f"{self._names.get(first, first)}.{rest}".rstrip(".")
        method = _last(node.func) if isinstance(node.func, ast.Attribute) else ""
        if name in ("os.waitpid", "fcntl.flock"):
            return "" if any(word in ast.unparse(node.args[1]) for word in ("NOHANG", "LOCK_NB", "LOCK_UN")) else name
        if name in FUNCTIONS:
            return "" if _limited(node, FUNCTIONS[name]) else name
        if method == "get" and isinstance(node.func, ast.Attribute) and _last(node.func.value) in self._queues:
            return "" if _limited(node, 2) or _at_once(node) else method
        if method == "get" and (not node.args or _is(node.args[0], True)):
            return "" if _limited(node, 2) or {word.arg for word in node.keywords} - {"block", *LIMITS} else method
        if method in SOCKETS:
            return "" if self._sets_limits[-1] else method
        if method in METHODS:
            return "" if _limited(node, METHODS[method]) or _at_once(node) else method
        return ""


def _makes_queue(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Call) and _last(value.func) in QUEUES


def _sets_limits(node: ast.AST) -> bool:
    """Whether a socket gets a limit in there."""
    places = {"settimeout": 1, "create_connection": 2}
    calls = (one for one in ast.walk(node) if isinstance(one, ast.Call) and _last(one.func) in places)
    return any(_limited(one, places[_last(one.func)]) for one in calls)


def _limited(node: ast.Call, places: int) -> bool:
    """Whether a call has a limit: as an argument at place `places` or after, or by name, that is not no limit."""
    given = node.args[places - 1 :] + [word.value for word in node.keywords if word.arg in LIMITS]
    return bool(given) and not any(_is_none(value) for value in given)


def _is_none(value: ast.expr) -> bool:
    """Whether it is, or can be, what stands for no limit: None, or -1 of a lock."""
    if isinstance(value, ast.IfExp):
        return _is_none(value.body) or _is_none(value.orelse)
    return ast.unparse(value) in ("None", "-1")


def _at_once(node: ast.Call) -> bool:
    """Whether it does not wait at all."""
    blocks = [*node.args[:1], *(word.value for word in node.keywords if word.arg in ("block", "blocking"))]
    return any(_is(value, False) for value in blocks)


def _is(value: ast.AST, constant: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


def _last(node: ast.expr) -> str:
    """`self._queue` -> `_queue`; `queue.SimpleQueue[int]` -> `SimpleQueue`."""
    match node:
        case ast.Attribute():
            return node.attr
        case ast.Name():
            return node.id
        case ast.Subscript():
            return _last(node.value)
        case _:
            return ""


def waits_without_limit(source: str) -> list[tuple[str, str]]:
    """(function, call) of what waits for another thread, process or machine as long as it takes."""
    return Waits(ast.parse(source)).found


def sources() -> Iterator[tuple[str, str]]:
    """(path in the package, text)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")


def test_every_wait_has_a_limit() -> None:
    """A wait without one hangs for as long as whom it waits for."""
    found = {(path, *one) for path, text in sources() for one in waits_without_limit(text)}
    assert found == set(ELSEWHERE)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("ray.get(call)", ["ray.get"]),
        ("ray.get(call, timeout=None)", ["ray.get"]),
        ("import ray as r\nr.get(call)", ["ray.get"]),
        ("from ray import get as fetch\nfetch(call)", ["ray.get"]),
        ("ray.wait(calls, num_returns=1)", ["ray.wait"]),
        ("subprocess.run(words, check=False)", ["subprocess.run"]),
        ("from subprocess import run\nrun(words)", ["subprocess.run"]),
        ("future.result()", ["result"]),
        ("future.result(None)", ["result"]),
        ("future.result(timeout=None if late else 3)", ["result"]),
        ("future.exception()", ["exception"]),
        ("thread.join()", ["join"]),
        ("queue.get()", ["get"]),
        ("queue.get(True)", ["get"]),
        ("queue.get(block=True)", ["get"]),
        ("self._calls = SimpleQueue()\nself._calls.get(idle)", ["get"]),
        ("found: Queue[int] = queue.Queue()\nfound.get(block=idle)", ["get"]),
        ("process.wait()", ["wait"]),
        ("event.wait(timeout=None)", ["wait"]),
        ("process.communicate(text)", ["communicate"]),
        ("condition.wait_for(lambda: done)", ["wait_for"]),
        ("lock.acquire()", ["acquire"]),
        ("lock.acquire(True)", ["acquire"]),
        ("lock.acquire(timeout=-1 if limit is None else limit)", ["acquire"]),
        ("from concurrent.futures import wait\nwait([future])", ["concurrent.futures.wait"]),
        ("select.select(a, b, c)", ["select.select"]),
        ("selector.select()", ["select"]),
        ("connection.recv(8)", ["recv"]),
        ("connection.settimeout(None)\nconnection.recv(8)", ["recv"]),
        ("listening.accept()", ["accept"]),
        ("os.waitpid(pid, 0)", ["os.waitpid"]),
        ("fcntl.flock(file, fcntl.LOCK_EX)", ["fcntl.flock"]),
        ("ray.get(call, timeout=3)\nfuture.result(0)\nthread.join(3)\n', '.join(names)\nfacts.get('a')", []),
        ("process.wait(timeout=3)\nray.wait(calls, timeout=0)\nqueue.get(timeout=2)\nqueue.get(True, 2)", []),
        ("lock.acquire(blocking=False)\nlock.acquire(timeout=3)\nlock.acquire(True, 3)\nqueue.get(False)", []),
        ("connection.settimeout(3)\nconnection.recv(8)\nselect.select(a, b, c, 3)\nselector.select(3)", []),
        ("condition.wait_for(lambda: done, 3)\nprocess.communicate(timeout=3)\nfuture.result(timeout_s)", []),
        ("os.waitpid(pid, os.WNOHANG)\nfcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", []),
    ],
)
def test_a_wait_without_a_limit_is_seen(source: str, found: list[str]) -> None:
    assert [name for _, name in waits_without_limit(source)] == found


def test_a_reason_is_for_one_function_alone() -> None:
    source = "def one():\n    thread.join()\n\nasync def other():\n    thread.join()"
    assert waits_without_limit(source) == [("one", "join"), ("other", "join")]
