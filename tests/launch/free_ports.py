"""Ports for the nodes of a Ray cluster that a test starts."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """Above those of Ray's workers, and below those that the system gives out by itself and others may take first."""
    while True:
        try:
            with socket.create_server(("127.0.0.1", random.randrange(20000, 32000))) as probe:
                return probe.getsockname()[1]
        except OSError:
            continue
