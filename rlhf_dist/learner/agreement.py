"""Whether the ranks that resume hold what one checkpoint has, all the same. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.errors import DataError, RunError
from rlhf_dist.models.tensors import WAY_OUT

SHOWN_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Compared:
    """Numbers of float32 weights in an optimizer file, rounded to the model's dtype."""

    differ: int = 0
    """Those that are not the model's."""
    unsound: int = 0
    """Those that are NaN or infinite."""
    count: int = 0
    """Those that were looked at."""

    def plus(self, other: Compared) -> Compared:
        """Of both."""
        return Compared(self.differ + other.differ, self.unsound + other.unsound, self.count + other.count)


@dataclass(frozen=True, slots=True)
class Held:
    """What one rank is about to go on with."""

    compared: Mapping[str, Compared]
    """By optimizer file."""
    digests: Mapping[str, str]
    """What every rank holds whole, in words -> its hash."""


def require_agreement(folder: Path, ranks: Sequence[Held]) -> None:
    """Refuse ranks that would train different weights; `folder` is the checkpoint, or the critic's part of it.

    Raises DataError for an optimizer file that is not of the weights beside it, or whose weights are not finite,
    RunError where ranks differ.
    """
    files: dict[str, Compared] = {}
    for held in ranks:
        for file, compared in held.compared.items():
            files[file] = files.get(file, Compared()).plus(compared)
    if wrong := [
        f"{name} ({file.differ:,} of {file.count:,} differ)" for name, file in sorted(files.items()) if file.differ
    ]:
        which = " and ".join(wrong)
        raise DataError(
            f"{folder}: the float32 weights in {which} are not those in hf; the files are damaged or of different "
            f"steps; {WAY_OUT}"
        )
    if bad := [f"{name} ({file.unsound:,} of {file.count:,})" for name, file in sorted(files.items()) if file.unsound]:
        raise DataError(
            f"{folder}: weights in {' and '.join(bad)} are NaN or infinite, as they are in hf: the training had gone "
            f"wrong before they were saved; {WAY_OUT}"
        )
    for what in ranks[0].digests:
        found: dict[str, list[str]] = {}
        for rank, held in enumerate(ranks):
            found.setdefault(held.digests[what], []).append(str(rank))
        if len(found) > 1:
            sides = "; ".join(
                f"rank{'s' if len(names) > 1 else ''} {', '.join(names)}: {value[:SHOWN_DIGITS]}"
                for value, names in found.items()
            )
            raise RunError(
                f"{folder}: the ranks that resumed do not have the same {what} (hashes: {sides}). Resume again; if the "
                f"ranks differ again, {WAY_OUT}"
            )
