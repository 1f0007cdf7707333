"""By which address of its own a process is reached, and the network interface that has it."""

from __future__ import annotations

import socket

import psutil


def own_address(host: str) -> str:
    """This machine's address on the way to `host`: loopback for loopback. Sends nothing. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The network interface that has the address, such as `lo` or `eth0`; empty where none has it."""
    found = psutil.net_if_addrs().items()
    return next((name for name, own in found if any(one.address == address for one in own)), "")
