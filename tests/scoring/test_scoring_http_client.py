"""The client of reward servers against servers that misbehave, each real and on loopback."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from judges import MESSAGES, make_texts

from rlhf_dist.config.schema import RewardSpec, ScoringConfig
from rlhf_dist.errors import ConfigError, ResourceError, RewardError
from rlhf_dist.scoring import http_calls
from rlhf_dist.scoring.http_client import HttpReward
from rlhf_dist.scoring.scorer import preflight

TOKEN = "s3cr3t-t0ken"
VARIABLE = "TEST_REWARD_TOKEN"
TEXTS = make_texts(["one", "two"], ["1", "2"])
Answer = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_calls, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv(VARIABLE, TOKEN)


class Seen:
    """What a server was sent."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.tokens: list[str | None] = []
        self.paths: list[str] = []


@contextmanager
def serving(*answers: Answer) -> Iterator[tuple[str, Seen]]:
    """A server that gives each answer once and the last one for ever."""
    seen, left = Seen(), list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.bodies.append(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null"))
            seen.tokens.append(self.headers.get("Authorization"))
            seen.paths.append(self.path)
            (left.pop(0) if len(left) > 1 else left[0])(self)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def says(body: object, status: int = 200, kind: str = "application/json", **headers: str) -> Answer:
    content = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


FINE = says({"scores": [1, 2.5]})


def ask(url: str, retries: int = 2, timeout_s: float = 5.0, limit_s: float = 60.0, **options: Any) -> list[float]:
    spec = RewardSpec(kind="http", url=url, retries=retries, timeout_s=timeout_s, **options)
    with closing(HttpReward("far", spec, limit_s)) as reward:
        values = reward(TEXTS)
    assert values.dtype == np.float32
    return values.tolist()


def test_what_is_sent_and_what_comes_back() -> None:
    with serving(FINE) as (url, seen):
        assert ask(url, token_env=VARIABLE) == [1, 2.5]
    turns = [{"role": m.role, "content": m.content} for m in MESSAGES]
    assert seen.bodies == [
        {
            "prompts": ["say hi", "say hi"],
            "responses": ["one", "two"],
            "answers": ["1", "2"],
            "conversations": [turns, turns],
            "ended": [True, True],
        }
    ]
    assert seen.tokens == [f"Bearer {TOKEN}"] and seen.paths == ["/score"]


def test_scores_that_are_not_finite_come_as_they_are_and_null_as_nan() -> None:
    with serving(says('{"scores": [NaN, -Infinity]}'), says({"scores": [None, 1e300]})) as (url, _):
        np.testing.assert_array_equal(ask(url), [math.nan, -math.inf])
        np.testing.assert_array_equal(ask(url), [math.nan, math.inf])


@pytest.mark.parametrize("bad", [says("oops", 500), says({"detail": "busy"}, 503), says({"detail": "slow down"}, 429)])
def test_what_may_pass_is_tried_again(bad: Answer) -> None:
    with serving(bad, bad, FINE) as (url, seen):
        assert ask(url) == [1, 2.5]
    assert len(seen.bodies) == 3


def hangs(handler: BaseHTTPRequestHandler) -> None:
    handler.rfile.read(1)  # until the client goes away


def breaks_off(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def drips(handler: BaseHTTPRequestHandler) -> None:
    """Answers for ever, each part well within the client's limit for a read."""
    handler.send_response(200)
    handler.end_headers()
    pause = threading.Event()
    try:
        while True:
            handler.wfile.write(b" ")
            pause.wait(0.02)
    except OSError:
        pass


def floods(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" " * 2**20)
    except OSError:
        pass


@pytest.mark.parametrize("bad", [hangs, breaks_off, drips])
def test_a_silent_or_broken_answer_is_tried_again(bad: Answer) -> None:
    with serving(bad, FINE) as (url, seen):
        assert ask(url, timeout_s=0.5) == [1, 2.5]
    assert len(seen.bodies) == 2


@pytest.mark.parametrize(
    ("answer", "tries", "words"),
    [
        (hangs, 2, r"did not answer within 0\.5 s \(tried 2 times\)"),
        (drips, 2, r"did not answer within 0\.5 s \(tried 2 times\)"),
        (breaks_off, 2, r"broke off: RemoteProtocolError: .* \(tried 2 times\)"),
        (floods, 1, "answered with more than 16 MiB"),
        (says({"detail": "no model"}, 500), 2, r"answered 500: no model \(tried 2 times\)"),
        (says("<html>\n<b>Bad gateway</b>", 502, "text/html"), 2, "answered 502: <html> <b>Bad gateway</b>"),
        (
            says("<!doctype html>\n" + "x" * 999, kind="text/html"),
            1,
            r"text/html, not JSON: <!doctype html> xxx+\.\.\.",
        ),
        (says(b"\xff\xfe", kind="text/plain"), 1, "answered with text/plain, not JSON"),
        (says("[" * 100_000), 1, "not JSON"),
        (says("", 302, Location="http://elsewhere/"), 1, "answered 302, go to http://elsewhere/; that is not followed"),
        (says({"detail": "prompts: missing"}, 422), 1, "answered 422: prompts: missing"),
        (says({"error": 3}, 404), 1, r'answered 404: \{"error": 3\}'),
        (says([1, 2]), 1, r'answered \[1, 2\]; it has to be \{"scores"'),
        (says({"score": [1, 2]}), 1, r'answered \{"score": \[1, 2\]\}; it has to be'),
        (says({"scores": 3}), 1, r"returned 3 \(int\); it has to return a list of 2 numbers"),
        (says({"scores": [1]}), 1, "returned 1 values for 2 responses"),
        (says({"scores": [[1], 2]}), 1, r"returned \[1\], not a number \(list\), for response 0: 'one'"),
        (says({"scores": ["1", 2]}), 1, r"returned '1', not a number \(str\)"),
    ],
)
def test_answers_without_scores_name_the_address_and_what_came(answer: Answer, tries: int, words: str) -> None:
    with serving(answer) as (url, seen), pytest.raises(RewardError, match=words) as raised:
        ask(url, retries=1, timeout_s=0.5 if answer in (hangs, drips) else 5.0)
    assert str(raised.value).startswith(f"the reward server far ({url}) ")
    assert len(seen.bodies) == tries
    assert ("--resume" in str(raised.value)) == (tries > 1), "another start helps where another try may"


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_is_down() -> None:
    url = f"http://127.0.0.1:{closed_port()}/score"
    with pytest.raises(RewardError, match=r"cannot be reached: .*refused \(tried 3 times\)") as raised:
        ask(url)
    way = "; start or mend it and go on with --resume (where there is a checkpoint), or raise "
    assert str(raised.value).endswith(f"{way}scoring.rewards.far.retries or scoring.rewards.far.timeout_s")


def test_all_tries_together_have_a_limit() -> None:
    words = r"then scoring\.timeout_s was near\); .*--resume .*, or raise scoring\.timeout_s$"
    with serving(hangs) as (url, seen), pytest.raises(RewardError, match=words):
        ask(url, retries=20, timeout_s=0.2, limit_s=2.0)
    assert 1 < len(seen.bodies) < 15


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_names_its_variable_and_never_the_token(status: int) -> None:
    with serving(says({"detail": f"bad {TOKEN}"}, status)) as (url, seen):
        with pytest.raises(RewardError, match=f"answered {status}: the token in the variable {VARIABLE} ") as known:
            ask(url, token_env=VARIABLE)
        with pytest.raises(RewardError, match=r"it wants a token: .* scoring\.rewards\.far\.token_env"):
            ask(url)
    assert TOKEN not in str(known.value) and len(seen.bodies) == 2


@pytest.mark.parametrize("status", [200, 302, 400, 500])
def test_a_server_that_sends_the_token_back_does_not_get_it_into_a_message(status: int) -> None:
    echo = says(f"you sent {TOKEN}", status, kind=f"text/{TOKEN}", Location=f"http://x/?t={TOKEN}")
    with serving(echo) as (url, _), pytest.raises(RewardError) as raised:
        ask(url, retries=0, token_env=VARIABLE)
    assert TOKEN not in str(raised.value) and "[token]" in str(raised.value)


def test_the_token_does_not_follow_a_redirect() -> None:
    with (
        serving(FINE) as (other, elsewhere),
        serving(says("", 307, Location=other)) as (url, _),
        pytest.raises(RewardError, match="not followed"),
    ):
        ask(url, token_env=VARIABLE)
    assert elsewhere.bodies == []


@pytest.mark.parametrize("size", [1, 8])
def test_a_score_that_is_the_token_is_not_shown(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long one would be cut before it is looked for."""
    token = "".join(chr(ord("a") + i % 26) for i in range(13 * size))
    monkeypatch.setenv(VARIABLE, token)
    for body in ({"scores": [f"Bearer {token}", 1]}, {"scores": f"Bearer {token}"}, {"scores": [{token: token}, 1]}):
        with serving(says(body)) as (url, _), pytest.raises(RewardError, match=r"\[token\]") as raised:
            ask(url, token_env=VARIABLE)
        assert token[:8] not in str(raised.value)


@pytest.mark.parametrize(
    ("value", "words"), [(None, "is not set or empty"), ("", "not set or empty"), (f"{TOKEN}\n", "holds is no token")]
)
def test_a_variable_without_a_token(monkeypatch: pytest.MonkeyPatch, value: str | None, words: str) -> None:
    if value is None:
        monkeypatch.delenv(VARIABLE)
    else:
        monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=rf"scoring\.rewards\.far\.token_env = {VARIABLE}: .*{words}") as raised:
        ask("http://127.0.0.1:1/score", token_env=VARIABLE)
    assert TOKEN not in str(raised.value)


def checks(url: str, **options: Any) -> None:
    preflight(ScoringConfig(rewards={"far": RewardSpec(kind="http", url=url, timeout_s=2.0, **options)}))


@pytest.mark.parametrize("answer", [says({"status": "ok"}), says("no such page", 404), says("", 405)])
def test_a_sign_of_life_is_asked_for_once_before_anything_starts(answer: Answer) -> None:
    with serving(answer) as (url, seen):
        checks(url, token_env=VARIABLE)
    assert seen.paths == ["/health"] and seen.tokens == [f"Bearer {TOKEN}"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says("<html>hello</html>", kind="text/html"), "answered with text/html, not JSON: <html>hello</html>"),
        (says({"detail": "loading"}, 503), "answered 503: loading"),
        (says("", 401), "answered 401: it wants a token"),
        (hangs, "did not answer within 2 s"),
    ],
)
def test_a_server_that_is_not_well_is_told_before_anything_starts(answer: Answer, words: str) -> None:
    with serving(answer) as (url, seen), pytest.raises(ResourceError, match=words) as raised:
        checks(url)
    assert str(raised.value).startswith(f"scoring.rewards.far.url: the reward server far ({url}) ")
    assert f"asked was {url.replace('score', 'health')}" in str(raised.value) and len(seen.paths) == 1


def test_a_server_that_is_down_is_told_before_anything_starts() -> None:
    port = closed_port()
    with pytest.raises(ResourceError, match=rf"127\.0\.0\.1:{port}/score\) cannot be reached"):
        checks(f"http://127.0.0.1:{port}/score")
