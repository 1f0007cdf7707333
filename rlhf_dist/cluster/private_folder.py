"""A folder of one run, for Ray's session and the workers' temporary files: for this user's eyes only, and removed.

Ray makes its folders writable for everybody, also one that was made for it, so that another user of the machine could
put a socket of their own in the place of one; a parent that only this user can enter prevents it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf_dist.errors import ResourceError

PREFIX = "rlhf_ray_"
PROBE = "rlhf_probe_"
SESSION, TEMPORARY = "ray", "tmp"
"""What is in the folder: Ray's own, and that of the workers' temporary files."""
RANDOM = 8
"""Characters that `mkdtemp` adds."""
SOCKET_PATH_LIMIT = 107
"""Bytes of a socket's path, on Linux."""
LONGEST_SOCKET = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Of those that Ray makes below its folder."""
OWN_NAME = len(f"/{PREFIX}") + RANDOM + len(f"/{SESSION}")
"""What is added to the parent's path."""
FOLDER_LIMIT = SOCKET_PATH_LIMIT - LONGEST_SOCKET - OWN_NAME
VARIABLES = ("RAY_TMPDIR", "TMPDIR")
"""Those that name the folder for temporary files, as Ray reads them: the first that is set counts."""
SYSTEM_FOLDERS = (Path("/tmp"), Path("/var/tmp"))
REMOVE_LIMIT_S = 10.0


def temporary_parent(environment: Mapping[str, str]) -> tuple[Path, str]:
    """Where to make the private folder, and what to tell the user if it is not where the environment says.

    Raises `ResourceError` naming the variable whose folder is missing or cannot be written.
    """
    name = next((name for name in VARIABLES if environment.get(name)), "")
    if not name:
        return system_folder("no folder for temporary files"), ""
    folder = Path(os.path.abspath(environment[name]))
    given = f"{name}={shown(environment[name])}"
    wrong = unusable(folder)
    if wrong:
        raise ResourceError(f"{given}: {wrong}; {name} has to name a folder for temporary files, or be unset")
    unfit = unfit_for_ray(folder, environment)
    if not unfit:
        return folder, ""
    instead = system_folder(f"{given}: {unfit}")
    return instead, f"{given}: {unfit}; Ray's session and the workers' temporary files are in {instead}"


def system_folder(why: str) -> Path:
    """The first of the system's own that works. Raises `ResourceError` beginning with `why`."""
    found = next((folder for folder in SYSTEM_FOLDERS if not unusable(folder) and not refuses_sockets(folder)), None)
    if found is None:
        places = " and ".join(map(str, SYSTEM_FOLDERS))
        raise ResourceError(f"{why}, and {places} cannot be used; set TMPDIR to a folder that can be written")
    return found


def unusable(folder: Path) -> str:
    """Why nothing can be put into the folder; empty: it can."""
    try:
        if not folder.exists():
            return "does not exist"
        if not folder.is_dir():
            return "is not a folder"
        with tempfile.TemporaryDirectory(prefix=PROBE, dir=folder):
            return ""
    except OSError as error:
        return f"cannot be written: {error.strerror}"


def unfit_for_ray(folder: Path, environment: Mapping[str, str]) -> str:
    """Why Ray's session cannot lie below a folder that can be written; empty: it can."""
    length = len(os.fsencode(folder))
    if length > FOLDER_LIMIT:
        return f"too long for Ray's sockets ({length} bytes, the limit is {FOLDER_LIMIT})"
    if not str(folder).isascii() or any(c.isspace() for c in str(folder)):
        return "Ray and compilers need a path of ASCII characters without spaces"
    virtual = environment.get("VIRTUAL_ENV")
    if virtual and folder.resolve().is_relative_to(Path(virtual).resolve()):
        return "inside the virtual environment, which Ray does not accept"
    return refuses_sockets(folder)


def refuses_sockets(folder: Path) -> str:
    """Why no socket can be made in the folder, which some file systems of networks refuse; empty: it can."""
    try:
        with tempfile.TemporaryDirectory(prefix=PROBE, dir=folder) as name, socket.socket(socket.AF_UNIX) as probe:
            probe.bind(f"{name}/probe")
    except OSError as error:
        return f"sockets cannot be made there ({error.strerror or error})"
    return ""


def shown(path: str) -> str:
    """A path for a message: the beginning of a very long one."""
    return path if len(path) <= 100 else f"{path[:80]}... ({len(os.fsencode(path))} bytes)"


@contextmanager
def private_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` for the time of the block, of mode 0700, with the two in it.

    Those that killed runs left are swept first.

    Raises `ResourceError` where it cannot be made.
    """
    sweep(parent)
    try:
        path, lock = make_locked(parent)
        for name in (SESSION, TEMPORARY):
            (path / name).mkdir()
    except OSError as error:
        raise ResourceError(f"{parent}: no folder can be made there: {error.strerror}") from None
    try:
        yield path
    finally:
        remove(path)
        os.close(lock)


def make_locked(parent: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock, which ends with this process."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        with suppress(FileNotFoundError):
            lock = open_folder(path)
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists():
                    return path, lock
            os.close(lock)  # the sweep of another run was faster than the lock


def open_folder(path: Path) -> int:
    """A descriptor of the folder itself, never of what a link points at."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def remove(path: Path) -> None:
    """Remove the folder; processes that are about to end may write into it once more."""
    deadline = time.monotonic() + REMOVE_LIMIT_S
    while True:
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists() or time.monotonic() > deadline:
            return
        time.sleep(0.1)


def sweep(parent: Path) -> None:
    """Remove this user's private folders of runs that were killed: nobody holds their lock."""
    for path in parent.glob(PREFIX + "?" * RANDOM):
        with suppress(OSError):  # another process is removing it too, or its run holds the lock
            lock = open_folder(path)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.getuid() and {SESSION, TEMPORARY}.issuperset(os.listdir(lock)):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
