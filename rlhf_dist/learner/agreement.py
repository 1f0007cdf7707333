"""Whether the ranks that resume hold what one checkpoint has, all the same. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.errors import DataError, RunError
from rlhf_dist.models.tensors import WAY_OUT

SHOWN_DIGITS = 8


@dataclass(frozen=True, slots=True)
class Held:
    """What one rank is about to go on with."""

    compared: Mapping[str, tuple[int, int]]
    """Optimizer file -> (float32 weights in it which, rounded to the model's dtype, are not the model's, how many were
    compared)."""
    digests: Mapping[str, str]
    """What every rank holds whole, in words -> its hash."""


def require_agreement(folder: Path, ranks: Sequence[Held]) -> None:
    """Refuse ranks that would train different weights; `folder` is the checkpoint, or the critic's part of it.

    Raises DataError for an optimizer file that is not of the weights beside it, RunError where ranks differ.
    """
    foreign: dict[str, tuple[int, int]] = {}
    for held in ranks:
        for file, (differ, count) in held.compared.items():
            before = foreign.get(file, (0, 0))
            foreign[file] = (before[0] + differ, before[1] + count)
    wrong = [f"{file} ({differ:,} of {count:,} differ)" for file, (differ, count) in sorted(foreign.items()) if differ]
    if wrong:
        which = " and ".join(wrong)
        raise DataError(
            f"{folder}: the float32 weights in {which} are not those in hf; the files are damaged or of different "
            f"steps; {WAY_OUT}"
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
