"""The page in a real browser: by keys, by mouse, with hostile texts, and when the server is away."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from label_stores import SECRET_MODELS, Clock, item, made, queue_of

from rlhf_dist.labels.access import Guests
from rlhf_dist.labels.app import make_app
from rlhf_dist.labels.decisions import Decision, decisions
from rlhf_dist.labels.items import Item
from rlhf_dist.labels.store import LabelStore
from rlhf_dist.scoring.bound_server import BoundServer, bind
from rlhf_dist.types import Message

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _chromium import SHIFT, Tab, chromium, program

pytestmark = pytest.mark.skipif(not program(), reason="there is no Chromium (apt-get install chromium)")
TOKENS = {"owner": "owner-0123456789abcdef", "ann": "ann-0123456789abcdef"}
HOSTILE = (
    "<script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">\x00\u202eabc\u202c\ttab"
)
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with chromium() as tab:
        yield tab


@contextmanager
def serving(store: LabelStore, port: int = 0) -> Iterator[str]:
    """The server's address, while it answers."""
    app = make_app(store, queue_of(store), Guests(TOKENS))
    ready: queue.Queue[str] = queue.Queue()
    with closing(bind("127.0.0.1", port)) as bound:
        server = BoundServer(app, bound, ready.put)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield ready.get(timeout=LIMIT_S)
        finally:
            server.should_exit = True
            thread.join(LIMIT_S)


@contextmanager
def judging(tab: Tab, path: Path, items: list[Item], clock: Clock | None = None) -> Iterator[LabelStore]:
    """A store that is served, and the page of Ann at its first item."""
    with closing(made(path, items, clock=clock)) as store, serving(store) as address:
        tab.complaints.clear()
        tab.look(1200, 800)
        tab.go(f"{address}/#{TOKENS['ann']}")
        shown(tab, 1)
        yield store
        tab.call("Page.navigate", url="about:blank")  # closes its connection, for which the server would wait


def shown(tab: Tab, number: int) -> None:
    """Wait until so many items have been on the page, the last one for long enough to be judged."""
    tab.wait(f"document.body?.dataset.ready == '{number}'")


def saved(store: LabelStore) -> list[Decision]:
    with store.reading() as db:
        return list(decisions(db))


def test_pairs_by_keys_with_hostile_texts_comment_flags_and_undo(tab: Tab, tmp_path: Path) -> None:
    hostile = Item("pair", (Message("user", HOSTILE),), (HOSTILE, "plain"), SECRET_MODELS[:2], None, "a.jsonl:1")
    with judging(tab, tmp_path / "s", [hostile, item(2), item(3)]) as store:
        assert "#" not in tab.evaluate("location.href") and tab.evaluate("document.title") == "Judge responses"
        text = tab.text()
        assert text.count("<script>document.title = 'broken'</script><img src=x onerror=") == 2
        assert text.count("U+0000U+202EabcU+202C\ttab") == 2 and "0 of 3, 0 by you" in text
        assert tab.evaluate("document.querySelectorAll('main script, main img').length") == 0
        plain_is_left = tab.evaluate("document.querySelector('.response .text').textContent") == "plain"
        for key in "mc":
            tab.press(key)
        for key in "no 1":  # in the comment, keys are text
            tab.press(key)
        tab.press("Escape")
        tab.press("ArrowLeft")
        shown(tab, 2)
        tab.press("4")
        shown(tab, 3)
        assert "2 of 3, 2 by you" in tab.text()
        first, second = saved(store)
        assert (first.verdict, first.comment, first.flags) == (int(plain_is_left), "no 1", ("spam",))
        assert second.verdict == "both_bad" and second.seconds >= 0
        tab.press("u")
        shown(tab, 4)
        assert tab.evaluate("document.querySelector('.choice.before').textContent").startswith("Both bad")
        tab.press("s")
        shown(tab, 5)
        assert [one.verdict for one in saved(store)] == [int(plain_is_left), "skip"]
        page = tab.evaluate("document.documentElement.outerHTML")
        assert not [model for model in SECRET_MODELS if model in page]
        assert tab.complaints == []


def test_a_ranking_by_digits_by_arrows_and_by_dragging(tab: Tab, tmp_path: Path) -> None:
    with judging(tab, tmp_path / "s", [item(number, "ranking") for number in (1, 2, 3)]) as store:
        texts = "[...document.querySelectorAll('.ranking .text')].map((text) => text.textContent)"
        before = tab.evaluate(texts)
        tab.press("Enter")  # nothing has been put in order yet
        assert tab.evaluate("document.querySelector('.choice').disabled") and not saved(store)
        assert "Put the responses in order first" in tab.text()
        tab.press("3")
        assert tab.evaluate("document.querySelector('.choice').disabled"), "two are not in order yet"
        tab.press("1")
        wanted = [before[2], before[0], before[1]]
        assert tab.evaluate(texts) == wanted
        tab.press("Enter")
        shown(tab, 2)
        assert [saved(store)[0].responses[i] for i in saved(store)[0].verdict] == wanted  # pyright: ignore
        before = tab.evaluate(texts)
        tab.drag("li:first-child .handle", "li:last-child .handle")
        assert tab.evaluate(texts) == [*before[1:], before[0]]
        tab.evaluate("document.querySelector('.ranking li').focus()")
        tab.press("ArrowDown", SHIFT)
        wanted = [before[2], before[1], before[0]]
        assert tab.evaluate(texts) == wanted
        tab.evaluate("document.querySelector('.choice').click()")
        shown(tab, 3)
        assert [saved(store)[1].responses[i] for i in saved(store)[1].verdict] == wanted  # pyright: ignore
        tab.press("z", 2)  # Ctrl
        shown(tab, 4)
        assert tab.evaluate(texts) == wanted and not tab.evaluate("document.querySelector('.choice').disabled")


