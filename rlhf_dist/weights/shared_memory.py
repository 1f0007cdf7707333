"""The CPU transport: the learner copies its weights into a file in shared memory that the node's rollout workers map.

One copy on each side and no serialisation. The file has two buffers (double buffering): a version is written into one
while the other still holds the version before. A reader locks a buffer for as long as it reads, and the writer takes
one that no reader holds, so what is read never changes. The locks go with the process that holds them, however it ends.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import secrets
import shutil
import struct
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EACCES, EAGAIN
from operator import attrgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from rlhf_dist.errors import DiskError, ResourceError, WeightSyncError
from rlhf_dist.weights.buckets import Bucket, Slot, WeightPlan
from rlhf_dist.weights.changes import WORD_BYTES, Piece, apply
from rlhf_dist.weights.pinned import PinnedMap
from rlhf_dist.weights.receipts import Announcement, BucketHash, bucket_hash

if TYPE_CHECKING:  # who only sweeps, or asks for room, does not wait seconds for torch
    import torch

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "rlhf_dist-"
STATE, STATE_LOCK = ".state", ".lock"
"""Endings of a run's private folder, and of the file beside it whose lock tells that the run goes on."""
BUFFERS = 2
PART_BYTES = 2**22  # copied and then hashed at a time: it stays in a core's cache in between
READERS_LIMIT_S = 5.0
"""How long a publication waits for a buffer: those that still read have been given up, and are about to end."""
MAKE_ROOM = (
    "remove old files there, or make it larger (in a container --shm-size, elsewhere "
    f"mount -o remount,size=... {SHARED_MEMORY})"
)


def require_room(nbytes: int, kept: int = 0) -> None:
    """Refuse to start where shared memory has no room for the buffers, of `nbytes` each. Raises `ResourceError`.

    `kept`: bytes of the states that the run keeps there besides.
    """
    sweep(SHARED_MEMORY)
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        raise ResourceError(f"{SHARED_MEMORY}: shared memory cannot be used: {error.strerror}") from None
    free, needed = found.f_bavail * found.f_frsize, BUFFERS * nbytes
    if free < needed + kept:
        wanted = f"pushes need {size_text(needed)} for two copies of the weights" if needed else ""
        state = f"learner.keep_state_every needs {size_text(kept)} for two states of the learner" if kept else ""
        raise ResourceError(
            f"{SHARED_MEMORY}: {', and '.join(filter(None, [wanted, state]))}, and "
            f"{size_text(free, up=False)} are free; {MAKE_ROOM}"
        )


def size_text(nbytes: int, up: bool = True) -> str:
    """Bytes in whole MiB, or KiB below that, so that what is needed is never shown as 0: rounded up, or down."""
    unit, name = (2**20, "MiB") if nbytes >= 2**20 else (2**10, "KiB")
    return f"{-(-nbytes // unit) if up else nbytes // unit:,} {name}"


