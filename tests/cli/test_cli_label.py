"""`rlhf-dist label` as a user starts it: the commands of docs/human-feedback.md, wrong ones, and a killed server."""

from __future__ import annotations

import queue
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.config.schema import DataConfig, PreferencesConfig
from rlhf_dist.data.judgements import judgements

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "human-feedback.md").read_text(encoding="utf-8")
LIMIT_S = 120.0
ROWS = "".join(f'{{"prompt": "q{n}", "responses": ["good {n}", "bad {n}"]}}\n' for n in range(120))


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_dist", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Started in the background from a script, the tests themselves may ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@contextmanager
def serving(*words: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str], str]]:
    """The process, name -> token, and the address."""
    process, lines = start("label", "serve", *words, "--port", "0"), queue.Queue[str]()
    assert process.stdout is not None
    threading.Thread(target=lambda out=process.stdout: [lines.put(line) for line in out], daemon=True).start()
    try:
        assert lines.get(timeout=LIMIT_S).startswith("serving ")
        links = [lines.get(timeout=LIMIT_S).split() for _ in range(3)]
        address, _, _ = links[0][1].partition("/#")
        yield process, {name: link.partition("#")[2] for name, link in links}, address.rstrip("/")
    finally:
        process.kill()
        process.wait(LIMIT_S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, made the current one, with the file of the page and a larger one."""
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"^`answers\.jsonl`:\n\n```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "answers.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "many.jsonl").write_text(ROWS, encoding="utf-8")
    return tmp_path


def command(start: str) -> list[str]:
    """The words of the page's command that begins so, without `rlhf-dist`."""
    (line,) = re.findall(rf"^rlhf-dist ({re.escape(start)}.*)$", PAGE, re.MULTILINE)
    return line.split()


def judge(
    address: str, token: str, verdict: object, most: int = 1000, saved: Callable[[], object] = lambda: None
) -> int:
    """Decide until nothing is left; how many decisions were acknowledged, also of a server that goes away."""
    count = 0
    with httpx.Client(
        base_url=address, headers={"Authorization": f"Bearer {token}"}, timeout=60, trust_env=False
    ) as client:
        try:
            item = client.post("/api/next").json()["item"]
            while item is not None and count < most:
                answer = client.post("/api/decide", json={"key": item["key"], "verdict": verdict})
                answer.raise_for_status()
                count, item = count + 1, answer.json()["item"]
                saved()
        except httpx.TransportError:
            pass
    return count


def test_the_commands_of_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("label add my.labels answers.jsonl")) == 0
    assert capsys.readouterr().out == "my.labels: 4 items added, 0 were there already\n"
    with serving(*command("label serve")[2:]) as (process, tokens, address):
        assert list(tokens) == ["owner", "ann", "bo"] and address.startswith("http://127.0.0.1:")
        assert judge(address, tokens["ann"], "tie", 1) + judge(address, tokens["bo"], "left") == 3
        assert main(["label", "serve", "my.labels", "--port", "0"]) == 2
        assert f"is served by another process already (process {process.pid})" in capsys.readouterr().err
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 130
    assert main(command("label export")) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "pairs.jsonl: 2 rows of form pair from 2 decisions"
    assert out[1].startswith("not exported: 1 (a tie, which a row of form pair cannot say; --form battles keeps it")
    assert main(["label", "summary", "my.labels"]) == 0
    assert '"decisions": 3' in capsys.readouterr().out
    words = dict(word.split("=") for word in command("reward configs/local.yaml")[2:])
    config = PreferencesConfig(source="jsonl", path=words["preferences.path"], form="pair", held_out=1)
    assert len(judgements(config, DataConfig(), 0)) == 1


def test_nothing_acknowledged_is_lost_when_the_server_is_killed(folder: Path) -> None:
    assert main(["label", "add", "s", "many.jsonl", "--judge", "pair"]) == 0
    with serving("s", "--labellers", "ann,bo") as (process, tokens, address), ThreadPoolExecutor(3) as pool:
        seen = threading.Semaphore(30)

        def saved() -> None:
            if not seen.acquire(blocking=False):
                process.kill()

        working = [pool.submit(judge, address, token, "tie", saved=saved) for token in tokens.values()]
        acknowledged = sum(future.result(LIMIT_S) for future in working)
        process.wait(LIMIT_S)
    kept = votes(folder / "s")
    assert 30 < acknowledged < 120, "it was killed in the middle"
    assert acknowledged <= kept <= acknowledged + 3, "each labeller has one under way at most"
    with serving("s", "--labellers", "ann,bo") as (_, tokens, address):
        for token in tokens.values():
            judge(address, token, "tie")
    assert votes(folder / "s") == 120