def test_stars_thumbs_and_an_empty_queue(tab: Tab, tmp_path: Path) -> None:
    with judging(tab, tmp_path / "s", [item(1, "stars"), item(2, "thumbs"), item(3, "stars")]) as store:
        tab.press("4")
        shown(tab, 2)
        tab.press("-")
        shown(tab, 3)
        tab.press("0")
        shown(tab, 4)
        assert [one.verdict for one in saved(store)] == [4, False, 0]
        assert "Nothing waits for you" in tab.text() and "Undo" in tab.text() and "Spam" not in tab.text()
        tab.press("?")
        assert tab.evaluate("document.getElementById('help').open") and "take the last decision back" in tab.text()
        tab.evaluate("document.getElementById('close').click()")
        tab.press("u")
        shown(tab, 5)
        assert len(saved(store)) == 2


def test_a_double_click_and_two_quick_keys_judge_one_item(tab: Tab, tmp_path: Path) -> None:
    with judging(tab, tmp_path / "s", [item(number) for number in range(4)]) as store:
        button = "document.querySelector('.choice')"
        tab.evaluate(f"{button}.click()")
        shown(tab, 2)
        tab.evaluate(f"{button}.dispatchEvent(new MouseEvent('click', {{detail: 2}}))")
        assert len(saved(store)) == 1
        # Each time that an item appears, a key follows at once, in the same turn of the page.
        tab.evaluate(
            "new MutationObserver(() => document.dispatchEvent(new KeyboardEvent('keydown', {key: 't'})))"
            ".observe(document.getElementById('counts'), {childList: true})"
        )
        tab.press("t")
        shown(tab, 3)
        assert len(saved(store)) == 2


def test_a_server_that_is_away_loses_nothing(tab: Tab, tmp_path: Path) -> None:
    with closing(made(tmp_path / "s", [item(1), item(2)])) as store:
        with ExitStack() as first:
            address = first.enter_context(serving(store))
            tab.go(f"{address}/#{TOKENS['ann']}")
            shown(tab, 1)
        tab.press("t")
        tab.wait("document.getElementById('notice')?.hidden === false")
        assert "The server does not answer. Nothing is lost" in tab.text() and saved(store) == []
        with serving(store, int(address.rsplit(":", 1)[1])):
            tab.press("Enter")
            shown(tab, 2)
            assert [one.verdict for one in saved(store)] == ["tie"]
            tab.call("Page.navigate", url="about:blank")


def test_a_lease_that_ran_out_a_long_comment_and_a_wrong_token(tab: Tab, tmp_path: Path) -> None:
    clock = Clock()
    with judging(tab, tmp_path / "s", [item(1), item(2)], clock) as store:
        tab.evaluate("document.getElementById('comment').value = 'x'.repeat(2001)")
        tab.press("t")
        assert "The comment has 2001 characters" in tab.text() and saved(store) == []
        tab.press("Escape")
        tab.evaluate("document.getElementById('comment').value = ''")
        clock.now += 100
        other = queue_of(store)
        taken = other.ask("bo")
        assert taken is not None
        tab.press("t")
        shown(tab, 2)
        tab.wait("document.getElementById('notice')?.hidden === false")
        assert "your decision is kept, but does not count" in tab.text() and "question 2" in tab.text()
        tab.go(tab.evaluate("location.origin") + "/#wrong")
        tab.wait("document.getElementById('notice')?.hidden === false")
        assert "this token is not known (any more)" in tab.text() and "question" not in tab.text()


def test_dark_and_light_and_a_phone(tab: Tab, tmp_path: Path) -> None:
    with judging(tab, tmp_path / "s", [item(1)]):
        ground = "getComputedStyle(document.body).backgroundColor"
        light = tab.evaluate(ground)
        tab.look(390, 844, dark=True, phone=True)
        dark = tab.evaluate(ground)
        assert (light, dark) == ("rgb(245, 245, 242)", "rgb(22, 24, 28)")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        boxes = json.loads(
            tab.evaluate(
                "JSON.stringify([...document.querySelectorAll('.response')].map((r) => r.getBoundingClientRect()))"
            )
        )
        assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["bottom"] < boxes[1]["y"], "one above the other"
        smallest = tab.evaluate("Math.min(...[...document.querySelectorAll('.choice')].map((b) => b.offsetHeight))")
        assert smallest >= 40, "large enough for a thumb"
        tab.press("d")
        assert tab.evaluate(ground) == light, "what the reader chose counts"
        tab.press("d")
        tab.press("d")


def test_the_overview_is_shown_to_the_owner(tab: Tab, tmp_path: Path) -> None:
    with judging(tab, tmp_path / "s", [item(1), item(2)]) as store:
        tab.press("c")
        for key in "<b>":
            tab.press(key)
        tab.press("Escape")
        tab.press("1")
        shown(tab, 2)
        address = tab.evaluate("location.origin")
        assert tab.evaluate("document.getElementById('overview-link').hidden")
        tab.go(f"{address}/overview")
        tab.wait("document.getElementById('notice')?.hidden === false")
        assert "for the owner's token only" in tab.text() and SECRET_MODELS[0] not in tab.text()
        tab.go(f"{address}/overview#{TOKENS['owner']}")
        tab.wait("document.querySelectorAll('#facts section').length == 6")
        text = tab.text()
        assert all(model in text for model in SECRET_MODELS[:2]) and "item 1\t<b>" in text
        assert len(saved(store)) == 1
