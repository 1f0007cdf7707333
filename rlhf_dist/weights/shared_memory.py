"""The CPU transport: the learner copies its weights into a file in shared memory that the node's rollout workers map.

One copy on each side and no serialisation. The file is overwritten by the next version, which is safe because a
publication ends only when every receipt is in or its worker is given up; a worker that reads too late sees a hash that
does not match and refuses.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from rlhf_dist.errors import DiskError, ResourceError, WeightSyncError
from rlhf_dist.weights.plan import Slot, WeightPlan
from rlhf_dist.weights.receipts import Announcement, bucket_hash

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "rlhf_dist-"
MAKE_ROOM = (
    "remove old files there, or make it larger (in a container --shm-size, elsewhere "
    f"mount -o remount,size=... {SHARED_MEMORY})"
)


def require_room(nbytes: int) -> None:
    """Refuse to start where shared memory has no room for the weights. Raises `ResourceError`."""
    sweep(SHARED_MEMORY)
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        raise ResourceError(f"{SHARED_MEMORY}: shared memory cannot be used: {error.strerror}") from None
    free = found.f_bavail * found.f_frsize
    if free < nbytes:
        raise ResourceError(
            f"{SHARED_MEMORY}: a push needs {size_text(nbytes)} for the weights, and "
            f"{size_text(free, up=False)} are free; {MAKE_ROOM}"
        )


def size_text(nbytes: int, up: bool = True) -> str:
    """Bytes in whole MiB, or KiB below that, so that what is needed is never shown as 0: rounded up, or down."""
    unit, name = (2**20, "MiB") if nbytes >= 2**20 else (2**10, "KiB")
    return f"{-(-nbytes // unit) if up else nbytes // unit:,} {name}"


class WeightWriter:
    """The learner's side; only rank 0 has one."""

    def __init__(self, plan: WeightPlan) -> None:
        """Reserve the plan's bytes. Raises `DiskError` when shared memory is too small."""
        sweep(SHARED_MEMORY)
        self.plan = plan
        self.path = SHARED_MEMORY / f"{PREFIX}{os.getuid()}-{secrets.token_hex(8)}.weights"
        try:
            # For this user's eyes only; the lock, which goes with the process, tells `sweep` that the file is in use.
            self._file = os.fdopen(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "r+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Reserve now: writing past the end of a full tmpfs later is a SIGBUS, not an error.
            os.posix_fallocate(self._file.fileno(), 0, max(plan.nbytes, 1))
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise DiskError(
                f"{SHARED_MEMORY}: {size_text(plan.nbytes)} for the weights: {error.strerror}; {MAKE_ROOM}"
            ) from None
        self._map = map_file(self.path)

    def write(self, version: int, parameters: Iterable[tuple[str, torch.Tensor]]) -> Announcement:
        """Copy the parameters, in the plan's order, and hash each bucket."""
        given = iter(parameters)
        hashes = []
        for bucket in self.plan.buckets:
            for slot in bucket.slots:
                name, tensor = next(given)
                assert name == slot.name, f"{name} came where {slot.name} was planned"
                slot_view(self._map, slot).copy_(tensor)
            hashes.append(bucket_hash(memoryview(self._map)[bucket.offset : bucket.offset + bucket.nbytes]))
        return Announcement(version, str(self.path), self.plan, tuple(hashes))

    def close(self) -> None:
        """Remove the file; maps that workers hold stay valid until they drop them. May be called twice."""
        self.path.unlink(missing_ok=True)
        self._file.close()


class WeightReader:
    """A rollout worker's side: maps the writer's file once."""

    def __init__(self) -> None:
        self._path = ""
        self._map: mmap.mmap | None = None

    def read(self, announcement: Announcement) -> Iterator[tuple[str, list[tuple[str, torch.Tensor]]]]:
        """Yield (hash as received, parameters) for each bucket; the tensors are views that the next version overwrites.

        Raises `WeightSyncError` before a bucket is handed on whose hash is not the announced one.
        """
        if announcement.path != self._path or self._map is None:
            self._map, self._path = map_file(Path(announcement.path)), announcement.path
        for index, bucket in enumerate(announcement.plan.buckets):
            received = bucket_hash(memoryview(self._map)[bucket.offset : bucket.offset + bucket.nbytes])
            if received != announcement.hashes[index]:
                raise WeightSyncError(
                    f"version {announcement.version}: bucket {index} arrived as {received}, "
                    f"was announced as {announcement.hashes[index]}; it was not loaded"
                )
            yield received, [(slot.name, slot_view(self._map, slot)) for slot in bucket.slots]


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file, shared and writable (torch has no read-only tensors)."""
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def slot_view(memory: mmap.mmap, slot: Slot) -> torch.Tensor:
    """A tensor over a slot's bytes, without a copy."""
    dtype = getattr(torch, slot.dtype)
    count = slot.nbytes // dtype.itemsize
    if count == 0:
        return torch.empty(slot.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=slot.offset).view(slot.shape)


def sweep(folder: Path) -> None:
    """Remove this user's files of learners that were killed: nobody holds their lock."""
    for path in folder.glob(f"{PREFIX}{os.getuid()}-*.weights"):
        with suppress(OSError), path.open("rb") as file:  # another process may be sweeping too, or the lock is held
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
