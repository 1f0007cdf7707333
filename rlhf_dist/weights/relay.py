"""Weights from node to node, over a plain socket, into the shared memory of the node that asks for them.

The relay of the learner's node offers a published version; those of other nodes copy it into a file of their own, from
which their node's rollout workers load as on the learner's node. Ray's object store would take three times as long.
Who connects has to prove that it knows the run's secret, which itself is not sent; what arrives is compared with the
learner's hashes. The bytes are not encrypted. A node that has the version before needs only the words that changed,
where the learner told which (`learner.delta_push`).
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights.changes import unpack
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.shared_memory import WeightReader, WeightWriter

NONCE_BYTES = 32
DIGEST = "sha256"
REQUEST = struct.Struct("!q?")
"""The version that is asked for; whether what it changes in the one before will do."""
YES = b"\0"
REFUSALS = {b"\1": "it rejects the secret of this run", b"\2": "it offers another version by now"}
WRONG_SECRET, OTHER_VERSION = REFUSALS
GREETING_S = 10.0
"""For who connects to prove itself, and to say what it wants."""
CONNECTIONS = 256
"""That are answered at once; more are closed, so that whoever knows no secret cannot use up what a process may have."""
Address = tuple[str, int]


class Offer:
    """The sending end: listens at `address` and hands out the version that was offered last."""

    def __init__(self, host: str, secret: bytes, *, timeout_s: float) -> None:
        """`host`: address of this node to listen at. `timeout_s`: for who receives to take more. Raises OSError."""
        self._secret = secret
        self._timeout_s = timeout_s
        self._offered: Announcement | None = None
        self._closed = threading.Event()
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        self._listening = socket.create_server((host, 0))
        self.address: Address = self._listening.getsockname()[:2]
        threading.Thread(target=self._serve, daemon=True, name="weights").start()

    def offer(self, announcement: Announcement) -> None:
        """Hand out this version from now on."""
        self._offered = announcement

    def close(self) -> None:
        """Listen no more. May be called twice."""
        self._closed.set()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listening.close()

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listening.accept()
            except OSError:  # closed, or out of descriptors for a while
                self._closed.wait(0.1)
                continue
            if self._room.acquire(blocking=False):
                threading.Thread(target=self._answer, args=(connection,), daemon=True, name="weights").start()
            else:
                connection.close()

    def _answer(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError):  # the other end says what it missed
                self._greet(connection)
        finally:
            self._room.release()

    def _greet(self, connection: socket.socket) -> None:
        """Hear who it is and what it wants, and give it. Raises OSError."""
        connection.settimeout(GREETING_S)
        nonce = secrets.token_bytes(NONCE_BYTES)
        connection.sendall(nonce)
        expected, end = prove(self._secret, nonce), time.monotonic() + GREETING_S
        proof, asked = read(connection, len(expected), end), REQUEST.unpack(read(connection, REQUEST.size, end))
        version, changes = asked
        if not hmac.compare_digest(proof, expected):
            connection.sendall(WRONG_SECRET)
            return
        offered = self._offered
        if offered is None or offered.version != version or (changes and offered.changes is None):
            connection.sendall(OTHER_VERSION)
            return
        if changes and offered.changes is not None:
            with open(offered.changes.path, "rb") as file:
                connection.sendall(YES)
                connection.settimeout(self._timeout_s)
                connection.sendfile(file, 0, offered.changes.nbytes)
            return
        with suppress(WeightSyncError):
            lease = WeightReader().hold(offered)  # Each its own: a lock belongs to the opening of the file.
            with lease.file, closing(lease):
                connection.sendall(YES)
                connection.settimeout(self._timeout_s)
                connection.sendfile(lease.file, offered.offset, offered.plan.nbytes)


class Fetch:
    """The receiving end of one node: keeps what it copied in shared memory, in two buffers, like the learner."""

    def __init__(self, secret: bytes, *, timeout_s: float) -> None:
        self._secret = secret
        self._timeout_s = timeout_s
        self._writer: WeightWriter | None = None
        self._held: Announcement | None = None

    def fetch(self, announcement: Announcement, address: Address) -> Announcement:
        """Copy the announced version from the learner's node; returns where it lies on this one.

        Bytes that are here already get the new number. Where the version before is here, only the words that changed
        are fetched, if the learner told which. Raises `WeightSyncError`, or `DiskError` for a node whose shared memory
        is too small; the next version is then fetched whole.
        """
        held, self._held = self._held, None
        if held is not None and held.same_weights(announcement):
            self._held = replace(held, version=announcement.version)
            return self._held
        if self._writer is None or self._writer.plan != announcement.plan:
            self.close()
            self._writer = WeightWriter(announcement.plan)
        found = self._receive(self._writer, announcement, address, held)
        for index, (sent, received) in enumerate(zip(announcement.hashes, found.hashes, strict=True)):
            if sent != received:
                version = f"version {announcement.version}"
                raise WeightSyncError(f"{version}: bucket {index} arrived as {received}, was announced as {sent}")
        self._held = found
        return found

    def _receive(
        self, writer: WeightWriter, announcement: Announcement, address: Address, held: Announcement | None
    ) -> Announcement:
        """The bytes into this node's memory, by what changed where `held` is the version before. Raises as `fetch`."""
        version, (host, port) = announcement.version, address
        changes = announcement.changes
        if changes is not None and (held is None or held.plan != announcement.plan or held.hashes != changes.base):
            changes = None
        try:
            with socket.create_connection(address, GREETING_S) as connection:
                self._ask(connection, version, changes is not None)
                end = time.monotonic() + self._timeout_s
                if changes is None or held is None:
                    return writer.copy(version, lambda part: fill(connection, part, end))
                packed = read(connection, changes.nbytes, end)
        except OSError as error:
            raise WeightSyncError(
                f"version {version} did not come from the learner's node ({host}:{port}): {error}"
            ) from None
        return writer.change(version, held, unpack(packed))

    def _ask(self, connection: socket.socket, version: int, changes: bool) -> None:
        end = time.monotonic() + GREETING_S
        proof = prove(self._secret, read(connection, NONCE_BYTES, end))
        connection.sendall(proof + REQUEST.pack(version, changes))
        answer = read(connection, len(YES), end)
        if answer != YES:
            raise ConnectionError(REFUSALS.get(answer, "it answers in another way than this version does"))

    def close(self) -> None:
        """Remove the node's file. May be called twice."""
        if self._writer is not None:
            self._writer.close()
        self._writer, self._held = None, None


def prove(secret: bytes, nonce: bytes) -> bytes:
    """What only somebody who knows the secret can answer to the nonce."""
    return hmac.digest(secret, nonce, DIGEST)


def read(connection: socket.socket, nbytes: int, end: float) -> bytes:
    """So many bytes, until `end` on the monotonic clock. Raises OSError."""
    found = bytearray(nbytes)
    with memoryview(found) as view:
        fill(connection, view, end)
    return bytes(found)


def fill(connection: socket.socket, view: memoryview, end: float) -> None:
    """Receive until the view is full, at most until `end` on the monotonic clock. Raises OSError."""
    have = 0
    while have < len(view):
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left)
        got = connection.recv_into(view[have:])
        if not got:
            raise ConnectionError("it closed the connection")
        have += got
