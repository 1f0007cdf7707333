"""The model that a stage of a pipeline leaves: fingerprints of its files, and whether they are all there."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import xxhash

from rlhf_dist.errors import DataError
from rlhf_dist.models.checkpoints import BEST, best_checkpoint, latest_checkpoint
from rlhf_dist.models.guarded_files import hash_file, hash_files

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
NEEDED = (
    ("config.json",),
    WEIGHTS,
    ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json"),
    ("tokenizer_config.json",),
)
"""Of each row, a model that later stages start from has at least one file."""


def content(path: Path) -> str:
    """Fingerprint of a file's content, of a run's newest model (or its best one, for `checkpoints/BEST`), or of every
    file in a directory. Raises DataError."""
    if path.name == BEST and (best := best_checkpoint(path.parent.parent)) is not None:
        return digest(model_files(best))
    if not path.is_dir():
        return hash_file(path)
    checkpoint = latest_checkpoint(path)
    return digest(model_files(checkpoint) if checkpoint else _files(path))


def model_files(checkpoint: Path) -> dict[str, str]:
    """File in the checkpoint's `hf` -> fingerprint. Raises DataError."""
    return _files(checkpoint / "hf")


def _files(folder: Path) -> dict[str, str]:
    names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return hash_files(folder, [str(name) for name in names if not name.parts[0].startswith(".")])


def digest(files: Mapping[str, str]) -> str:
    """One fingerprint of many."""
    return xxhash.xxh3_128_hexdigest(json.dumps(sorted(files.items())).encode())


def lacking(files: Collection[str], folder: Path | None = None) -> str | None:
    """The first file that a model made of `files` lacks; the parts of its weights count where it lies in `folder`."""
    for names in NEEDED:
        if not any(name in files for name in names):
            return names[0]
    if folder is None or WEIGHTS[0] in files:
        return None
    index = folder / WEIGHTS[1]
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{index}: is no index of weights ({error!r})") from error
    return next((part for part in sorted(set(parts)) if part not in files), None)
