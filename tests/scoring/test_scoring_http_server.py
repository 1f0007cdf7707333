"""A real reward server on loopback, with the real client and with requests that are wrong."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from judges import judge_spec, make_judge, make_rollout, make_texts, open_judge, setting

from rlhf_dist.config.schema import RewardSpec, ScoringConfig
from rlhf_dist.errors import ResourceError, RewardError
from rlhf_dist.scoring import http_server
from rlhf_dist.scoring.bound_server import BoundServer, bind
from rlhf_dist.scoring.http_client import HttpReward
from rlhf_dist.scoring.http_server import make_app
from rlhf_dist.scoring.reward_model import RewardModel
from rlhf_dist.scoring.scorer import Scorer, preflight

TOKEN = "s3cr3t-t0ken"
RULES = ScoringConfig(
    rewards={
        "right": RewardSpec(kind="exact", weight=2.0),
        "letters": RewardSpec(kind="regex", pattern="[a-z]+", weight=-0.5),
    }
)


@contextmanager
def served(scorer: Scorer, token: str = "") -> Iterator[str]:
    """The server's address, from when it answers until it has stopped."""
    ready: queue.Queue[str] = queue.Queue()
    with closing(scorer), closing(bind("127.0.0.1", 0)) as bound:
        server = BoundServer(make_app(scorer, token), bound, ready.put)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield ready.get(timeout=30)
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def rules() -> Iterator[str]:
    with served(Scorer(RULES)) as address:
        yield address


def post(address: str, content: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    answer = httpx.post(
        f"{address}/score",
        content=body,
        headers={"Content-Type": "application/json", **headers},
        timeout=30,
        trust_env=False,
    )
    return answer.status_code, answer.json()


def client(address: str, **options: Any) -> HttpReward:
    return HttpReward("far", RewardSpec(kind="http", url=f"{address}/score", retries=0, **options), 60.0)


def test_the_client_gets_the_weighted_sum(rules: str) -> None:
    with closing(client(rules)) as reward:
        reward.check()
        assert reward(make_texts(["ab", "x1", "cd"], ["ab", "x1", "zz"])).tolist() == [1.5, 2.0, -0.5]
    assert post(rules, {"prompts": ["p", "p"], "responses": ["ab", "1"], "answers": ["ab", "ab"]}) == (
        200,
        {"scores": [1.5, 0.0], "components": {"right": [1.0, 0.0], "letters": [1.0, 0.0]}},
    )
    assert post(rules, {"prompts": [], "responses": []}) == (200, {"scores": [], "components": {}})


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"hello", 422, "body.0: JSON decode error"),
        ([1], 422, "body: Input should be a valid dictionary"),
        ({"prompts": ["p"]}, 422, "body.responses: Field required"),
        ({"prompts": ["p"], "responses": [3]}, 422, "body.responses.0: Input should be a valid string"),
        (b'{"prompts": ["p"], "responses": [NaN]}', 422, "body.responses.0: Input should be a valid string"),
        ({"prompts": ["p"], "responses": ["r"], "answer": ["a"]}, 422, "body.answer: Extra inputs are not permitted"),
        ({"prompts": ["p"], "responses": ["r", "s"]}, 422, "1 prompts for 2 responses"),
        ({"prompts": ["p"], "responses": ["r"], "answers": ["a", "b"]}, 422, "2 answers for 1 responses"),
        (
            {"prompts": ["p"], "responses": ["r"], "conversations": [[]]},
            422,
            "body.conversations.0: List should have",
        ),
        ({"prompts": ["p"], "responses": ["\ud800"]}, 422, "body.responses.0: Value error, half a surrogate pair"),
        (b'{"prompts": ["\xff"], "responses": ["r"]}', 400, "error parsing the body"),
        ({"prompts": ["p"] * 4097, "responses": ["r"] * 4097}, 422, "body.responses: List should have at most 4096"),
        (
            {"prompts": ["p"], "responses": ["r"]},
            422,
            "the reward right compares with an answer, and response 0 has",
        ),
        (b" " * (16 * 2**20 + 1), 413, "the request has more than 16 MiB"),
    ],
)
def test_wrong_requests_are_told_as_json(rules: str, content: Any, status: int, words: str) -> None:
    got, answer = post(rules, content)
    assert got == status and words in answer["detail"]