class WeightWriter:
    """The learner's side; only rank 0 has one."""

    def __init__(self, plan: WeightPlan, *, pinned: bool = False) -> None:
        """Reserve both buffers; `pinned`: for copies from a GPU. Raises `DiskError` when shared memory is too small."""
        sweep(SHARED_MEMORY)
        self.plan = plan
        self._newest = BUFFERS - 1
        self._stride = math.ceil(max(plan.nbytes, 1) / mmap.PAGESIZE) * mmap.PAGESIZE
        self.path = SHARED_MEMORY / f"{PREFIX}{os.getuid()}-{secrets.token_hex(8)}.weights"
        try:
            self._file = private_file(self.path, BUFFERS * self._stride)
        except OSError as error:
            raise DiskError(
                f"{SHARED_MEMORY}: {size_text(BUFFERS * self._stride)} for two copies of the weights: "
                f"{error.strerror}; {MAKE_ROOM}"
            ) from None
        self._map = map_file(self.path)
        self._pinned = PinnedMap(self._map) if pinned else None

    def write(self, version: int, parameters: Iterable[tuple[str, torch.Tensor]]) -> Announcement:
        """Copy the parameters, in the plan's order, and hash each bucket.

        The version before stays as it is, unless a reader holds the other buffer. Raises `WeightSyncError` when readers
        hold both.
        """
        with self._free_buffer() as offset:
            hashes = self._fill(offset, parameters)
        return Announcement(version, str(self.path), offset, self.plan, hashes)

    def copy(self, version: int, receive: Callable[[memoryview], None]) -> Announcement:
        """As `write`, of bytes: `receive` fills each bucket in turn, which is hashed while it is in the cache."""
        hashes: list[str] = []
        with self._free_buffer() as offset, memoryview(self._map) as whole:
            for bucket in self.plan.buckets:
                start = offset + bucket.offset
                with whole[start : start + bucket.nbytes] as part:
                    receive(part)
                    hashes.append(bucket_hash(part))
        return Announcement(version, str(self.path), offset, self.plan, tuple(hashes))

    def change(self, version: int, before: Announcement, pieces: Sequence[Piece]) -> Announcement:
        """As `write`, of the weights that were written here last, `before`, with the words of `pieces` changed.

        Raises `WeightSyncError` also for pieces that do not fit; what was written last may be lost then.
        """
        hashes: list[str] = []
        whole = np.frombuffer(self._map, np.uint8)
        with self._free_buffer() as offset:
            for bucket in self.plan.buckets:
                start, nbytes = offset + bucket.offset, bucket.nbytes
                part = whole[start : start + nbytes]
                if before.offset != offset:
                    part[:] = whole[before.offset + bucket.offset :][:nbytes]
                apply(within(pieces, bucket), part.view(np.uint16), bucket.offset // WORD_BYTES)
                hashes.append(bucket_hash(part.data))
        return Announcement(version, str(self.path), offset, self.plan, tuple(hashes))

    def tensors(self, announcement: Announcement, bucket: Bucket) -> list[tuple[str, torch.Tensor]]:
        """What was written of a bucket's parameters, as views."""
        return [(slot.name, slot_view(self._map, slot, announcement.offset)) for slot in bucket.slots]

    def _fill(self, offset: int, parameters: Iterable[tuple[str, torch.Tensor]]) -> tuple[str, ...]:
        """Each part is hashed while the processor has it in its cache."""
        hashes: list[str] = []
        given, whole = iter(parameters), memoryview(self._map)
        for bucket in self.plan.buckets:
            running, done = BucketHash(), offset + bucket.offset
            for slot in bucket.slots:
                name, tensor = next(given)
                assert name == slot.name, f"{name} came where {slot.name} was planned"
                for nbytes in copy_in_parts(slot_view(self._map, slot, offset), tensor):
                    end = offset + slot.offset + nbytes
                    running.update(whole[done:end])
                    done = end
            running.update(whole[done : offset + bucket.offset + bucket.nbytes])
            hashes.append(running.hexdigest())
        return tuple(hashes)

    @contextmanager
    def _free_buffer(self) -> Iterator[int]:
        """Where a buffer begins that is locked for the time of the block, and the newest when that ended well."""
        index = self._lock_free_buffer()
        offset = index * self._stride
        try:
            yield offset
        finally:
            lock(self._file, fcntl.F_UNLCK, offset, self._stride)
        self._newest = index

    def _lock_free_buffer(self) -> int:
        """A buffer that no reader holds, the older one first."""
        end = time.monotonic() + READERS_LIMIT_S
        older_first = sorted(range(BUFFERS), key=lambda index: index == self._newest)
        while True:
            for index in older_first:
                if lock(self._file, fcntl.F_WRLCK, index * self._stride, self._stride):
                    return index
            if time.monotonic() > end:
                found = ", ".join(map(str, others_with_open(self.path))) or "none that this user can see"
                raise WeightSyncError(
                    f"{self.path}: both copies of the weights are still being read after {READERS_LIMIT_S:g} s; "
                    f"processes that have the file open: {found}"
                )
            time.sleep(0.01)

    def close(self) -> None:
        """Remove the file; maps that workers hold stay valid until they drop them. May be called twice."""
        if self._pinned is not None:
            self._pinned.close()
        self.path.unlink(missing_ok=True)
        self._file.close()


class WeightReader:
    """A reading process's side: maps the writer's file once."""

    def __init__(self, *, pinned: bool = False) -> None:
        """`pinned`: for copies to a GPU."""
        self._pin = pinned
        self._pinned: PinnedMap | None = None
        self._path = ""
        self._file: IO[bytes] | None = None
        self._map: mmap.mmap | None = None

    def take(self, announcement: Announcement) -> Lease:
        """Lock an announced version and hash all of its buckets.

        Raises `WeightSyncError` when they are not the announced ones any more, or the file is gone.
        """
        lease = self.hold(announcement)
        lease.hashes = bucket_hashes(lease.memory, announcement.offset, announcement.plan)
        for index, (sent, received) in enumerate(zip(announcement.hashes, lease.hashes, strict=True)):
            if sent != received:
                lease.close()
                raise WeightSyncError(
                    f"version {announcement.version}: bucket {index} arrived as {received}, was announced as {sent}; "
                    "nothing was loaded"
                )
        return lease

    def hold(self, announcement: Announcement) -> Lease:
        """The lock alone, for a reader that hands the bytes on to one that hashes them. Raises as `take`."""
        version = f"version {announcement.version}"
        try:
            file, memory = self._open(announcement.path)
        except OSError as error:
            raise WeightSyncError(f"{version}: {announcement.path} cannot be read: {error.strerror}") from None
        lease = Lease(announcement, file, memory)
        if not lock(file, fcntl.F_RDLCK, announcement.offset, lease.nbytes):
            raise WeightSyncError(f"{version}: a later version is being written in its place; nothing was loaded")
        return lease

    def _open(self, path: str) -> tuple[IO[bytes], mmap.mmap]:
        if path != self._path or self._file is None or self._map is None:
            memory = map_file(Path(path))
            if self._file is not None:
                self._file.close()
            if self._pinned is not None:
                self._pinned.close()
            self._file, self._map, self._path = open(path, "r+b"), memory, path  # noqa: SIM115
            self._pinned = PinnedMap(memory) if self._pin else None
        return self._file, self._map


class Lease:
    """A version that the writer leaves as it is until `close`."""

    def __init__(self, announcement: Announcement, file: IO[bytes], memory: mmap.mmap) -> None:
        self.announcement = announcement
        self.nbytes = max(announcement.plan.nbytes, 1)
        self.hashes: tuple[str, ...] = ()
        """Of each bucket, as received; empty where it was not hashed."""
        self.file = file
        self.memory = memory

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The parameters, as views that are not to be used after `close`."""
        offset = self.announcement.offset
        return [(slot.name, slot_view(self.memory, slot, offset)) for slot in self.announcement.plan.slots]

    def parts(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The same as one part: all are there."""
        yield self.tensors()

    def close(self) -> None:
        """Let the writer use the buffer again. May be called twice."""
        if not self.file.closed:
            lock(self.file, fcntl.F_UNLCK, self.announcement.offset, self.nbytes)


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file, shared and writable (torch has no read-only tensors)."""
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def slot_view(memory: mmap.mmap, slot: Slot, start: int) -> torch.Tensor:
    """A tensor over a slot's bytes, without a copy; `start`: where its buffer begins."""
    import torch

    dtype = getattr(torch, slot.dtype)
    if slot.elements == 0:
        return torch.empty(slot.shape, dtype=dtype)
    flat = torch.frombuffer(memory, dtype=dtype, count=slot.elements, offset=start + slot.offset)
    return flat.view(slot.shape)


def copy_in_parts(target: torch.Tensor, source: torch.Tensor) -> Iterator[int]:
    """Copy a tensor; after each part, how many bytes of the target are there."""
    to, of = target.view(-1), source.reshape(-1)
    step = PART_BYTES // to.element_size()
    for start in range(0, to.numel(), step):
        end = min(start + step, to.numel())
        to[start:end].copy_(of[start:end])
        yield end * to.element_size()


def bucket_hashes(memory: mmap.mmap, start: int, plan: WeightPlan) -> tuple[str, ...]:
    """The hash of each bucket of the buffer that begins at `start`."""
    whole = memoryview(memory)[start : start + plan.nbytes]
    return tuple(bucket_hash(whole[bucket.offset : bucket.offset + bucket.nbytes]) for bucket in plan.buckets)


def within(pieces: Sequence[Piece], bucket: Bucket) -> Sequence[Piece]:
    """Those of the pieces, which are in the order of their starts, that begin in a bucket."""
    first, end = bucket.offset // WORD_BYTES, (bucket.offset + bucket.nbytes) // WORD_BYTES
    low, high = (bisect_left(pieces, word, key=attrgetter("start")) for word in (first, end))
    return pieces[low:high]


def private_file(path: Path, nbytes: int) -> IO[bytes]:
    """A new file of so many bytes for this user's eyes only, whose lock tells `sweep` that it is in use.

    The lock goes with the process. Raises OSError where there is no room; then there is no file.
    """
    file = locked_file(path)
    try:
        # Reserve now: writing past the end of a full tmpfs later is a SIGBUS, not an error.
        os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError:
        path.unlink(missing_ok=True)
        file.close()
        raise
    return file


def locked_file(path: Path) -> IO[bytes]:
    """A new file with its lock. One that another process swept before it was locked is made again.

    Raises OSError where who sweeps does not let go of it in `READERS_LIMIT_S`.
    """
    ends = time.monotonic() + READERS_LIMIT_S
    while True:
        file = os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "r+b")
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > ends:
                    file.close()
                    raise
                time.sleep(0.001)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def lock(file: IO[bytes], kind: int, start: int, nbytes: int) -> bool:
    """Lock a part of an open file, or unlock it (`kind`: F_RDLCK, F_WRLCK, F_UNLCK); false where another lock is there.

    It belongs to this opening of the file ("open file description lock"): two in one process count as two. The flock of
    the whole file, with which `sweep` tells whether the writer lives, is another one.
    """
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, nbytes, 0))
    except OSError as error:
        if error.errno in (EACCES, EAGAIN):
            return False
        raise
    return True


