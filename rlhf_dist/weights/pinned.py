"""Mapped shared memory that a GPU reads and writes directly. Other memory the driver copies by way of its own."""

from __future__ import annotations

import logging
import mmap
from typing import Any

import numpy as np

SUCCESS = 0
DEFAULT_FLAGS = 0


class PinnedMap:
    """A map whose pages are registered with the CUDA driver of this process until `close`."""

    def __init__(self, memory: mmap.mmap) -> None:
        """Where the driver refuses, copies are slower and nothing else: the log says so."""
        import torch

        whole = np.frombuffer(memory, np.uint8)
        self._runtime: Any = torch.cuda.cudart()
        self._address = int(whole.ctypes.data)
        code = int(self._runtime.cudaHostRegister(self._address, whole.nbytes, DEFAULT_FLAGS))
        self._registered = code == SUCCESS
        if not self._registered:
            logging.getLogger(__name__).warning(
                "the weights in shared memory are copied to and from the GPU by way of the driver's own memory: "
                "cudaHostRegister gave error %d for %d MiB",
                code,
                whole.nbytes // 2**20,
            )

    def close(self) -> None:
        """Before the map goes. May be called twice."""
        if self._registered:
            self._registered = False
            self._runtime.cudaHostUnregister(self._address)
