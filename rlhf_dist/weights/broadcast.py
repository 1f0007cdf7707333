"""One process group for weights: learner rank 0 sends, the processes of all engines receive.

torch's own group, gloo between CPUs and nccl between GPUs, which nothing else knows of. Every wait has an end. Whoever
leaves a group in the middle breaks it for all: it is made anew then.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights.own_address import interface_of, own_address
from rlhf_dist.weights.rounds import first_line

POLL_S = 0.0002
"""Between looks at a transfer of nccl, whose own wait has no end."""
BEYOND_S = 600.0
"""nccl's own limit, beyond ours: reaching it would end the process."""


class BroadcastGroup:
    """One process's part. Whoever is rank 0 sends."""

    def __init__(
        self, store: Any, name: str, rank: int, size: int, device: torch.device, host: str, ends: float
    ) -> None:
        """All ranks call this side by side; `host` is where the store is. Raises `WeightSyncError` or OSError."""
        limit, own = max(ends - time.monotonic(), 0.001), own_address(host)
        self._device = device
        self._options = distributed.BroadcastOptions()
        self._options.rootRank = self._options.rootTensor = 0
        self._group: Any = None
        make, prefixed = nccl if device.type == "cuda" else gloo, PrefixStore(name, store)

        def connect() -> None:
            self._group = make(prefixed, rank, size, own, limit)
            # nccl connects at the first transfer only, and that has to be before any model is touched.
            self.move(torch.zeros(1, dtype=torch.uint8, device=device), ends)

        in_time(connect, limit)

    def move(self, data: Tensor, ends: float) -> None:
        """Send `data`, or fill it with what is sent. Raises `WeightSyncError` at `ends`, on the monotonic clock."""
        try:
            work = self._group.broadcast([data], self._options)
            if self._device.type == "cuda":
                while not work.is_completed():
                    if time.monotonic() > ends:
                        raise WeightSyncError("the transfer of weights did not end in time")
                    time.sleep(POLL_S)
            work.wait(timedelta(seconds=max(ends - time.monotonic(), 0.001)))
        except RuntimeError as error:
            raise WeightSyncError(f"the transfer of weights failed: {first_line(error)}") from None

    def close(self) -> None:
        """Leave; a transfer that still goes on is given up. May be called twice."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def in_time(connect: Callable[[], None], limit_s: float) -> None:
    """Connect, in a thread that is left behind where it does not end: nccl waits without end for who does not come.

    Raises `WeightSyncError`, also for what `connect` raises.
    """
    failures: list[str] = []

    def run() -> None:
        try:
            connect()
        except Exception as error:
            failures.append(first_line(error))

    thread = threading.Thread(target=run, daemon=True, name="weights")
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise WeightSyncError("the others did not connect in time")
    if failures:
        raise WeightSyncError(failures[0])


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
    return distributed.ProcessGroupNCCL(store, rank, size, options)
