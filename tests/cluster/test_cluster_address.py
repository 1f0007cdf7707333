"""A cluster that is named and cannot be joined is told at once, by the variable's name, whatever answers there."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from rlhf_dist.cluster import address, join_probe
from rlhf_dist.cluster.address import HTTP2_HELLO, check_cluster, greet, joins_cluster, parse
from rlhf_dist.config.schema import ClusterConfig
from rlhf_dist.errors import ResourceError

Answer = Callable[[socket.socket], None]
EMPTY_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def silent(connection: socket.socket) -> None:
    connection.recv(100)


def grpc(connection: socket.socket) -> None:
    assert connection.recv(100) == HTTP2_HELLO
    connection.sendall(EMPTY_SETTINGS[:4])
    connection.sendall(EMPTY_SETTINGS[4:])


def says(words: bytes) -> Answer:
    return lambda connection: connection.sendall(words)


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], int]]:
    """Start a server on loopback that answers as told; returns its port."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        kept = []

        def accept(answer: Answer) -> None:
            connection, _ = listener.accept()
            kept.append(connection)
            answer(connection)
            if answer is not silent:
                connection.close()

        def start(answer: Answer) -> int:
            threading.Thread(target=accept, args=(answer,), daemon=True).start()
            return listener.getsockname()[1]

        yield start
        for connection in kept:
            connection.close()


def closed_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (grpc, ""),
        (silent, "nothing answers in 0.2 s"),
        (says(b"SSH-2.0-OpenSSH_9.2\r\n"), "a server answers, but not a Ray cluster"),
        (says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "a server answers, but not a Ray cluster"),
        (says(b""), "a server answers, but not a Ray cluster"),
        (says(bytes([0, 0, 4, 8, 0, 0, 0, 0, 0])), "a server answers, but not a Ray cluster"),
    ],
)
def test_the_first_words_of_a_server(serve: Callable[[Answer], int], answer: Answer, told: str) -> None:
    found = greet("127.0.0.1", serve(answer), 0.2)
    assert found.startswith(told) and bool(found) == bool(told)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert greet("127.0.0.1", closed_port(), 1) == "cannot be reached: Connection refused"
    assert greet("a..b", 1, 1).startswith("cannot be reached: ")

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert greet("no-such-host", 6379, 1) == "cannot be reached: Name or service not known"


@pytest.mark.parametrize("text", ["10.0.0.1:6379", "head.example.org:6379", "localhost:1"])
def test_an_address(text: str) -> None:
    host, port = parse(text)
    assert f"{host}:{port}" == text
    assert parse("[::1]:6379") == ("::1", 6379)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("foo", "not an address; the address of a cluster is HOST:PORT"),
        (":6379", "not an address"),
        ("::1:6379", "not an address"),
        (" ", "not an address"),
        ("10.0.0.1:6379/", "'6379/' is not a port"),
        ("10.0.0.1 :6379", "not an address"),
        ("127.0.0.1:notaport", "'notaport' is not a port, a number from 1 to 65535"),
        ("127.0.0.1:0", "'0' is not a port"),
        ("127.0.0.1:65536", "'65536' is not a port"),
        ("127.0.0.1:²", "'²' is not a port"),
        ("ray://127.0.0.1:10001", "Ray Client is not supported"),
        ("http://127.0.0.1:8265", "this is the address of a dashboard, for `ray job submit`"),
    ],
)
def test_what_is_no_address_is_told_without_trying(monkeypatch: pytest.MonkeyPatch, text: str, told: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", text)
    monkeypatch.setattr(address.subprocess, "run", lambda *_, **__: pytest.fail("it was tried"))
    with pytest.raises(ResourceError) as raised:
        check_cluster(ClusterConfig())
    assert str(raised.value).startswith(f"RAY_ADDRESS={text}: {told}")
    assert "set cluster.address=local" in str(raised.value)


def test_a_dead_address_is_tried_by_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    port = closed_port()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ResourceError, match=rf"RAY_ADDRESS=127\.0\.0\.1:{port}: cannot be reached: Connection refused"):
        check_cluster(ClusterConfig(start_timeout_s=60))
    assert capfd.readouterr() == ("", "")


def test_an_attempt_without_end_is_ended_at_the_limit(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[[Answer], int]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{serve(silent)}")
    with pytest.raises(ResourceError, match=r"no cluster answered in 0.05 s \(cluster\.start_timeout_s\)"):
        check_cluster(ClusterConfig(start_timeout_s=0.05))


def test_auto_without_a_cluster_or_with_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert join_probe.problem("auto", 1.0).startswith("no Ray cluster runs on this machine")
    stale = f"127.0.0.1:{closed_port()}"
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: stale)
    assert join_probe.problem("auto", 1.0) == f"{stale} cannot be reached: Connection refused"


@pytest.mark.parametrize(
    ("variable", "key", "joins"),
    [
        ("", "auto", False),
        ("local", "auto", False),
        ("h:1", "auto", True),
        ("auto", "auto", True),
        ("h:1", "local", False),
    ],
)
def test_which_runs_join(monkeypatch: pytest.MonkeyPatch, variable: str, key: str, joins: bool) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    config = ClusterConfig(address=key)  # pyright: ignore[reportArgumentType]
    assert joins_cluster(config) == joins
    if not joins:
        check_cluster(config)
