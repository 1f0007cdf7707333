"""The optimizer's state in a checkpoint, by the parameters' names: any number of ranks under any ZeRO stage reads it.

optimizer-RANK.safetensors has what the rank holds, flat: of each parameter that it has a part of, `NAME.weights`
(float32), Adam's moments `NAME.exp_avg` and `NAME.exp_avg_sq`, and `NAME.step`. Its metadata say how many ranks wrote,
and which elements of the parameter the part is. What ZeRO fills up its flat tensors with is not written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf_dist.errors import ConfigError, DataError, NumbersError
from rlhf_dist.learner.agreement import Compared
from rlhf_dist.learner.changed_words import Part, Run
from rlhf_dist.learner.checkpoint_files import optimizer_file
from rlhf_dist.models.tensors import WAY_OUT, write_tensors

WEIGHTS = "weights"
STEP = "step"
METADATA = "optimizer"
"""Key of a file's metadata: JSON, {"ranks": how many wrote, "parts": {parameter: its first element here}}."""


@dataclass(frozen=True, slots=True)
class Found:
    """A part of a rank's run of elements, as it lies in one file."""

    file: Path
    name: str
    """Of the parameter."""
    offset: int
    """Its first element in the file's tensors of that name."""
    start: int
    """Its first element in the rank's flat part."""
    count: int


def write_state(parts: Sequence[Part], optimizer: torch.optim.Optimizer, path: Path, ranks: int) -> None:
    """Write what this rank holds of the optimizer; `ranks`: how many write.

    Raises DiskError, and NumbersError for weights that are not finite: nothing could go on from them.
    """
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for key, value in held(part, optimizer).items():
            for run in part.runs:
                mine = value if value.dim() == 0 else value.reshape(-1)[run.start : run.start + run.count]
                if key == WEIGHTS and not mine.isfinite().all():
                    bad = run.count - int(mine.isfinite().sum())
                    raise NumbersError(
                        f"{path}: is not written: {bad:,} of {run.count:,} weights of {run.name} are NaN or infinite; "
                        "what was saved before is intact"
                    )
                tensors[f"{run.name}.{key}"] = mine.to("cpu", copy=True)
    begins = {run.name: run.begin for part in parts for run in part.runs}
    write_tensors(tensors, path, {METADATA: json.dumps({"ranks": ranks, "parts": begins})})


