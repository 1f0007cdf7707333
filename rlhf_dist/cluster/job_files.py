"""A run directory on its way from a job's node to whoever submitted it, through the log of a small second job.

`python -m rlhf_dist.cluster.job_files PATH BYTES` prints the directory, checkpoints last and as far as BYTES go.
So nothing but the dashboard's port is needed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rlhf_dist.errors import RunError
from rlhf_dist.loop.run_lock import LOCK_FILE

MARK, END = "rlhf-dist-file ", "rlhf-dist-end "
"""What lines with a part of the archive begin with, and the last one; a job's log has other lines too."""
CHUNK = 3 * 4096


@dataclass(frozen=True, slots=True)
class Choice:
    """Which files travel."""

    taken: tuple[Path, ...]
    """Relative to the run directory."""
    left: tuple[tuple[str, int], ...]
    """(name, bytes) of those for which there was no room."""


def choose(run: Path, limit: int) -> Choice:
    """Small files first, and those of checkpoints last, up to `limit` bytes. No links, and nothing but files."""
    sizes = {
        path.relative_to(run): path.lstat().st_size
        for path in run.rglob("*")
        if path.is_file() and not path.is_symlink() and path.name != LOCK_FILE
    }
    taken, left, room = [], [], limit
    for path in sorted(sizes, key=lambda path: ("checkpoints" in path.parts, sizes[path], path)):
        if sizes[path] <= room:
            taken.append(path)
            room -= sizes[path]
        else:
            left.append((path.as_posix(), sizes[path]))
    return Choice(tuple(taken), tuple(left))


def pack(run: Path, limit: int, write: Callable[[str], object]) -> None:
    """Write the lines. Raises `OSError`."""
    choice = choose(run, limit)
    write(MARK + json.dumps({"path": str(run.resolve()), "left": choice.left}) + "\n")
    digest = hashlib.sha256()
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            for path in choice.taken:
                archive.add(run / path, arcname=path.as_posix(), recursive=False)
        file.seek(0)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            write(MARK + base64.b64encode(chunk).decode() + "\n")
    write(END + digest.hexdigest() + "\n")


@dataclass(frozen=True, slots=True)
class Arrived:
    """What `unpack` has written."""

    source: str
    """The run directory's path on its node."""
    target: Path
    left: tuple[tuple[str, int], ...]
    """(name, bytes) of the files that stayed there."""


def unpack(log: str, target: Path) -> Arrived:
    """Make the directory `target`, which must not exist, from the lines that `pack` wrote. Raises `RunError`."""
    lines = [line.strip() for line in log.splitlines()]
    parts = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    ends = [line.removeprefix(END) for line in lines if line.startswith(END)]
    if not parts or not ends:
        raise RunError(f"the files did not arrive: {next(reversed([line for line in lines if line]), 'no output')}")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        head, data = json.loads(parts[0]), b"".join(base64.b64decode(part, validate=True) for part in parts[1:])
        left = tuple((str(name), int(size)) for name, size in head["left"])
        arrived = Arrived(str(head["path"]), target, left)
        if hashlib.sha256(data).hexdigest() != ends[-1]:
            raise RunError("the files did not arrive whole: their hash is another one than on their node")
        temporary.mkdir(parents=True)
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            _extract(file, temporary)
        temporary.rename(target)
    except KeyboardInterrupt:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except (OSError, tarfile.TarError, binascii.Error, ValueError, LookupError, TypeError, ArithmeticError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, RunError):
            raise
        raise RunError(f"{target}: the files cannot be written: {error}") from None
    return arrived


def _extract(file: IO[bytes], folder: Path) -> None:
    """Only files below `folder`: a cluster's node is not to write elsewhere here."""
    with tarfile.open(fileobj=file, mode="r:gz") as archive:
        for member in archive:
            path = Path(member.name)
            content = archive.extractfile(member)
            if content is None or path.is_absolute() or ".." in path.parts:
                raise RunError(f"the node sent {member.name!r}, which is not a file of a run directory")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content.read())


def main(argv: Sequence[str]) -> int:
    """See the module."""
    run, limit = Path(argv[0]), int(argv[1])
    if not run.is_dir():
        print(f"there is no {run.absolute()} on the node where jobs begin", flush=True)
        return 2
    pack(run, limit, sys.stdout.write)
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
