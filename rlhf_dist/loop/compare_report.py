"""A comparison of policies as tables, as JSON, and as one line for each two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rlhf_dist.loop.comparing import HeadToHead, Key, Meeting, Policy, Standing
from rlhf_dist.telemetry.console_tables import printable
from rlhf_dist.types import Prompt

if TYPE_CHECKING:
    from rich.console import RenderableType

NONE = "-"
PAIR_HEADERS = ("policy", "against", "wins", "ties", "losses", "win rate", "at equal length")
POLICY_HEADERS = ("policy", "mean score", "length")
RATED_HEADERS = (*POLICY_HEADERS, "Elo")


def judged_by(found: HeadToHead) -> str:
    """What was asked, in words."""
    each = "a greedy response each" if found.samples == 0 else "a sampled response each"
    each = f"{found.samples} sampled responses each" if found.samples > 1 else each
    margin = f", a difference of at most {found.tie_margin:g} is a tie" if found.tie_margin else ""
    return f"{found.prompts} held-out prompts, {each}; judged by {found.judge}{margin}"


def with_interval(rate: float | None, low: float | None, high: float | None) -> str:
    """`0.87 [0.80, 0.92]`."""
    return NONE if rate is None or low is None or high is None else f"{rate:.2f} [{low:.2f}, {high:.2f}]"


def pair_cells(meeting: Meeting) -> list[str]:
    """Under `PAIR_HEADERS`."""
    one = meeting.contest
    rates = [
        with_interval(one.win_rate, one.low, one.high),
        with_interval(one.length_controlled, one.length_low, one.length_high),
    ]
    return [meeting.first, meeting.second, str(one.wins), str(one.ties), str(one.losses), *rates]


def policy_headers(found: HeadToHead) -> tuple[str, ...]:
    return RATED_HEADERS if any(row.rating for row in found.standings) else POLICY_HEADERS


def policy_cells(row: Standing) -> list[str]:
    """Under `policy_headers`."""
    cells = [row.label, f"{row.score:z.3f}", f"{row.length:.1f}"]
    if row.rating:
        cells.append(f"{row.rating.elo:.0f} [{row.rating.low:.0f}, {row.rating.high:.0f}]")
    return cells


def tables(found: HeadToHead, box: Any) -> Iterator[RenderableType]:
    """For the console."""
    from rich.table import Table
    from rich.text import Text

    pairs = [pair_cells(meeting) for meeting in found.meetings]
    policies = [policy_cells(row) for row in found.standings]
    for title, headers, rows, texts in (
        ("Policies", policy_headers(found), policies, 1),
        ("Head to head (ties count half; 95% intervals over prompts)", PAIR_HEADERS, pairs, 2),
    ):
        table = Table(title=title, title_justify="left", box=box)
        for place, header in enumerate(headers):
            table.add_column(header, justify="left" if place < texts else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        yield table


def as_json(found: HeadToHead, policies: Sequence[Policy], seed: int) -> dict[str, Any]:
    """For `compare.json`: all figures, no texts. Every number is finite."""
    return {
        "command": "compare",
        "prompts": found.prompts,
        "samples": found.samples,
        "judge": found.judge,
        "tie_margin": found.tie_margin,
        "seed": seed,
        "policies": [
            asdict(row) | {"left_out": len(policy.left_out)}
            for row, policy in zip(found.standings, policies, strict=True)
        ],
        "pairs": [
            {"first": meeting.first, "second": meeting.second, **asdict(meeting.contest)} for meeting in found.meetings
        ],
    }


def answer_rows(prompts: Sequence[Prompt], policies: Sequence[Policy]) -> Iterator[dict[str, Any]]:
    """For `answers.jsonl`: a row for each prompt, with all responses and their scores."""
    for prompt in prompts:
        responses = {policy.label: said_to(prompt, policy.responses) for policy in policies}
        turns = [asdict(message) for message in prompt.messages]
        yield {"uid": prompt.uid, "prompt": turns, "answer": prompt.answer, "responses": responses}


def said_to(prompt: Prompt, responses: Mapping[Key, Any]) -> list[dict[str, Any]]:
    """A policy's responses to one prompt, by sample."""
    found = sorted((sample, one) for (uid, sample), one in responses.items() if uid == prompt.uid)
    return [{"sample": sample, **asdict(one)} for sample, one in found]
