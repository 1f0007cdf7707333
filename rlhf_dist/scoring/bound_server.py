"""A server of this package behind a socket that was bound before it: where it listens is known before it starts."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import Message as Event, Receive

from rlhf_dist.errors import ResourceError

CONNECTIONS = 256
"""At once; one more is answered 503, and asks again."""
KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection, so that it is they who close it."""
CLOSE_LIMIT_S = 10


def bind(host: str, port: int) -> socket.socket:
    """A socket of this address, not listening yet; port 0: a free one. Raises ResourceError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ResourceError(
            f"{host}:{port} cannot be listened at: {error.strerror}; choose another with --port or --host"
        ) from None
    return bound


def counted(receive: Receive, most: int, too_large: str) -> Receive:
    """Stops a body of more than `most` bytes that is sent without its length: 413, with these words."""
    seen = 0

    async def counting() -> Event:
        nonlocal seen
        event = await receive()
        seen += len(event.get("body", b""))
        if seen > most:
            raise HTTPException(413, too_large)
        return event

    return counting


class BoundServer(uvicorn.Server):
    """Serves on a bound socket until it is told to stop: `should_exit`, or Ctrl-C in the main thread."""

    def __init__(self, app: FastAPI, bound: socket.socket, ready: Callable[[str], None]) -> None:
        """`ready` is called with the address as soon as requests are answered."""
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                limit_concurrency=CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_LIMIT_S,
            )
        )
        self._bound = bound
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell that requests are answered."""
        await super().startup(sockets)
        host, port = self._bound.getsockname()[:2]
        self._ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def serve_forever(self) -> None:
        """Until told to stop. Raises KeyboardInterrupt after Ctrl-C, when what was begun has been answered."""
        self.run(sockets=[self._bound])