def test_a_body_that_does_not_tell_its_length_has_a_limit_too(rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "REQUEST_BYTES", 1000)
    parts = (b" " * 100 for _ in range(20))
    answer = httpx.post(
        f"{rules}/score", content=parts, headers={"Content-Type": "application/json"}, timeout=30, trust_env=False
    )
    assert answer.status_code == 413 and "more than" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json"])
def test_there_are_no_other_pages(rules: str, path: str) -> None:
    answer = httpx.get(rules + path, timeout=30, trust_env=False)
    assert answer.status_code == 404 and answer.json() == {"detail": "Not Found"}


def test_without_the_token_nothing_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REWARD_TOKEN", TOKEN)
    monkeypatch.setenv("TEST_OTHER_TOKEN", TOKEN[:-1])
    texts = make_texts(["ab"], ["ab"])
    with served(Scorer(RULES), TOKEN) as address:
        body = {"prompts": ["p"], "responses": ["ab"], "answers": ["ab"]}
        for headers in ({}, {"Authorization": TOKEN}, {"Authorization": "Bearer"}, {"Authorization": "Bearer é"}):
            assert post(address, body, **encoded(headers))[0] == 401
        assert httpx.get(f"{address}/health", timeout=30, trust_env=False).status_code == 401
        with closing(client(address, token_env="TEST_REWARD_TOKEN")) as reward:
            assert reward(texts).tolist() == [1.5]
        for options in ({}, {"token_env": "TEST_OTHER_TOKEN"}):
            with closing(client(address, **options)) as reward, pytest.raises(RewardError, match="answered 401"):
                reward(texts)


def encoded(headers: Mapping[str, str]) -> Any:
    return {name: value.encode() for name, value in headers.items()}


def test_a_reward_that_fails_is_an_error_with_its_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_failing.py").write_text("def nan(p, r, a):\n    return [float('nan')] * len(r)\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = ScoringConfig(rewards={"mine": RewardSpec(kind="function", function="my_failing:nan")})
    with served(Scorer(config)) as address:
        status, answer = post(address, {"prompts": ["p"], "responses": ["r"]})
        assert status == 500 and "the reward mine (my_failing:nan) returned nan, not finite" in answer["detail"]
        with closing(client(address)) as reward, pytest.raises(RewardError, match="answered 500: the reward mine"):
            reward(make_texts(["r"]))


def test_an_accident_is_told_without_its_details(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(RULES)
    monkeypatch.setattr(scorer, "score_texts", lambda texts: {}["secret"])
    with served(scorer) as address:
        status, answer = post(address, {"prompts": ["p"], "responses": ["r"]})
    assert (status, answer) == (500, {"detail": "the server failed: KeyError"})


def test_a_reward_model_behind_http_scores_as_it_does_here(tiny_model: Path, tmp_path: Path) -> None:
    path = make_judge(tiny_model, tmp_path / "judge")
    config = ScoringConfig(rewards={"judge": judge_spec(path)}, batch_tokens=100)
    with closing(open_judge(path, tiny_model)) as model:
        groups = [make_rollout(tiny_model, [f"{i} hi", "x" * i], [True, False]) for i in range(1, 7)]
        expected = [model.score(group) for group in groups]
    scorer = Scorer(config, lambda name, spec: RewardModel(name, spec, config, setting(None)))
    with served(scorer) as address:
        far = ScoringConfig(rewards={"far": RewardSpec(kind="http", url=f"{address}/score")})
        preflight(far)
        with closing(Scorer(far)) as remote, ThreadPoolExecutor(6) as pool:
            got = list(pool.map(lambda group: remote.score(group).total, groups))
    np.testing.assert_allclose(np.stack(got), np.stack(expected), atol=1e-5)


def test_a_port_in_use_and_a_host_of_others_are_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"127\.0\.0\.1:{port} cannot be listened at: Address already in use"):
            bind("127.0.0.1", port)
    with pytest.raises(ResourceError, match=r"192\.0\.2\.1:0 cannot be listened at"):
        bind("192.0.2.1", 0)
