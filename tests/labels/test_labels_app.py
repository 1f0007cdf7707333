"""What the page may ask the server for, and what the server must never say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from label_stores import SECRET_MODELS, item, made, queue_of

from rlhf_dist.errors import InputError
from rlhf_dist.labels.access import Guests, guests_of, new_guests
from rlhf_dist.labels.app import COMMENT_CHARACTERS, PAGES, REQUEST_BYTES, make_app
from rlhf_dist.labels.decisions import decisions
from rlhf_dist.labels.store import LabelStore

NAMES = ("owner", "ann", "bo", "cy", "di")
TOKENS = {name: f"token-of-{name}-0123456789" for name in NAMES}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LabelStore]:
    items = [*(item(number) for number in range(200)), item(500, gold=0), item(501, "stars", gold=4)]
    with closing(made(tmp_path / "s", items)) as store:
        yield store


@pytest.fixture
def client(store: LabelStore) -> Iterator[TestClient]:
    app = make_app(store, queue_of(store, gold=0.5), Guests(TOKENS))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def ask(client: TestClient, path: str, body: Any = None, name: str = "ann") -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {TOKENS[name]}"} if name else {}
    answer = client.get(path, headers=headers) if body == "GET" else client.post(path, json=body, headers=headers)
    return answer.status_code, answer.json()


def saved(store: LabelStore) -> list[tuple[str, object, str]]:
    with store.reading() as db:
        return [(one.labeller, one.verdict, one.comment) for one in decisions(db)]


@pytest.mark.parametrize("path", ["/api/next", "/api/decide", "/api/undo", "/api/renew"])
@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, "there is no token: open the whole address that `rlhf-dist label serve` printed for you"),
        ({"Authorization": "Bearer token-of-ann-0123456788"}, "this token is not known (any more)"),
        ({"Authorization": b"Bearer \xff\xfe"}, "this token is not known (any more)"),
        ({"Authorization": "Bearer "}, "this token is not known (any more)"),
    ],
)
def test_no_token_and_a_wrong_one(client: TestClient, path: str, header: dict[str, Any], message: str) -> None:
    answer = client.post(path, json={"key": "k", "verdict": "tie"}, headers=header)
    assert answer.status_code == 401 and answer.json()["why"] == "token"
    assert answer.json()["detail"].startswith(message) and "ann" not in answer.text.replace("answer", "")


def test_nothing_that_a_labeller_gets_names_a_model_or_tells_gold_from_the_rest(
    client: TestClient, store: LabelStore
) -> None:
    texts: list[str] = []
    keys: set[tuple[str, ...]] = set()
    status, answer = ask(client, "/api/next")
    for number in range(40):
        texts.append(json.dumps(answer))
        keys.add((*sorted(answer), *sorted(answer["item"]), *sorted(answer["progress"])))
        verdict = 3 if answer["item"]["judge"] == "stars" else ("left", "tie", "skip")[number % 3]
        status, answer = ask(client, "/api/decide", {"key": answer["item"]["key"], "verdict": verdict})
        assert status == 200
    texts.append(json.dumps(ask(client, "/api/undo", {"key": answer["progress"]["last"]})[1]))
    with store.reading() as db:
        assert sum(one.gold is not None for one in decisions(db)) == 2, "gold items were among them"
    assert len(keys) == 1
    for secret in (*SECRET_MODELS, "step-0000", "a.jsonl", "gold"):
        assert not [text for text in texts if secret in text]


def test_the_overview_is_the_owners(client: TestClient) -> None:
    assert ask(client, "/api/overview", "GET")[0] == 403
    assert ask(client, "/api/overview", "GET", "")[0] == 401
    status, facts = ask(client, "/api/overview", "GET", "owner")
    assert status == 200 and facts["items"] == {"pair": 201, "stars": 1}


def test_a_long_comment_is_told_and_nothing_is_lost(client: TestClient, store: LabelStore) -> None:
    key = ask(client, "/api/next")[1]["item"]["key"]
    decision = {"key": key, "verdict": "tie", "comment": "x" * (COMMENT_CHARACTERS + 1)}
    status, answer = ask(client, "/api/decide", decision)
    assert (
        status == 422
        and "the comment has 2,001 characters, at most 2,000 are kept; nothing was saved" in answer["detail"]
    )
    status, answer = ask(client, "/api/decide", {**decision, "comment": "x" * 2**20})
    assert status == 413 and answer["why"] == "large" and "nothing was saved" in answer["detail"]
    parts = (b"x" * 1000 for _ in range(REQUEST_BYTES // 1000 + 5))  # no length is sent with it
    headers = {"Authorization": f"Bearer {TOKENS['ann']}", "Content-Type": "application/json"}
    assert client.post("/api/decide", content=parts, headers=headers).status_code == 413
    assert saved(store) == [] and ask(client, "/api/next")[1]["item"]["key"] == key
    assert ask(client, "/api/decide", {**decision, "comment": "é" * COMMENT_CHARACTERS})[0] == 200
    assert saved(store) == [("ann", "tie", "é" * COMMENT_CHARACTERS)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "up"}, "'up' is no verdict"),
        ({"verdict": 7}, "7 is no verdict"),
        ({"verdict": True}, "verdict"),
        ({"verdict": None}, "verdict"),
        ({"verdict": [0, 1]}, "[0, 1] is no verdict"),
        ({"flags": ["rude"]}, "flags"),
        ({"comment": "\ud800"}, "half a character"),
        ({"more": 1}, "more: Extra inputs"),
        ({"key": "k" * 1000}, "key"),
    ],
)
def test_a_decision_that_is_wrong(client: TestClient, store: LabelStore, change: dict[str, Any], message: str) -> None:
    key = ask(client, "/api/next", name="bo")[1]["item"]["key"]
    body = json.dumps({"key": key, "verdict": "tie"} | change)
    headers = {"Authorization": f"Bearer {TOKENS['bo']}", "Content-Type": "application/json"}
    answer = client.post("/api/decide", content=body, headers=headers)
    assert answer.status_code == 422 and message in answer.json()["detail"]
    assert saved(store) == []


def test_an_item_that_is_gone_and_one_of_another(client: TestClient) -> None:
    key = ask(client, "/api/next")[1]["item"]["key"]
    assert ask(client, "/api/decide", {"key": "gone", "verdict": "tie"})[0] == 410
    status, answer = ask(client, "/api/decide", {"key": key, "verdict": "tie"}, "bo")
    assert (status, answer["why"]) == (403, "other")
    assert ask(client, "/api/undo", {"key": key}, "bo") == (
        409, {"detail": "there is no decision of yours to take back", "why": "nothing"}
    )  # fmt: skip
    assert 0 < ask(client, "/api/renew", {"key": key})[1]["seconds"] <= 60


@pytest.mark.parametrize("path", [*PAGES, "/api/next", "/nothing", "/page/index.html"])
def test_every_answer_forbids_what_the_page_does_not_need(client: TestClient, path: str) -> None:
    for answer in (client.get(path), client.post(path, content=b"x" * 2**20)):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.get(path).status_code == (200 if path in PAGES else 405 if path == "/api/next" else 404)


def test_pages_load_nothing_from_elsewhere_and_make_no_html_of_texts() -> None:
    folder = Path(__file__).parents[2] / "rlhf_dist" / "labels" / "page"
    assert sorted(path.name for path in folder.iterdir()) == sorted(name for name, _ in PAGES.values())
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "http:" not in text and "https:" not in text and "//" not in text.replace("// ", ""), path
        assert (
            "innerHTML" not in text and "insertAdjacent" not in text and " style=" not in text and "onclick" not in text
        )


def test_labellers_at_once_get_each_item_once(client: TestClient, store: LabelStore) -> None:
    def work(name: str) -> int:
        count, item = 0, ask(client, "/api/next", name=name)[1]["item"]
        while item is not None and count < 60:
            verdict = 4 if item["judge"] == "stars" else "left"
            status, answer = ask(client, "/api/decide", {"key": item["key"], "verdict": verdict}, name)
            assert status == 200
            count, item = count + 1, answer["item"]
        return count

    with ThreadPoolExecutor(4) as pool:
        done = sum(pool.map(work, NAMES[1:]))
    with store.reading() as db:
        made = list(decisions(db))
    assert done == len(made) == 200 + 2 * 4
    plain = [one.item for one in made if one.gold is None]
    assert sorted(plain) == list(range(1, 201))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no line with a name and a token"),
        ("ann\n", ":1: has 1 words"),
        ("ann short\n", ":1: a token has 16 to 200 letters"),
        ("ann 0123456789abcdef\nbo 0123456789abcdef\n", ":2: this name or token is there already"),
        ("# comment\n\na/b 0123456789abcdef\n", ":3: 'a/b' is no name"),
    ],
)
def test_files_of_tokens_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(InputError) as caught:
        guests_of(path)
    assert message in str(caught.value) and "0123456789abcdef" not in str(caught.value)
    path.chmod(0o644)
    with pytest.raises(InputError, match="other users can read it; `chmod 600"):
        guests_of(path)


def test_tokens_that_are_made() -> None:
    guests = new_guests(["ann"])
    owner, ann = (link.split("#")[1] for link in guests.links("http://x"))
    assert len(ann) >= 32 and ann != owner
    found = guests.who(ann)
    assert found is not None and (found.name, found.owner) == ("ann", False)
    assert guests.who(ann[:-1]) is None and guests.who("") is None
    for names in (["ann", "ann"], ["owner"], ["a b"]):
        with pytest.raises(InputError, match="--labellers"):
            new_guests(names)
