"""Who may write in a run directory, and whether a write there stays there."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf_dist.errors import ConfigError
from rlhf_dist.models.guarded_files import kind

LOCK_FILE = "run.lock"
INHERITED = "RLHF_DIST_RUN_LOCK"
"""Environment variable of a command that `train --supervise` starts: the descriptor of a lock that its parent holds,
and holds on to between two starts."""
FOREIGN = "wandb"
"""A folder whose links are wandb's own. Each start of wandb makes new files in a new folder below it, and replaces the
links beside that folder."""
FOLDERS = ("answers", "checkpoints", "logs", "rollouts", FOREIGN)
SUFFIXES = (".jsonl", ".json", ".yaml", ".sqlite", ".png", ".html", ".log", ".pid")
"""What is a directory in a run's directory, and what is a file there or in `logs`."""
LONGEST_INSIDE = 160
"""Characters of the longest path below a run directory, with room to spare."""


def require_place(output: str, name: str) -> None:
    """Reject an `output` and `name` below which no run directory could be made. Writes nothing.

    Raises ConfigError naming the key, and what would be right.
    """
    parts = Path(name).parts
    if not name.strip() or not parts or not name.isprintable() or Path(name).is_absolute() or ".." in parts:
        raise ConfigError(f"name: {name!r} is not a name for a directory inside {output}; use for example name=my-run")
    if not output.strip() or not output.isprintable():
        raise ConfigError(f"output: {output!r} is not the path of a directory; use for example output=runs")
    path = Path(output).absolute()
    try:
        there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
        if not there.is_dir():
            what = "a link that leads nowhere" if there.is_symlink() and not there.exists() else "a file"
            raise ConfigError(f"output: {there} is {what}, not a directory; give another output=")
        longest = os.pathconf(there, "PC_NAME_MAX")
        whole = os.pathconf(there, "PC_PATH_MAX") - LONGEST_INSIDE
        for key, value in (("output", Path(output)), ("name", Path(name))):
            long = next((part for part in value.parts if len(os.fsencode(part)) > longest), None)
            if long is not None:
                raise ConfigError(
                    f"{key}: {long[:20]}... is {len(os.fsencode(long))} bytes long, and a file's name has at most "
                    f"{longest} here; give a shorter one"
                )
        if len(os.fsencode(path / name)) > whole:
            raise ConfigError(
                f"output and name: together they are {len(os.fsencode(path / name)):,} bytes long, and at most "
                f"{whole:,} work; give a shorter output= or name="
            )
        _require_writable(path / name)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(f"output: {path} cannot be used: {why}; give another output=") from error


def _require_writable(run: Path) -> None:
    """Of the directories above `run`, the first that is there must take a new entry, or a file in `run` itself."""
    there = next(parent for parent in (run, *run.parents) if os.path.lexists(parent))
    if there.is_symlink() and not there.exists():
        raise ConfigError(f"{there}: is a link that leads nowhere; remove it, or give another name=")
    if not there.is_dir():
        raise ConfigError(f"{there}: is a file, not a directory; give another name=")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"output: {there} cannot be written to (no permission, or read-only); give another output=")


def refuse_links(run: Path) -> None:
    """Reject a run directory with links, pipes or devices in it: a write to one of them would go somewhere else.

    So would one to a file with a second name (a hard link) that is written in place; files of a checkpoint are not.
    A directory in the place of a file could not be written, nor could the reverse. Raises ConfigError naming the first.
    """
    for folder, folders, files in os.walk(run):
        here = Path(folder)
        in_place = here in (run, run / "logs")
        for name in [*folders, *files]:
            path = here / name
            with suppress(FileNotFoundError):
                found = path.lstat()
                what = kind(found.st_mode)
                twice = in_place and stat.S_ISREG(found.st_mode) and found.st_nlink > 1
                foreign = what == "a symbolic link" and _is_wandbs(path, run / FOREIGN)
                if in_place and what == "a directory" and path.suffix in SUFFIXES:
                    raise ConfigError(f"{path}: is a directory, not a file; move it away, or give another name=")
                if here == run and not what and name in FOLDERS:
                    raise ConfigError(f"{path}: is a file, not a directory; move it away, or give another name=")
                if (what and what != "a directory" and not foreign) or twice:
                    reason = f"is {what}" if what else "has a second name elsewhere (a hard link)"
                    raise ConfigError(
                        f"{path}: {reason}, and a run only writes to files of its own directory; replace it by a "
                        "copy of the file, or start a new run with another name="
                    )


def _is_wandbs(link: Path, folder: Path) -> bool:
    """A link that wandb may have made: within an earlier run's folder, to its own log in the user's cache, or to that.

    Nothing is written through the former any more.
    """
    if link.parent != folder:
        return link.parent.is_relative_to(folder)
    return link.resolve().is_relative_to(folder.parent.resolve() / folder.name)


def take_lock(run: Path) -> int:
    """Lock a run directory for this process; returns the descriptor that holds the lock.

    Raises ConfigError naming the process that holds the lock, or what is wrong with run.lock.
    """
    descriptor = _hold(run, os.O_RDWR | os.O_CREAT)
    if _inherited(run / LOCK_FILE) is None:  # else the file names the parent, who is to be asked to end
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
    return descriptor


def _inherited(path: Path) -> int | None:
    """The descriptor of this file that the parent of this process handed down; None where there is none."""
    number = os.environ.get(INHERITED, "")
    try:
        if not number.isdecimal() or not os.path.samestat(os.fstat(int(number)), path.lstat()):
            return None
        os.set_inheritable(int(number), False)
    except (OSError, OverflowError):
        return None
    return int(number)


@contextmanager
def looked_at(run: Path) -> Iterator[None]:
    """Keep other processes out for a while, and write nothing. Raises ConfigError, see `take_lock`."""
    descriptor = _hold(run, os.O_RDONLY)
    try:
        yield
    finally:
        os.close(descriptor)


def _hold(run: Path, flags: int) -> int:
    path = run / LOCK_FILE
    try:
        # O_NOFOLLOW: what a link points to must not be emptied. O_NONBLOCK: a named pipe must not be waited for.
        handed = _inherited(path)
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o644) if handed is None else os.dup(handed)
    except OSError as error:
        what = kind(path.lstat().st_mode) if os.path.lexists(path) else ""
        reason = f"is {what}, not a file" if what else f"cannot be opened: {error.strerror}"
        raise ConfigError(f"{path}: {reason}; remove it if no process uses this run, or give another name=") from None
    found = os.fstat(descriptor)
    what = kind(found.st_mode) or ("a file with a second name elsewhere" if found.st_nlink > 1 else "")
    if what:
        os.close(descriptor)
        raise ConfigError(f"{path}: is {what}; remove it if no process uses this run, or give another name=")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode("ascii", errors="replace").strip()
        os.close(descriptor)
        holder = f"process {holder}" if holder.isdecimal() else "another process"
        raise ConfigError(f"{run}: {holder} is using this run; wait for it, or give another name=") from None
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(
            f"{path}: cannot be locked ({error.strerror}); give an output= on a disk that can lock files"
        ) from None
    return descriptor
