"""`rlhf-dist bench label`: how fast the labelling page is with 100,000 items, and whether it loses or doubles anything.

The real server (`rlhf-dist label serve`) on a store of `--items` pairs. First one labeller in a real Chromium: from a
click to the next item on the screen. Then 20 labellers at once, 10 decisions a second in all for `--seconds`. Then the
same again as fast as it goes, until the server is killed with SIGKILL in the middle. After each part the store is
compared with what was acknowledged.
"""

from __future__ import annotations

import argparse
import queue
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from _chromium import Tab, chromium, program
from step import HERE, at_least, machine_facts, save, work_folder

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.errors import RunError
from rlhf_dist.labels.items import Item
from rlhf_dist.labels.store import LabelStore, create
from rlhf_dist.types import Message

TARGET_MS = 100.0
"""From a click to the next item shown."""
RATE = 10.0
"""Decisions a second of all labellers."""
LABELLERS = 20
CLICKS = 60
OVERLAP = 2
KILLED_AFTER = 200
START_LIMIT_S = 120.0
WORDS = ("a", "kind", "fox", "and", "calm", "boat", "saw", "the", "old", "hill", "by", "a", "fair", "warm", "road")


@dataclass
class Seen:
    """What labellers were told."""

    keys: list[str] = field(default_factory=list)
    """Of acknowledged decisions."""
    seconds: list[float] = field(default_factory=list)
    """Of each, from the request to the answer with the next item."""


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where a target is missed. Raises `RlhfError`."""
    args = parse(argv)
    with work_folder() as folder:
        path = folder / "bench.labels"
        fill(path, args.items)
        with serving(path) as (process, address, tokens):
            clicks = in_chromium(address, tokens[0]) if program() else []
            steady = together(address, tokens, args.seconds, RATE)
        after_steady = compare(path, steady)
        with serving(path) as (process, address, tokens):
            killed = together(address, tokens, args.seconds, None, process.kill)
        after_kill = compare(path, killed)
        result = summary(args, clicks, steady, after_steady, killed, after_kill)
    print(table(result))
    save(args.out, result | {"machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench label",
        usage="rlhf-dist bench label [--items N] [--seconds N] [--out FILE]",
        description="The labelling page: milliseconds from a click to the next item; whether votes are lost.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--items", type=at_least(1000), default=100_000, help="items in the store, 1000 or more (100000)"
    )
    parser.add_argument("--seconds", type=at_least(2), default=60, help="of 20 labellers at once, 2 or more (60)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"label-{stamp}.json", help="JSON to write")
    return parser.parse_args(list(argv))


def fill(path: Path, items: int) -> None:
    """A store of pairs of about 100 words each."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=100))

    create(path)
    with closing(LabelStore(path)) as store:
        made = [
            Item(
                "pair", (Message("user", f"question {n}"),), (text(), text()), ("model a", "model b"), None, f"row {n}"
            )
            for n in range(items)
        ]
        store.add(made, OVERLAP)