def votes(path: Path) -> int:
    """Standing decisions, of which no two are about one item."""
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA quick_check").fetchone()[0] == "ok"
        count, items = db.execute("SELECT COUNT(*), COUNT(DISTINCT item) FROM standing").fetchone()
    assert count == items
    return count


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "label needs a verb; name one of add, serve, summary, export"),
        (["sevre"], "`sevre` is no verb of label"),
        (["add", "s"], "the following arguments are required: SOURCE, --judge"),
        (["add", "s", "answers.jsonl", "--judge", "pear"], "invalid choice: 'pear'"),
        (["add", "s", "nothing.jsonl", "--judge", "pair"], "nothing.jsonl: no such file"),
        (["add", "s", ".", "--judge", "pair"], ".: has no rollouts/step-*.parquet; name a file, or"),
        (["add", "s", "answers.jsonl", "--judge", "pair", "--form", "pair"], "4 of 4 rows cannot be used"),
        (
            ["add", "s", "answers.jsonl", "--judge", "pair", "--gold"],
            "there is nothing to judge by pair in answers.jsonl",
        ),
        (["add", "s", "answers.jsonl", "--judge", "pair", "--overlap", "0"], "'0' is not a number from 1 to 1000"),
        (
            ["add", "answers.jsonl", "answers.jsonl", "--judge", "pair"],
            "answers.jsonl: is no store of labels, or is damaged",
        ),
        (["add", "no/folder/s", "answers.jsonl", "--judge", "pair"], "no/folder/s: cannot be made"),
        (["serve", "s"], "s: no such store; make one with `rlhf-dist label add STORE SOURCE ...`"),
        (["serve", "."], ".: is a directory"),
        (["serve", "made", "--labellers", "a/b"], "--labellers: 'a/b' is no name"),
        (["serve", "made", "--labellers", "ann", "--tokens", "t"], "give one of the two"),
        (["serve", "made", "--tokens", "t"], "--tokens t: cannot be read"),
        (["serve", "made", "--port", "99999"], "'99999' is not a port"),
        (["serve", "made", "--host", "300.1.1.1"], "cannot be listened at"),
        (["serve", "made", "--lease-s", "0"], "'0' is not a number from 1 to 86400"),
        (["summary", "s"], "s: no such store"),
        (["export", "made", "f"], "the following arguments are required: --form"),
        (["export", "made", "f", "--form", "pair"], "made: has no decision to export as pair"),
        (["export", "made", "answers.jsonl", "--form", "pair"], "answers.jsonl: is there already; give another name"),
    ],
)
def test_wrong_command_lines(
    folder: Path, made_store: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    shutil.copy(made_store, folder / "made")
    assert main(["label", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


@pytest.fixture(scope="module")
def made_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without decisions."""
    path = tmp_path_factory.mktemp("label")
    (path / "many.jsonl").write_text(ROWS, encoding="utf-8")
    assert main(["label", "add", str(path / "s"), str(path / "many.jsonl"), "--judge", "pair"]) == 0
    return path / "s"


def test_what_was_left_out_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "more.jsonl").write_text('{"prompt": "q", "response": "x"}\n{"prompt": "r", "responses": ["x", "y"]}\n')
    assert main(["label", "add", "s", "more.jsonl", "answers.jsonl", "--judge", "pair"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "left out: 1 (the only response to its prompt)",
        "s: 5 items added, 0 were there already",
    ]


def test_tokens_of_a_file_stay_the_same(folder: Path) -> None:
    assert main(["label", "add", "s", "answers.jsonl", "--judge", "pair"]) == 0
    (folder / "tokens").write_text("owner owner-0123456789\nann ann-0123456789abcd\nbo bo-0123456789abcdef\n")
    (folder / "tokens").chmod(0o600)
    with serving("s", "--tokens", "tokens") as (_, tokens, address):
        assert tokens == {"owner": "", "ann": "", "bo": ""}, "a token of a file is never printed"
        assert judge(address, "ann-0123456789abcd", "tie", 1) == 1
