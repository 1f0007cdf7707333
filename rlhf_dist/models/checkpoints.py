"""A run's `checkpoints/` as it lies on the disk: which one is the newest, and whether one is unchanged.

checkpoints/LATEST              one line: step-N
checkpoints/BEST                the same of the best one, where `loop.keep_best` asks for it
checkpoints/step-N/state.json   the run's state, the step, and size and hash of every other file of the checkpoint
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from rlhf_dist.errors import DataError
from rlhf_dist.models.guarded_files import hash_files, kind, read_json, read_regular, read_text

FORMAT = 2
"""Of state.json. 1 had no number and no hashes."""
STATE_FILE = "state.json"
LATEST = "LATEST"
BEST = "BEST"
HF_FOLDER = "hf"
"""In a checkpoint, the model for `from_pretrained`."""
CHECKPOINT_PREFIX = "step-"
STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,11})")
LATEST_LIMIT = 4096
"""Bytes."""
SEAL = ("format", "files", "hash")
"""Keys that `sealed` adds to a state."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """What state.json says."""

    state: dict[str, Any]
    """All but the keys of `SEAL`."""
    files: dict[str, tuple[int, str]] | None
    """Relative name -> (bytes, xxh3-128); None in a checkpoint of format 1, which cannot be checked."""


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that `run/checkpoints/LATEST` names; None when there is neither LATEST nor a checkpoint.

    Without LATEST the only checkpoint there is: a run that was killed just after its first one had not named it yet.
    Raises DataError when LATEST is missing beside several, or does not name one that is there.
    """
    pointer = run / "checkpoints" / LATEST
    if not os.path.lexists(pointer):
        steps = checkpoint_steps(pointer.parent)
        if len(steps) > 1:
            raise DataError(f"{pointer}: is missing, and {_choice(pointer.parent)}")
        return pointer.parent / f"{CHECKPOINT_PREFIX}{steps[0]}" if steps else None
    try:
        text = read_text(pointer, LATEST_LIMIT).strip()
    except DataError as error:
        raise DataError(f"{error}; {_choice(pointer.parent)}") from None
    if not STEP_NAME.fullmatch(text):
        shown = f"holds {text[:60]!r}, which is not the name of a checkpoint" if text else "is empty"
        raise DataError(f"{pointer}: {shown}; {_choice(pointer.parent)}")
    found = pointer.parent / text
    if not found.is_dir():
        raise DataError(f"{pointer}: names {text!r}, which is not there; {_choice(pointer.parent)}")
    return found


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint that `run/checkpoints/BEST` names; None where there is no such file, or nothing that it names."""
    pointer = run / "checkpoints" / BEST
    try:
        text = read_text(pointer, LATEST_LIMIT).strip()
    except DataError:
        return None
    found = pointer.parent / text
    return found if STEP_NAME.fullmatch(text) and found.is_dir() else None


def _choice(folder: Path) -> str:
    """What is there, and the way out."""
    names = [f"{CHECKPOINT_PREFIX}{step}" for step in checkpoint_steps(folder)]
    if not names:
        return "the folder holds nothing: start a new run with another name="
    return (
        f"the folder holds {', '.join(names)}: resume with --resume-from {names[-1]}, or write one of those into LATEST"
    )


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in `folder`, ascending."""
    names = [entry.name for entry in folder.glob(f"{CHECKPOINT_PREFIX}*")]
    return sorted(int(found[1]) for name in names if (found := STEP_NAME.fullmatch(name)))


def step_of(checkpoint: Path) -> int:
    """The step that a finished checkpoint was written after."""
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