def others_with_open(path: Path) -> list[int]:
    """Ids of the other processes of this user that have a file open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # another user's, or one that has ended meanwhile
            if any(os.readlink(link) == str(path) for link in (folder / "fd").iterdir()):
                found.append(int(folder.name))
    return sorted(set(found) - {os.getpid()})


def private_folder() -> tuple[Path, IO[bytes]]:
    """A new folder in shared memory that only this user can enter, and what tells `sweep` that it is in use.

    It is removed with the next sweep once that is closed, or this process has ended. Raises `ResourceError`.
    """
    sweep(SHARED_MEMORY)
    path = SHARED_MEMORY / f"{PREFIX}{os.getuid()}-{secrets.token_hex(8)}{STATE}"
    try:
        lock_of = locked_file(path.with_suffix(STATE_LOCK))
        path.mkdir(mode=0o700)
    except OSError as error:
        path.with_suffix(STATE_LOCK).unlink(missing_ok=True)
        raise ResourceError(f"{path}: shared memory cannot be used: {error.strerror}") from None
    return path, lock_of


def sweep(folder: Path) -> None:
    """Remove this user's files of learners that were killed, and folders of such runs: nobody holds their lock."""
    for path in folder.glob(f"{PREFIX}{os.getuid()}-*{STATE_LOCK}"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.with_suffix(STATE), ignore_errors=True)
            path.unlink()
    for path in folder.glob(f"{PREFIX}{os.getuid()}-*{STATE}"):
        if not path.with_suffix(STATE_LOCK).exists():  # made before the folder: who went on to write here is late
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{PREFIX}{os.getuid()}-*.weights"):
        with suppress(OSError), path.open("rb") as file:  # another process may be sweeping too, or the lock is held
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
