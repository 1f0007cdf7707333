"""A bucket that processes on one device share: the sender fills it, the receivers copy it before it is overwritten.

On a GPU it is memory that CUDA shares between processes (no copy through the host); on a CPU a file in shared memory.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights.receipts import LIMIT_KEY, Round, named_engines
from rlhf_dist.weights.rounds import awaited, first_line, key
from rlhf_dist.weights.shared_memory import PREFIX, SHARED_MEMORY, map_file, private_file, sweep

BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Tells machines apart. Containers of one machine may have shared memory of their own: its device number tells."""


class Staging(Protocol):
    """The sender's bucket."""

    tensor: Tensor
    """uint8 [bytes of the largest bucket]."""

    def export(self) -> str:
        """What another process needs to see it."""
        ...

    def close(self) -> None:
        """Give the memory back once nobody sees it any more. May be called twice."""
        ...


class FileStaging:
    """On a CPU."""

    def __init__(self, nbytes: int) -> None:
        sweep(SHARED_MEMORY)
        self._path = SHARED_MEMORY / f"{PREFIX}{os.getuid()}-{secrets.token_hex(8)}.weights"
        self._file = private_file(self._path, nbytes)
        self.tensor: Tensor = torch.frombuffer(map_file(self._path), dtype=torch.uint8)

    def export(self) -> str:
        """Its path."""
        return str(self._path)

    def close(self) -> None:
        """Maps of others stay valid."""
        self._path.unlink(missing_ok=True)
        self._file.close()


class CudaStaging:
    """On a GPU."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def export(self) -> str:
        """Handles of CUDA, as text: numbers and bytes only, which nothing executes."""
        _, given = reduce_tensor(self.tensor)
        return encoded(given[7:])

    def close(self) -> None:
        """torch keeps what others have open until they let go of it, and looks when it is asked."""
        self.tensor = torch.empty(0, dtype=torch.uint8)
        torch.cuda.ipc_collect()


def encoded(handles: Any) -> str:
    """Bytes as base64, all else as it is."""
    return json.dumps([{"b": base64.b64encode(one).decode()} if isinstance(one, bytes) else one for one in handles])


def decoded(text: str) -> list[Any]:
    """What `encoded` was given."""
    return [base64.b64decode(one["b"]) if isinstance(one, dict) else one for one in json.loads(text)]


def make_staging(nbytes: int, device: torch.device) -> Staging:
    """Of so many bytes. Raises OSError, or what CUDA raises, where there is no room."""
    return CudaStaging(nbytes, device) if device.type == "cuda" else FileStaging(nbytes)


def sealed(secret: str, name: str, text: str) -> str:
    """The text behind a code that only who knows the secret can make, and for this name in the store only."""
    return f"{code(secret, name, text.encode())} {text}"


def unsealed(secret: str, name: str, data: bytes) -> str:
    """What was sealed. Raises `WeightSyncError` for anything else."""
    found, _, text = data.partition(b" ")
    if not hmac.compare_digest(found, code(secret, name, text).encode()):
        raise WeightSyncError(f"{name} in the learner's store was not written by the learner")
    return text.decode()


def code(secret: str, name: str, text: bytes) -> str:
    """HMAC-SHA256."""
    return hmac.new(secret.encode(), name.encode() + b"\n" + text, "sha256").hexdigest()


def see(exported: str, nbytes: int, device: torch.device) -> Tensor:
    """Another process's bucket, uint8 [nbytes]. Raises `WeightSyncError` for a file that is none of `FileStaging`'s."""
    if device.type != "cuda":
        path = Path(exported)
        if path.parent != SHARED_MEMORY or not path.name.startswith(PREFIX):
            raise WeightSyncError(f"{exported} is not a bucket: those are {SHARED_MEMORY}/{PREFIX}*")
        return torch.frombuffer(map_file(path), dtype=torch.uint8, count=nbytes)
    # Its first seven arguments say what kind of tensor it is, and on which of the process's own devices.
    kind = (Tensor, (nbytes,), (1,), 0, torch.UntypedStorage, torch.uint8, device.index or 0)
    return rebuild_cuda_tensor(*kind, *decoded(exported))


def identity(device: torch.device) -> str:
    """Names the device for all processes: who has the same can see the same bucket."""
    if device.type != "cuda":
        return f"{BOOT.read_text(encoding='ascii').strip()}/{os.stat(SHARED_MEMORY).st_dev}"
    return str(torch.cuda.get_device_properties(device).uuid)


def synchronize(device: torch.device) -> None:
    """Wait until what was asked of a GPU is done: other processes do not know its queue."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class StagingSender:
    """A learner rank's end.

    Nothing ties the receivers to each other, so one that dies or is late costs the others time only: it has half of
    what is left of the limit for a bucket, and then they go on without its engine.
    """

    def __init__(self, store: Any, made: Round, ranks: list[int], nbytes: int, device: torch.device) -> None:
        """`ranks`: the receivers on this device."""
        self._store, self._round, self._ranks, self._device = store, made, list(ranks), device
        self._alone = len(set(made.engines)) == 1
        self.left_out: dict[str, str] = {}
        self._staging = make_staging(nbytes, device)
        self.buffer = self._staging.tensor
        name = key(made, "export", identity(device))
        store.set(name, sealed(made.meeting.secret, name, self._staging.export()))

    def send(self, index: int, nbytes: int, ends: float) -> None:
        """Let the receivers take what is in the buffer; see `left_out` for those that did not."""
        if not self._ranks:
            return
        synchronize(self._device)
        filled = key(self._round, f"filled {identity(self._device)}", index)
        self._store.set(filled, "")
        keys = {rank: key(self._round, f"taken {index}", rank) for rank in self._ranks}
        now = time.monotonic()
        if not awaited(self._store, list(keys.values()), ends if self._alone else now + (ends - now) / 2):
            self._leave_out(index, [rank for rank, own in keys.items() if not self._store.check([own])])
        for own in keys.values():
            self._store.delete_key(own)
        if self.left_out:  # for who comes later, as the bucket will hold the next one's bytes
            self._store.set(filled, "; ".join(self.left_out.values()))
        else:
            self._store.delete_key(filled)

    def _leave_out(self, index: int, late: list[int]) -> None:
        """An engine of several processes is of no use without one of them."""
        for name in named_engines(self._round, late):
            self.left_out[name] = f"{name} did not take bucket {index} in time ({LIMIT_KEY})"
        self._ranks = [rank for rank in self._ranks if self._round.engines[rank - 1] not in self.left_out]

    def give_up(self, index: int, why: str) -> None:
        """Tell those that wait for bucket `index`, or have taken it, that no more comes."""
        for number in (index, index + 1):
            self._store.set(key(self._round, f"filled {identity(self._device)}", number), why)

    def close(self) -> None:
        """May be called twice."""
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self._staging.close()
        self._store.delete_key(key(self._round, "export", identity(self._device)))