def sealed(folder: Path, state: Mapping[str, Any], moved: Callable[[], object] = lambda: None) -> str:
    """The text of state.json for the files that `folder` holds now. Raises DataError when one cannot be read.

    `moved`: called as it goes on.
    """
    assert not state.keys() & set(SEAL) and "step" in state, sorted(state)
    sizes = {name: size for name, size in _files(folder)[0].items() if name != STATE_FILE}
    hashes = hash_files(folder, sizes, moved)
    files = {name: {"bytes": sizes[name], "xxh3_128": hashes[name]} for name in sorted(sizes)}
    body = {"format": FORMAT, **state, "files": files}
    return _with_hash(body)


def read_sealed(folder: Path) -> Sealed:
    """What a checkpoint's state.json says. Raises DataError: missing, damaged, or written by a newer version."""
    path = folder / STATE_FILE
    found = read_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path}: is not a checkpoint's state: it holds {_shown(found)}, not a mapping")
    if not found.keys() & set(SEAL):
        return Sealed(found, None)
    number = found.get("format")
    if type(number) is int and number > FORMAT:
        raise DataError(
            f"{path}: has format {_shown(number)}, of a newer version of rlhf-dist; this one reads up to {FORMAT}: use "
            "the version that wrote it"
        )
    body = {key: value for key, value in found.items() if key != "hash"}
    # Byte by byte: a changed space between two values counts as well.
    written = _with_hash(body).encode("utf-8", errors="backslashreplace")
    if number != FORMAT or written != read_regular(path):
        raise DataError(f"{path}: was changed after it was written: its own hash does not fit")
    try:
        files = {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in found["files"].items()}
    except (AttributeError, KeyError, TypeError):
        raise DataError(f"{path}: has no list of the checkpoint's files") from None
    return Sealed({key: value for key, value in found.items() if key not in SEAL}, files)


def problems(folder: Path, below: str = "") -> list[str]:
    """What is wrong with a checkpoint: `FILE: was changed ...`, one for each file; empty when it is as it was written.

    `below`: look at the files in this folder of it only. A checkpoint of format 1 has no hashes: only its step is
    compared.
    """
    try:
        found = read_sealed(folder)
    except DataError as error:
        return [str(error)]
    step = found.state.get("step")
    if step != step_of(folder) or isinstance(step, bool):
        return [f"{folder / STATE_FILE}: is of step {_shown(step)}, in a folder named {folder.name}"]
    if found.files is None:
        return []
    expected = {name: entry for name, entry in found.files.items() if name.startswith(below)}
    present, strange = _files(folder)
    problems = [f"{folder / name}: is {what}, not a file" for name, what in strange.items() if name.startswith(below)]
    for name in sorted(expected.keys() | {name for name in present if name.startswith(below)} - {STATE_FILE}):
        if name not in expected:
            problems.append(f"{folder / name}: is not part of this checkpoint; move it away")
        elif name not in present:
            problems += [] if name in strange else [f"{folder / name}: is missing"]
        elif present[name] != expected[name][0]:
            problems.append(f"{folder / name}: has {present[name]:,} bytes, and had {expected[name][0]:,}")
    if problems:
        return problems
    try:
        hashes = hash_files(folder, expected)
    except DataError as error:
        return [str(error)]
    return [
        f"{folder / name}: was changed after it was written"
        for name, (_, was) in expected.items()
        if hashes[name] != was
    ]


def _files(folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """(relative name -> bytes of the regular files, relative name -> kind of what else is no folder); none hidden."""
    sizes: dict[str, int] = {}
    strange: dict[str, str] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        found = path.lstat()
        if any(part.startswith(".") for part in name.parts) or kind(found.st_mode) == "a directory":
            continue
        if what := kind(found.st_mode):
            strange[name.as_posix()] = what
        else:
            sizes[name.as_posix()] = found.st_size
    return sizes, strange


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _with_hash(body: Mapping[str, Any]) -> str:
    """The text of a body, which is not empty, with its own hash as last entry."""
    text = _text(body)
    found = xxhash.xxh3_128_hexdigest(text.encode("utf-8", errors="backslashreplace"))
    return text.removesuffix("\n}\n") + f',\n  "hash": "{found}"\n}}\n'


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
