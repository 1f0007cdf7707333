"""The cluster that RAY_ADDRESS names: whether one answers there, found out before anything is started.

Ray itself would try for minutes, inside calls that cannot be interrupted, and print warnings of its own. So another
process tries first (`join_probe`), which is ended at the limit.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from rlhf_dist.config.schema import ClusterConfig
from rlhf_dist.errors import ResourceError

VARIABLE = "RAY_ADDRESS"
WAY_OUT = (
    f"Correct {VARIABLE} or start the cluster; for a Ray of its own on this machine, unset {VARIABLE} or set "
    "cluster.address=local"
)
RIGHT = "the address of a cluster is HOST:PORT, such as 10.0.0.1:6379"
GREETING_LIMIT_S = 10.0
"""A server that is alive greets at once."""
HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""The preface of a client, and its empty settings."""
NOT_RAY = "a server answers, but not a Ray cluster (whose own port is 6379 by default)"
FRAME_HEAD = 9
SETTINGS = 4
PACKAGE = Path(__file__).resolve().parents[1]


def joins_cluster(config: ClusterConfig) -> bool:
    """Whether a cluster is there to be joined, which is so inside a Ray job."""
    return config.address == "auto" and os.environ.get(VARIABLE, "") not in ("", "local")


def check_cluster(config: ClusterConfig) -> None:
    """Refuse an address at which no cluster can be joined from this machine. Raises `ResourceError`."""
    if not joins_cluster(config):
        return
    given = os.environ[VARIABLE]
    if given != "auto":
        parse(given)
    limit = config.start_timeout_s
    # This package has to be found, and not what lies in the folder of the command.
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "rlhf_dist.cluster.join_probe", given, str(limit)],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise refusal(given, f"no cluster answered in {limit:g} s (cluster.start_timeout_s)") from None
    try:
        problem = json.loads(done.stdout.splitlines()[-1])["problem"]
    except (IndexError, ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        problem = f"joining the cluster failed: {last}"
    if problem:
        raise refusal(given, problem)


def refusal(given: str, problem: str) -> ResourceError:
    """The error for an address that is of no use."""
    return ResourceError(f"{VARIABLE}={given}: {problem}. {WAY_OUT}")


def parse(text: str) -> tuple[str, int]:
    """HOST:PORT or [IPv6]:PORT -> host and port. Raises `ResourceError`."""
    if text.startswith(("http://", "https://")):
        raise refusal(text, f"this is the address of a dashboard, for `ray job submit`; {RIGHT}")
    if text.startswith("ray://"):
        raise refusal(text, f"Ray Client is not supported, run the command on a node of the cluster; {RIGHT}")
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or "/" in host or any(c.isspace() for c in text) or (":" in host and not bracketed):
        raise refusal(text, f"not an address; {RIGHT}")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise refusal(text, f"{port!r} is not a port, a number from 1 to 65535; {RIGHT}")
    return host, int(port)


def greet(host: str, port: int, limit_s: float) -> str:
    """What is wrong with the server at this address, as far as its first words tell; empty: it speaks as Ray does."""
    limit_s = min(limit_s, GREETING_LIMIT_S)
    try:
        with socket.create_connection((host, port), timeout=limit_s) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
                return ""  # the greeting is inside TLS
            connection.sendall(HTTP2_HELLO)
            answer = b""
            while len(answer) < FRAME_HEAD:
                received = connection.recv(FRAME_HEAD - len(answer))
                if not received:
                    break
                answer += received
    except (ConnectionResetError, BrokenPipeError):
        return NOT_RAY
    except TimeoutError:
        return f"nothing answers in {limit_s:g} s"
    except (OSError, UnicodeError) as error:
        return f"cannot be reached: {getattr(error, 'strerror', None) or error}"
    if len(answer) == FRAME_HEAD and answer[3] == SETTINGS and not any(answer[5:]):
        return ""
    return NOT_RAY
