"""A run of the product as others on its machine see it: its processes, by what they do."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MARK = "RLHF_DIST_BENCH"
"""In the environment of the run, which its processes inherit: they are found by it."""
ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def started(words: Sequence[str], log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`rlhf-dist WORDS` with its output in `log`, and the mark of its processes; ended when who looks has an error."""
    mark = f"{MARK}={uuid.uuid4().hex}"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_dist", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | dict([mark.split("=")]),
            cwd=ROOT,
        )
        try:
            yield process, mark
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def processes(mark: str) -> Iterator[tuple[Path, str]]:
    """Folder in `/proc` and kind of every process of the run; one that ends meanwhile is left out."""
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or mark.encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        yield folder, kind_of([word.decode(errors="replace") for word in words if word])


def kind_of(words: Sequence[str]) -> str:
    """`ray::CLASS.method` is how Ray names its workers; the command is the controller; all others are Ray's own."""
    if words and words[0].startswith("ray::"):
        name = words[0].removeprefix("ray::").split(".")[0].split("(")[0].split(":")[0]
        return "Ray itself" if name.endswith("Agent") else name
    return "controller" if "rlhf_dist" in words else "Ray itself"
