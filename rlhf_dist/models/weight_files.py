"""The safetensors files of a Hugging Face directory: which there are, and the names and shapes in their headers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rlhf_dist.errors import ModelError
from rlhf_dist.models.model_files import AGAIN, KINDS, is_there, link_target, read_object, reason_of, refuse_stand_in

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
LENGTH_BYTES = 8
"""A file begins with the length of its header, little-endian."""
LONGEST_HEADER = 100_000_000
"""The format's own limit, in bytes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a header describes it."""

    shape: tuple[int, ...]
    dtype: str
    """The format's name: F32, BF16, F8_E4M3, I64."""


def read_headers(directory: Path) -> dict[str, Stored]:
    """All tensors of the directory's weights by name; no data is read.

    Raises ModelError: no weights, pickled ones only, a damaged file or index, an index that disagrees with its files.
    """
    single, index = directory / SINGLE, directory / INDEX
    whole, sharded = is_there(single), is_there(index)
    if not whole and not sharded:
        raise ModelError(_without_weights(directory))
    if not sharded:
        return read_header(single)
    places = read_index(index)
    if whole and SINGLE not in places.values():
        raise ModelError(
            f"{directory}: has both {SINGLE} and {INDEX}, which names other files; the learner would load the one and "
            "the engine the other. Delete the one that is out of date"
        )
    return _read_shards(index, places)


def _without_weights(directory: Path) -> str:
    if any(directory.glob("*.bin")):
        return (
            f"{directory}: has weights as .bin files only, which are never read because a pickle can run code; save "
            "the model again with save_pretrained of transformers 5, which writes safetensors"
        )
    found = sorted(path.name for path in directory.glob(f"*{SUFFIX}"))
    beside = f"; it has {', '.join(found[:5])}, and no index that names them" if found else ""
    return f"{directory}: has no weights ({SINGLE} or {INDEX}){beside}"


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file name, of the index `path`. Raises ModelError when it is not one."""
    if "weight_map" not in (content := read_object(path)):
        raise ModelError(f"{path}: has no weight_map, which says in which file a tensor is; {AGAIN}")
    places: Any = content["weight_map"]
    if not isinstance(places, Mapping) or not places:
        what = "is empty" if isinstance(places, Mapping) else f"is {KINDS[type(places)]}"
        raise ModelError(f"{path}: its weight_map {what}; it must map the name of each tensor to its file; {AGAIN}")
    for tensor, name in places.items():
        # The engine looks for files of this suffix in the directory itself only; nothing outside it is ever read.
        if not isinstance(name, str) or not name.endswith(SUFFIX) or name != Path(name).name:
            raise ModelError(
                f"{path}: places {tensor} in {name!r}; it must be the name of a {SUFFIX} file in the same directory"
            )
    missing = sorted({name for name in places.values() if not os.path.isfile(path.parent / name)})
    if missing:
        raise ModelError(
            f"{path}: names files that are not there: {', '.join(missing[:5])}{_and_more(missing)}"
            f"{link_target(path.parent / missing[0])}; {AGAIN.replace('it', 'them')}"
        )
    return dict(places)


def _read_shards(index: Path, places: Mapping[str, str]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name in sorted(set(places.values())):
        tensors = read_header(index.parent / name)
        lacking = sorted(tensor for tensor, place in places.items() if place == name and tensor not in tensors)
        if lacking:
            raise ModelError(f"{index}: places {lacking[0]}{_and_more(lacking, 1)} in {name}, which lacks it; {AGAIN}")
        unlisted = sorted(tensor for tensor in tensors if places.get(tensor) != name)
        if unlisted:
            raise ModelError(
                f"{index}: {name} has {unlisted[0]}{_and_more(unlisted, 1)}, which the index does not place there; "
                "download or copy index and files again, together"
            )
        found |= tensors
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. Raises ModelError when it is not a whole one."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}{link_target(path)}") from None
    header = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or header > LONGEST_HEADER:
        _refuse_other_formats(path, start)
    if header > min(size - LENGTH_BYTES, LONGEST_HEADER):
        raise ModelError(
            f"{path}: is truncated, or no {SUFFIX} file: its header should have {header:,} bytes, and the whole file "
            f"has {size:,}; {AGAIN}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: _stored(file.get_slice(name)) for name in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: is damaged or truncated: {reason_of(error)}; {AGAIN}") from None


def _refuse_other_formats(path: Path, start: bytes) -> None:
    """Say what a file is whose first eight bytes can be no length. Raises ModelError if that is known."""
    refuse_stand_in(path, start)
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise ModelError(
            f"{path}: is a pickle of PyTorch under another name, which is never read because it can run code; save "
            "the model again with save_pretrained of transformers 5, which writes safetensors"
        )
    if start.startswith(b"GGUF"):
        raise ModelError(f"{path}: is a GGUF file under another name; give the model's safetensors weights")


def _stored(view: Any) -> Stored:
    return Stored(tuple(view.get_shape()), str(view.get_dtype()))


def _and_more(names: list[str], shown: int = 5) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""
