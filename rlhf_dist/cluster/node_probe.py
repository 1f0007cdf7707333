"""`python -m rlhf_dist.cluster.node_probe`: whether this machine can become a node of a Ray cluster.

`launch/ray_cluster.sh` asks before it starts Ray, which would try for minutes, or end with a traceback. Prints the
node's address and a free port; otherwise one message on standard error, with exit code 2.
"""

from __future__ import annotations

import argparse
import errno
import os
import platform
import re
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import metadata

from rlhf_dist.cluster.address import greet
from rlhf_dist.cluster.node_facts import installed
from rlhf_dist.errors import InputError, ResourceError

PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[.*?\])?==(?P<version>[^;\s]+)")
ANSWER_LIMIT_S = 20.0
"""For what the head says of itself."""


def wrong_pins(requirements: Sequence[str], versions: Mapping[str, str]) -> list[str]:
    """What is said of each library of `versions` that is another one than `requirements` pin."""
    pins = {found["name"]: found["version"] for line in requirements if (found := PIN.match(line))}
    return [
        f"{name} is {version} here, and {pins[name]} is pinned"
        for name, version in versions.items()
        if name in pins and version.partition("+")[0] != pins[name].partition("+")[0]
    ]


def check_pins() -> None:
    """Raises `ResourceError`."""
    if found := wrong_pins(metadata.requires("rlhf_dist") or [], installed()):
        raise ResourceError(f"{'; '.join(found)}. launch/setup.sh installs the pinned versions")


def check_port(host: str, port: int, option: str) -> None:
    """Whether a server can listen at the port; `host` empty: on all addresses. Raises `ResourceError`."""
    family = socket.AF_INET if host or not socket.has_dualstack_ipv6() else socket.AF_INET6
    try:
        socket.create_server((host, port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise ResourceError(f"{host} is not an address of this machine; `ip addr` lists those it has") from None
        where = f"port {port}{f' of {host}' if host else ''}"
        if error.errno != errno.EADDRINUSE:
            raise ResourceError(f"{where} cannot be used ({error.strerror})") from None
        raise ResourceError(
            f"{where} is in use (`ss -ltnp sport = :{port}` shows by what): stop that, or give another with {option}"
        ) from None


def check_numbers(port: int, dashboard_port: int) -> None:
    """Whether these can be the ports of a head. Raises `InputError`."""
    for option, number in (("--port", port), ("--dashboard-port", dashboard_port)):
        if not 0 < number < 2**16:
            raise InputError(f"{option} is '{number}'; give a number from 1 to 65535")
    if port == dashboard_port:
        raise InputError(f"--port and --dashboard-port are both {port}; give two numbers")


def check_head(host: str, port: int) -> None:
    """Whether a head answers there that takes the token and has this machine's Ray. Raises `ResourceError`."""
    where = f"{host}:{port}"
    if problem := greet(host, port, ANSWER_LIMIT_S):
        raise ResourceError(f"no head at {where}: {problem}. Is it up (launch/ray_cluster.sh head), and the port open?")
    found: list[dict[str, str] | Exception] = []

    def ask() -> None:
        from ray._common.usage import usage_lib
        from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

        try:
            found.append(usage_lib.get_cluster_metadata(GcsClient(address=where)) or {})
        except Exception as error:  # Ray's own errors have many types, and no common one
            found.append(error)

    from ray import __version__
    from ray.exceptions import AuthenticationError

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_LIMIT_S)
    answer = found[0] if found else TimeoutError(f"no answer in {ANSWER_LIMIT_S:g} s")
    if isinstance(answer, AuthenticationError):
        raise ResourceError(f"the head at {where} refuses the token: copy the file ~/.ray/auth_token from the head")
    if isinstance(answer, Exception):
        raise ResourceError(f"the head at {where} does not say what it is: {' '.join(str(answer).split())[:300]}")
    for name, here, key in (
        ("ray", __version__, "ray_version"),
        ("Python", platform.python_version(), "python_version"),
    ):
        there = answer.get(key, here)
        if there != here:
            raise ResourceError(
                f"{name} is {here} here and {there} at the head {where}: make both environments from the same checkout "
                "(launch/setup.sh)"
            )


def address_and_port(text: str, default: int) -> tuple[str, int]:
    """HOST or HOST:PORT. Raises `InputError`."""
    host, _, port = text.partition(":")
    if not host or "/" in text or not (port or str(default)).isdecimal() or not 0 < int(port or default) < 2**16:
        raise InputError(f"'{text}' is not the address of a head, as in 10.0.0.1 or 10.0.0.1:6379")
    return host, int(port or default)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--head", default="")
    parser.add_argument("--address", default="")
    parser.add_argument("--port", type=int, default=6379)
    parser.add_argument("--dashboard-port", type=int, default=8265)
    given = parser.parse_args()
    messages = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Ray has words of its own
    try:
        check_pins()
        head = address_and_port(given.head, given.port) if given.head else None
        from ray._private.services import get_node_ip_address

        address = given.address or get_node_ip_address(f"{head[0]}:{head[1]}" if head else "8.8.8.8:53")
        if head:
            check_port(address, 0, "--address")
            check_head(*head)
        else:
            check_numbers(given.port, given.dashboard_port)
            check_port("", given.port, "--port")
            check_port(address, given.dashboard_port, "--dashboard-port")
        client = free_port()
    except (InputError, ResourceError) as error:
        os.write(messages, f"ray_cluster: {error}\n".encode())
        return 2
    except BaseException:
        os.dup2(messages, 2)
        raise
    print(address, client, ":".join(map(str, head)) if head else f"{address}:{given.port}")
    return 0


def free_port() -> int:
    """For Ray Client's server, which nobody here uses, and without which Ray's node ends.

    Ray's default, or one above those of Ray's workers and below those that the system gives out by itself, of which
    another process would take one before the server does.
    """
    for port in (10001, *range(32000, 32700)):
        try:
            socket.create_server(("", port)).close()
        except OSError:
            continue
        return port
    raise ResourceError("port 10001 and ports 32000 to 32699 are all in use; end what uses them")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # Ray's client may have a thread that still waits
