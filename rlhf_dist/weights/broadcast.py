"""One process group for weights: learner rank 0 sends, the processes of all engines receive.

torch's own group, gloo between CPUs and nccl between GPUs, which nothing else knows of. Every wait has an end. Whoever
leaves a group in the middle breaks it for all: it is made anew then.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights.own_address import interface_of, own_address
from rlhf_dist.weights.receipts import LIMIT_KEY
from rlhf_dist.weights.rounds import connected, first_line, in_time

POLL_S = 0.0002
"""Between looks at a transfer of nccl, whose own wait has no end."""
BEYOND_S = 600.0
"""nccl's own limit is set once for a group, and a later round may have more time than the first one had left."""
ON_ERROR = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
"""What a group's watchdog does when a peer is gone. 3, the default, ends the process; 0 leaves it to who waits."""

LATE = f"the transfer of weights did not end in time ({LIMIT_KEY})"


class BroadcastGroup:
    """One process's part. Whoever is rank 0 sends."""

    def __init__(
        self, address: tuple[str, int], name: str, rank: int, size: int, device: torch.device, ends: float
    ) -> None:
        """All ranks call this side by side; `address`: of the sender's store. Raises `WeightSyncError` or OSError.

        With a connection to the store of its own: what is left behind here would keep another's for itself.
        """
        limit, own = max(ends - time.monotonic(), 0.001), own_address(address[0])
        self._device = device
        self._options = distributed.BroadcastOptions()
        self._options.rootRank = self._options.rootTensor = 0
        self._group: Any = None
        self._given_up = False
        make = nccl if device.type == "cuda" else gloo

        def connect() -> None:
            self._group = make(PrefixStore(name, connected(address, limit)), rank, size, own, limit)
            # nccl connects at the first transfer only, and that has to be before any model is touched.
            if not self._given_up:
                self.move(torch.zeros(1, dtype=torch.uint8, device=device), ends)
            if self._given_up:
                self.close()

        try:
            in_time(connect, limit, "the others did not connect in time")
        except Exception as error:
            self._given_up = True
            self.close()
            raise WeightSyncError(first_line(error)) from None

    def move(self, data: Tensor, ends: float) -> None:
        """Send `data`, or fill it with what is sent. Raises `WeightSyncError` at `ends`, on the monotonic clock."""
        try:
            # gloo's own limit for an operation is the one that the group had to connect, and may be shorter.
            self._options.timeout = remaining(ends)
            work = self._group.broadcast([data], self._options)
            if self._device.type == "cuda":
                while not work.is_completed():
                    if time.monotonic() > ends:
                        raise WeightSyncError(LATE)
                    time.sleep(POLL_S)
            work.wait(remaining(ends))
        except RuntimeError as error:
            if "timed out" in str(error).lower():
                raise WeightSyncError(LATE) from None
            raise WeightSyncError(f"the transfer of weights failed: {first_line(error)}") from None

    def close(self) -> None:
        """Leave; a transfer that still goes on is given up. May be called twice."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def remaining(ends: float) -> timedelta:
    """Until then on the monotonic clock; above 0, which would be no limit."""
    return timedelta(seconds=max(ends - time.monotonic(), 0.001))


def gloo(store: Any, rank: int, size: int, own: str, limit_s: float) -> Any:
    """A group of CPUs, on the interface that has the address `own`."""
    kind: Any = distributed.ProcessGroupGloo
    options = kind._Options()
    options._timeout = timedelta(seconds=limit_s)
    options._devices = [kind.create_device(hostname=own)]
    return kind(store, rank, size, options)


def nccl(store: Any, rank: int, size: int, own: str, limit_s: float) -> Any:
    """The same of GPUs. The interface is the process's first one for good: nccl reads it once."""
    if interface := interface_of(own):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    options: Any = distributed.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=limit_s + BEYOND_S)
    before = os.environ.get(ON_ERROR)
    os.environ[ON_ERROR] = "0"  # read here only; other groups of the process, such as the learner's, keep their own
    try:
        return distributed.ProcessGroupNCCL(store, rank, size, options)
    finally:
        del os.environ[ON_ERROR]
        if before is not None:
            os.environ[ON_ERROR] = before