class StagingReceiver:
    """An engine process's end."""

    def __init__(self, store: Any, made: Round, rank: int, nbytes: int, device: torch.device, ends: float) -> None:
        """Raises `WeightSyncError` where no learner rank is on this device."""
        self._store, self._round, self._rank, self._device = store, made, rank, device
        there = key(made, "export", identity(device))
        if not awaited(store, [there], ends):
            raise WeightSyncError(f"no learner rank has shared a bucket on this process's device, {identity(device)}")
        exported = unsealed(made.meeting.secret, there, store.get(there))
        self._seen: Tensor | None = see(exported, nbytes, device)

    def receive(self, index: int, into: Tensor, ends: float) -> None:
        """Copy bucket `index`, and tell. Raises `WeightSyncError` where it does not come by `ends`."""
        filled = key(self._round, f"filled {identity(self._device)}", index)
        try:
            if not awaited(self._store, [filled], ends):
                raise WeightSyncError(f"the learner did not fill bucket {index} in time ({LIMIT_KEY})")
            why = self._store.get(filled).decode()
            if why:
                raise WeightSyncError(f"the learner gave up: {why}")
            assert self._seen is not None
            into.copy_(self._seen[: len(into)])
            synchronize(self._device)
            self._store.set(key(self._round, f"taken {index}", self._rank), "")
        except RuntimeError as error:
            raise WeightSyncError(f"bucket {index} did not come: {first_line(error)}") from None

    def close(self) -> None:
        """Let go of the sender's memory. May be called twice."""
        self._seen = None