@contextmanager
def serving(path: Path) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The real server: its process, its address, and the tokens of its labellers. Raises RunError."""
    names = ",".join(f"labeller{n}" for n in range(LABELLERS - 1))
    command = [sys.executable, "-m", "rlhf_dist", "label", "serve", str(path), "--port", "0", "--labellers", names]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=lambda out=process.stdout: [lines.put(line) for line in out], daemon=True).start()
    try:
        found = [lines.get(timeout=START_LIMIT_S) for _ in range(LABELLERS + 1)][1:]
        links = [line.split()[1] for line in found]
        yield process, links[0].partition("/#")[0], [link.partition("#")[2] for link in links]
    except queue.Empty:
        raise RunError(f"the server did not start in {START_LIMIT_S:g} s") from None
    finally:
        process.kill()
        process.wait(START_LIMIT_S)


def in_chromium(address: str, token: str) -> list[float]:
    """Milliseconds from a click to the next item on the screen, again and again, measured in the page itself."""
    with chromium() as tab:
        tab.look(1200, 800)
        tab.go(f"{address}/#{token}")
        tab.wait("document.body?.dataset.shown == '1'")
        return [_click(tab) for _ in range(CLICKS)]


def _click(tab: Tab) -> float:
    tab.wait("document.body.dataset.ready === document.body.dataset.shown")  # until a verdict is taken
    return tab.evaluate(
        """new Promise((done) => {
          const before = document.body.dataset.shown, start = performance.now();
          new MutationObserver((_, watch) => {
            if (document.body.dataset.shown === before) return;
            watch.disconnect();
            done(performance.now() - start);
          }).observe(document.body, { attributes: true });
          document.querySelector('.choice').click();
        })"""
    )


def together(
    address: str, tokens: Sequence[str], seconds: float, rate: float | None, kill: Callable[[], None] | None = None
) -> Seen:
    """All labellers at once, each with a connection of its own; `kill` after some decisions of all."""
    seen, lock = Seen(), threading.Lock()
    end = time.monotonic() + seconds

    def told(key: str, took: float) -> None:
        with lock:
            seen.keys.append(key)
            seen.seconds.append(took)
            if kill is not None and len(seen.keys) == KILLED_AFTER:
                kill()

    with ThreadPoolExecutor(len(tokens)) as pool:
        for work in [pool.submit(label, address, token, end, rate and rate / len(tokens), told) for token in tokens]:
            work.result(seconds + START_LIMIT_S)
    return seen


def label(address: str, token: str, end: float, rate: float | None, told: Callable[[str, float], None]) -> None:
    """One labeller, until the time is over or the server has gone. Raises RunError for an answer that is none."""
    rng = random.Random(token)
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=address, headers=headers, timeout=30, trust_env=False) as client:
        try:
            item = client.post("/api/next").json()["item"]
            due = time.monotonic()
            while item is not None and due < end:
                due += rng.uniform(0.0, 2.0) / rate if rate else 0.0
                time.sleep(max(0.0, due - time.monotonic()))
                start = time.monotonic()
                verdict = rng.choice(["left", "right", "tie"])
                answer = client.post("/api/decide", json={"key": item["key"], "verdict": verdict})
                if answer.status_code != 200:
                    raise RunError(f"a decision was answered {answer.status_code}: {answer.text[:300]}")
                told(item["key"], time.monotonic() - start)
                item = answer.json()["item"]
        except httpx.TransportError:
            return  # killed, as it was meant to be


def compare(path: Path, seen: Seen) -> dict[str, int]:
    """The store against what was acknowledged; all figures but `stored` should be 0."""
    with closing(sqlite3.connect(path)) as db:
        stored = {key for (key,) in db.execute("SELECT key FROM votes")}
        doubled = db.execute(
            "SELECT COUNT(*) FROM (SELECT 1 FROM standing GROUP BY item, labeller HAVING COUNT(*) > 1)"
        ).fetchone()[0]
        inexact = db.execute(
            "SELECT COUNT(*) FROM items WHERE open < 0 OR open != wanted"
            " - (SELECT COUNT(*) FROM standing WHERE item = items.id AND verdict != '\"skip\"')"
            " - (SELECT COUNT(*) FROM leases WHERE item = items.id AND live)"
            " AND id IN (SELECT item FROM leases)"
        ).fetchone()[0]
    lost = len(set(seen.keys) - stored)
    return {
        "stored": len(stored),
        "lost": lost,
        "doubled": doubled + len(seen.keys) - len(set(seen.keys)),
        "leases": inexact,
    }


def summary(
    args: argparse.Namespace,
    clicks: Sequence[float],
    steady: Seen,
    after_steady: Mapping[str, int],
    killed: Seen,
    after_kill: Mapping[str, int],
) -> dict[str, Any]:
    """All figures."""
    trips = [1000 * s for s in steady.seconds]
    exact = not any(found[key] for found in (after_steady, after_kill) for key in ("lost", "doubled", "leases"))
    shown = spread(clicks) if clicks else None
    return {
        "items": args.items,
        "click_ms": shown,
        "round_trip_ms": spread(trips),
        "decisions_per_s": len(trips) / args.seconds,
        "steady": {"acknowledged": len(trips), **after_steady},
        "killed": {
            "acknowledged": len(killed.keys),
            "round_trip_ms": spread([1000 * s for s in killed.seconds]),
            **after_kill,
        },
        "reached": {"click": (shown or spread(trips))["p95"] < TARGET_MS, "exact": exact},
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and the largest."""
    ordered = sorted(values)
    return {
        "p50": ordered[len(ordered) // 2],
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "max": ordered[-1],
    }


def table(result: Mapping[str, Any]) -> str:
    """What the command prints."""

    def line(name: str, values: Mapping[str, float] | None, rest: str = "") -> str:
        numbers = "".join(f"{values[key]:9.1f}" for key in ("p50", "p95", "max")) if values else "  no Chromium here"
        return f"{name:44}{numbers}   {rest}".rstrip()

    head = f"{result['items']:,} items, ms".ljust(44) + "   median      95%  largest"
    lines = [head, line("click to next item on the screen", result["click_ms"], f"(below {TARGET_MS:g} asked)")]
    lines.append(
        line(f"decision, {LABELLERS} labellers", result["round_trip_ms"], f"{result['decisions_per_s']:.1f} a second")
    )
    lines.append(line("the same, as fast as they can", result["killed"]["round_trip_ms"]))
    for name, part in (("steady", result["steady"]), ("killed in the middle", result["killed"])):
        told = ", ".join(f"{part[key]} {what}" for key, what in (("lost", "lost"), ("doubled", "doubled")))
        lines.append(f"{name}: {part['acknowledged']} acknowledged, {told}, {part['leases']} leases wrong")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
