"""The folder that is sent with a job: what stays out of it."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

from rlhf_dist.errors import InputError

EXCLUDED = (
    *(".git", ".venv", "venv", "runs", "wandb", ".cache", "benchmarks/results", "__pycache__"),
    *(".env*", "*.env", ".netrc", ".git-credentials", "auth_token"),
    *("id_rsa*", "id_ed25519*", "id_ecdsa*", "id_dsa*"),
    *(".ssh", ".ray", ".aws", ".kube", ".huggingface"),
)
"""What is not sent, because it is large or because it may be secret."""
IGNORE_FILES = (".gitignore", ".rayignore")
"""What Ray reads in each folder that it packs, tracked by git or not."""


def left_out(folder: Path, place: Path) -> str:
    """Why the file `place` of `folder` is not sent, for a message; empty: it is sent. Raises `InputError`."""
    levels = [*reversed(place.parents[:-1]), place]
    for name in EXCLUDED:
        if any(fnmatch(part, name) for level in levels for part in (level.name, level.as_posix())):
            return f"lies in {name}, which is not sent"
    if os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") == "1":
        files = IGNORE_FILES[1:]
    else:
        files = IGNORE_FILES
    for above in reversed(place.parents):
        for file in (above / name for name in files):
            if any(_names(folder / file, folder / level) for level in levels if level.is_relative_to(above)):
                return f"{file} names it or its folder, so it is not sent"
    return ""


def _names(file: Path, path: Path) -> bool:
    """Whether an ignore file names a path below its folder, by the rules that Ray packs with."""
    if not file.is_file():
        return False
    from ray._private.thirdparty.pathspec.pathspec import PathSpec

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    return bool(PathSpec.from_lines("gitwildmatch", lines).match_file(str(path.relative_to(file.parent))))
