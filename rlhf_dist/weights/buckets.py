"""Parameters -> buckets: where each parameter lies in the bytes that are sent. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

ALIGNMENT = 64
"""Bytes; a cache line, and enough for every dtype's alignment."""

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter's place."""

    name: str
    """Hugging Face's name of the parameter."""
    shape: tuple[int, ...]
    dtype: str
    """Name of the torch dtype on the wire, such as `float32`."""
    offset: int
    """Bytes from the start of the whole."""
    nbytes: int

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return self.nbytes // ITEM_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class Bucket:
    """A run of slots that is hashed as one."""

    offset: int
    nbytes: int
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """The layout of all parameters, the same on both sides."""

    buckets: tuple[Bucket, ...]
    nbytes: int

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All parameters in order."""
        return tuple(slot for bucket in self.buckets for slot in bucket.slots)

    @property
    def names(self) -> tuple[str, ...]:
        """Their names in order."""
        return tuple(slot.name for slot in self.slots)


def make_plan(parameters: Iterable[tuple[str, tuple[int, ...], str]], bucket_bytes: int) -> WeightPlan:
    """Lay (name, shape, dtype name) out one after another; a bucket closes once it holds `bucket_bytes` or more.

    A parameter is never cut, so a bucket may be larger by one parameter.
    """
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    start = end = 0
    for name, shape, dtype in parameters:
        nbytes = math.prod(shape) * ITEM_SIZES[dtype]
        slots.append(Slot(name, tuple(shape), dtype, end, nbytes))
        end += math.ceil(nbytes / ALIGNMENT) * ALIGNMENT
        if end - start >= bucket_bytes:
            buckets.append(Bucket(start, end - start, tuple(slots)))
            slots, start = [], end
    if slots:
        buckets.append(Bucket(start, end - start, tuple(slots)))
    return WeightPlan(tuple(buckets), end)