def held(part: Part, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and state of the optimizer, by key; those with a dimension have as many elements as the part."""
    state: Mapping[str, Any] = optimizer.state.get(part.master, {})
    return {key: torch.as_tensor(value).detach() for key, value in ({WEIGHTS: part.master} | dict(state)).items()}


class SavedState:
    """What the ranks of a checkpoint wrote. Only headers are read here; a context, which closes the files."""

    def __init__(self, folder: Path, rank: int) -> None:
        """`rank`: whose file is asked first, as several may have the same. Every rank that reads opens all files.

        Raises DataError for a file that is missing or damaged, ConfigError for one of an older version.
        """
        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}
        self._parts: dict[str, list[tuple[Path, int, int]]] = {}
        """Parameter -> (file, first element there, one beyond the last)."""
        self._keys: dict[tuple[Path, str], list[str]] = {}
        with self._stack:
            for other in range(1, self._open(folder / optimizer_file(0))):
                self._open(folder / optimizer_file(other))
            self._stack = self._stack.pop_all()
        own = folder / optimizer_file(rank)
        for found in self._parts.values():
            found.sort(key=lambda part: part[0] != own)

    def __enter__(self) -> SavedState:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _open(self, path: Path) -> int:
        """Open a file and note what is in it; how many ranks wrote."""
        if not path.exists():
            raise DataError(f"{path}: is missing; {WAY_OUT}")
        try:
            file = self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            text = (file.metadata() or {}).get(METADATA)
            found = json.loads(text) if text else None
            for stored in file.keys() if found else ():
                name, _, key = stored.rpartition(".")
                self._keys.setdefault((path, name), []).append(key)
            for name, begin in found["parts"].items() if found else ():
                count = file.get_slice(f"{name}.{WEIGHTS}").get_shape()[0]
                self._parts.setdefault(name, []).append((path, begin, begin + count))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: cannot be read: {error}; {WAY_OUT}") from None
        if found is None:
            raise ConfigError(
                f"{path}: was written by an older version of rlhf-dist, without the parameters' names: use that "
                f"version, or start a new run with model.path={self._folder / 'hf'}"
            )
        return found["ranks"]

    def find(self, run: Run) -> Iterator[Found]:
        """Where a run of elements lies, in order. Raises ConfigError where the checkpoint does not have all of it."""
        at, end = run.begin, run.begin + run.count
        while at < end:
            for path, begin, beyond in self._parts.get(run.name, []):
                if begin <= at < beyond:
                    count = min(end, beyond) - at
                    yield Found(path, run.name, at - begin, run.start + at - run.begin, count)
                    at += count
                    break
            else:
                raise ConfigError(
                    f"{self._folder}: has no optimizer state of {run.name} from element {at} on; resume with the model "
                    "that the checkpoint is of"
                )

    def keys(self, found: Found) -> list[str]:
        """What there is of a parameter in a file: `weights`, and the optimizer's own keys."""
        return sorted(self._keys[found.file, found.name])

    def read(self, found: Found, key: str) -> Tensor:
        """On the CPU, [count]; a number where the optimizer has one for the whole tensor. Raises DataError."""
        stored = self._files[found.file].get_slice(f"{found.name}.{key}")
        try:
            return stored[found.offset : found.offset + found.count] if stored.get_shape() else stored[...]
        except (OSError, SafetensorError) as error:
            raise DataError(f"{found.file}: cannot be read: {error}; {WAY_OUT}") from None


def runs(parts: Sequence[Part], saved: SavedState) -> Iterator[tuple[Part, Found]]:
    """All that a rank has to read."""
    for part in parts:
        for run in part.runs:
            for found in saved.find(run):
                yield part, found


def compared_weights(parts: Sequence[Part], saved: SavedState, dtype: torch.dtype) -> dict[str, Compared]:
    """File -> what its float32 weights are beside the model's. NaN is equal to NaN here.

    Ask before anything is loaded or trained: the masters are then the model's weights. Where the model is bfloat16 its
    weights are the masters rounded, whatever ZeRO's stage.
    """
    compared: dict[str, Compared] = {}
    for part, found in runs(parts, saved):
        now = part.master.detach().view(-1)[found.start : found.start + found.count]
        stored, now = saved.read(found, WEIGHTS).to(now.device).to(dtype), now.to(dtype)
        differs = (stored != now) & ~(stored.isnan() & now.isnan())
        unsound = found.count - int(stored.isfinite().sum())
        mine = Compared(int(differs.sum()), unsound, found.count)
        compared[found.file.name] = compared.get(found.file.name, Compared()).plus(mine)
    return compared


def steps(parts: Sequence[Part], saved: SavedState) -> list[float]:
    """The counts of optimizer steps that a rank finds, each once; one in a sound checkpoint, none before the first."""
    return sorted({float(saved.read(found, STEP)) for _, found in runs(parts, saved) if STEP in saved.keys(found)})


def contents(parts: Sequence[Part], saved: SavedState) -> Iterator[tuple[str, Tensor]]:
    """All that a rank would load, by name, in the model's order."""
    for _, found in runs(parts, saved):
        for key in saved.keys(found):
            yield f"{found.name}.{key}", saved.read(found, key)


@torch.no_grad()
def load_state(parts: Sequence[Part], optimizer: torch.optim.Optimizer, saved: SavedState) -> None:
    """Give the optimizer what was saved; a moment that a parameter did not have yet is 0, as at the start."""
    for part in parts:
        optimizer.state[part.master] = {}
    for part, found in runs(parts, saved):
        state = optimizer.state[part.master]
        for key in saved.keys(found):
            value = saved.read(found, key)
            if value.dim() == 0:
                state[key] = value
                continue
            if key != WEIGHTS and key not in state:
                state[key] = torch.zeros_like(part.master)
            whole = part.master if key == WEIGHTS else state[key]
            whole.view(-1)[found.start : found.start + found.count].copy_(value)
