"""Durable writes: each is counted by its name, and can fail, or be the last that the run does."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from chaos.plan import ANY_WRITE, Fault
from rlhf_dist.errors import DiskError
from rlhf_dist.loop.run_lock import LOCK_FILE

OF_A_STEP = re.compile(r"^\.?step-[0-9]+(\.unfinished|\.set-aside.*)?$")
FULL = "database or disk is full"
LEDGER = "ledger.sqlite"
HALF = 2
IN_MEMORY = "memory: "
"""Before the names of writes into shared memory."""
MAKE_FOLDER = os.mkdir
OUTPUT = "rlhf-dist-chaos-"
"""How the names of folders begin that runs are searched in."""
"""Not a write of the loop's."""


class Crash(BaseException):
    """The run is killed here. Nothing of the product may catch it for good, and nothing is written after it."""


class Disk:
    """What one life writes. After a crash, whatever cleans up on the way out finds that it cannot write either."""

    def __init__(self, folder: Path, faults: Sequence[Fault], memory: Path | None = None) -> None:
        """`folder`: the run's. `faults`: those about writes, of this life. `memory`: in place of shared memory."""
        self._folder, self._memory = folder, f"{memory}/"
        self._faults = list(faults)
        self.fired: list[Fault] = []
        self.named: dict[Fault, Fault] = {}
        """The same with the name of the write that each struck, where it was about any."""
        self.counts: Counter[str] = Counter()
        """Name of a write -> how often it was begun."""
        self.dead = False
        self._fails: Counter[bool] = Counter()
        """Writes that are still to fail: of shared memory, and of the disk."""
        self.flushes = True
        """Whether a transaction is on the disk when it ends."""
        self._flushed: dict[Path, int] = {}
        """Files that are appended to -> the length that is on the disk."""
        self._left: dict[Path, bytes] = {}
        """The ledger's files, and those whose end is not on the disk, as the crash left them."""

    def kill(self, power: bool = False) -> None:
        """Raises `Crash`. `power`: it takes along what is not on the disk yet."""
        if not self.dead:
            self.dead = True
            self._left = {path: path.read_bytes() for path in self._ledger_files() if path.exists()}
            for path, length in self._flushed.items() if power else ():
                self._left[path] = path.read_bytes()[:length]
        raise Crash

    def flushed(self, path: Path) -> None:
        """All of the file is on the disk."""
        self._flushed[path] = path.stat().st_size if path.exists() else 0

    def settle(self) -> None:
        """Once all is closed: what closing did to the ledger is undone, as a killed process closes nothing.

        What it had locked is free then.
        """
        lock = str(self._folder / LOCK_FILE)
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}") == lock:
                    os.close(int(name))
        if self.dead:
            for path in self._ledger_files():
                path.unlink(missing_ok=True)
            for path, content in self._left.items():
                path.write_bytes(content)

    def _ledger_files(self) -> list[Path]:
        return [self._folder / LEDGER, self.log]

    @property
    def log(self) -> Path:
        """Of the ledger. Below 1,000 pages SQLite writes into nothing else."""
        return self._folder / f"{LEDGER}-wal"

    def durable(
        self,
        name: str,
        act: Callable[[], Any],
        *,
        torn: Callable[[], object] = lambda: None,
        full: Callable[[], Exception] = lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ) -> Any:
        """Do a write. `torn`: half of it; `full`: what it raises where the disk has no room."""
        if self.dead:
            raise Crash
        self.counts[name] += 1
        self.counts[ANY_WRITE] += 1
        fault, in_memory = self._due(name), name.startswith(IN_MEMORY)
        if fault is not None and fault.kind == "full":
            self._fails[in_memory] = 1 + int(fault.seconds)
        if self._fails[in_memory] and not name.endswith("remove"):
            self._fails[in_memory] -= 1
            torn()
            raise full()
        if fault is not None and fault.kind in ("crash before", "torn"):
            if fault.kind == "torn":
                torn()
            self.kill()
        try:
            return act()
        finally:
            if fault is not None and fault.kind == "crash after":
                self.kill()

    def _due(self, name: str) -> Fault | None:
        for fault in self._faults:
            if fault.who in (name, ANY_WRITE) and self.counts[fault.who] == fault.at:
                self._faults.remove(fault)
                self.fired.append(fault)
                self.named[fault] = replace(fault, who=name, at=float(self.counts[name]))
                return fault
        return None

    def write(self, name: str, path: Path, text: str) -> None:
        """A whole file of a member's; the loop is told of a full disk as of any failure of a member."""
        name = self._where(path) + name
        for parent in (path.parent.parent, path.parent):
            if not parent.exists():
                MAKE_FOLDER(parent)
        self.durable(
            name,
            lambda: path.write_text(text, encoding="utf-8"),
            torn=lambda: path.write_text(text[: len(text) // HALF], encoding="utf-8"),
            full=lambda: DiskError(f"{path}: cannot be written: no space left on device"),
        )

    def _where(self, path: Any) -> str:
        return IN_MEMORY if str(path).startswith(self._memory) else ""

    @contextmanager
    def armed(self) -> Iterator[None]:
        """While the block runs, all durable writes of this process go this way."""
        real = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")}
        connect = sqlite3.connect

        def fsync(descriptor: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            half = path.stat().st_size // HALF if path.is_file() else 0
            torn = (lambda: os.truncate(path, half)) if path.suffix == ".tmp" else (lambda: None)
            self.durable(f"{self._where(path)}sync {name_of(path)}", lambda: real["fsync"](descriptor), torn=torn)
            if path in self._flushed:
                self.flushed(path)

        def moved(how: str) -> Callable[..., None]:
            def move(source: Any, target: Any, **rest: Any) -> None:
                name = f"replace {name_of(Path(target))}" if how == "replace" else rename_of(Path(target))
                self.durable(self._where(target) + name, lambda: real[how](source, target, **rest))

            return move

        def mkdir(path: Any, *rest: Any, **more: Any) -> None:
            self.durable(f"{self._where(path)}mkdir {name_of(Path(path))}", lambda: real["mkdir"](path, *rest, **more))

        def removed(how: str) -> Callable[..., None]:
            return lambda path, **rest: self.durable(self._where(path) + "remove", lambda: real[how](path, **rest))

        patched = {"fsync": fsync, "replace": moved("replace"), "rename": moved("rename"), "mkdir": mkdir}
        patched |= {"unlink": removed("unlink"), "rmdir": removed("rmdir")}
        factory = database_of(self)
        try:
            for name, call in patched.items():
                setattr(os, name, call)
            sqlite3.connect = lambda *args, **more: connect(*args, **more, factory=factory)
            yield
        finally:
            for name, call in real.items():
                setattr(os, name, call)
            sqlite3.connect = connect


def name_of(path: Path) -> str:
    """`.../.step-4.unfinished/state.json.tmp` -> `state.json`; folders of a step have one name each."""
    if OF_A_STEP.match(path.name):
        return "unfinished" if path.name.endswith(".unfinished") else "step"
    if path.name.startswith(OUTPUT):
        return "output"
    if path.name.endswith(".state"):
        return "private"
    known = {"config.json": "weights", "optimizer-0.safetensors": "optimizer", "metrics.before-resume.jsonl": "aside"}
    known |= {"checkpoints": "checkpoints", "hf": "hf"}
    return known.get(path.name, path.name.removesuffix(".tmp"))


def rename_of(target: Path) -> str:
    """A checkpoint that becomes one, or is set aside."""
    return "set aside" if ".set-aside" in target.name else f"rename {name_of(target)}"


class Lines:
    """A file of lines, as `telemetry.sinks` has it open."""

    def __init__(self, disk: Disk, file: Any, path: Path) -> None:
        self._disk, self._file, self._name = disk, file, f"line {path.name}"
        disk.flushed(path)

    def fileno(self) -> int:
        """See `io.IOBase`."""
        return self._file.fileno()

    def write(self, data: bytes) -> int:
        """All of it, or half."""
        return self._disk.durable(
            self._name,
            lambda: self._file.write(data),
            torn=lambda: self._file.write(data[: len(data) // HALF]),
        )

    def close(self) -> None:
        """Nothing is buffered."""
        self._file.close()


def database_of(disk: Disk) -> type[sqlite3.Connection]:
    """Connections whose transactions are durable writes of this disk."""

    class Database(sqlite3.Connection):
        def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
            if sql == "COMMIT":
                return self._durable("commit ledger", lambda: super(Database, self).execute(sql))
            if sql.startswith("PRAGMA synchronous="):
                disk.flushes = sql.endswith("FULL")
            if sql.startswith("PRAGMA user_version ="):
                return self._durable("ledger format", lambda: super(Database, self).execute(sql))
            return super().execute(sql, *rest)

        def executescript(self, sql: str, /) -> sqlite3.Cursor:
            return self._durable("ledger tables", lambda: super(Database, self).executescript(sql))

        def _durable(self, name: str, act: Callable[[], sqlite3.Cursor]) -> sqlite3.Cursor:
            found = disk.durable(name, act, full=lambda: sqlite3.OperationalError(FULL))
            if disk.flushes:
                disk.flushed(disk.log)
            return found

    return Database
