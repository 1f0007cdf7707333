"""Shared memory between the processes of one engine leaves no file behind, however they end."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import psutil

from rlhf_dist.weights.shared_memory import SHARED_MEMORY

NAMES = re.compile(r"psm_|sem\.mp-|vllm_dist_")
"""How files begin that Python and vLLM make there."""


def forget_names() -> None:
    """Remove the names of what this process and those below it share; the memory itself stays as long as they do.

    To be called once all of them have opened it. Else processes that are killed leave their files, and the memory, for
    as long as the machine runs.
    """
    own = psutil.Process()
    mapped = {inode for process in (own, *own.children(recursive=True)) for inode in mapped_inodes(process.pid)}
    for path in SHARED_MEMORY.iterdir():
        with suppress(FileNotFoundError):
            if NAMES.match(path.name) and path.stat().st_ino in mapped:
                path.unlink()


def mapped_inodes(pid: int) -> set[int]:
    """Of the files in the shared memory that a process has open there; none of one that has ended.

    Not by their names: a semaphore is made under another one.
    """
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        return {int(line.split()[4]) for line in lines if f" {SHARED_MEMORY}/" in line}
    return set()
