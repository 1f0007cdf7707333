"""`compare.html`: a comparison of policies as one page that needs nothing else; every text is shown as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_dist.loop.compare_report import (
    PAIR_HEADERS,
    judged_by,
    pair_cells,
    policy_cells,
    policy_headers,
    with_interval,
)
from rlhf_dist.loop.comparing import Example, HeadToHead, Judged, Meeting
from rlhf_dist.telemetry.html_page import page, paragraph, section, shown, soft, table
from rlhf_dist.types import Prompt

PAIRS_SHOWN = 15
"""With examples; of more policies than six the page has the figures of all pairs and examples of the first ones."""
PROMPT_LONGEST = 2000
"""Characters of a prompt that are shown."""
EQUAL_LENGTH = (
    "Ties count half. Intervals are of 95%, over prompts. The rate at equal length is what a logistic regression on "
    "the difference in length, in characters, expects where there is none (as AlpacaEval 2, arXiv:2404.04475, without "
    "its term for difficulty); a dash: length and policy cannot be told apart."
)


def compare_page(found: HeadToHead, prompts: Sequence[Prompt]) -> str:
    """The whole document."""
    by_uid = {prompt.uid: prompt for prompt in prompts}
    parts = [
        section(
            "Policies",
            table(policy_headers(found), [policy_cells(row) for row in found.standings]),
            *(paragraph(f"{row.label}: {row.path}") for row in found.standings if row.path != row.label),
        ),
        section(
            "Head to head",
            table(PAIR_HEADERS, [pair_cells(meeting) for meeting in found.meetings], words=(0, 1)),
            soft(EQUAL_LENGTH),
        ),
        *(examples(meeting, by_uid) for meeting in found.meetings[:PAIRS_SHOWN]),
    ]
    if len(found.meetings) > PAIRS_SHOWN:
        parts.append(soft(f"Examples of the first {PAIRS_SHOWN} pairs; answers.jsonl has all responses."))
    names = [row.label for row in found.standings]
    title = " against ".join(names) if len(names) == 2 else f"{', '.join(names)} head to head"
    return page(title, judged_by(found), parts)


def examples(meeting: Meeting, prompts: Mapping[str, Prompt]) -> str:
    """The largest differences between two policies, to either side."""
    one = meeting.contest
    rate = with_interval(one.win_rate, one.low, one.high)
    return section(
        f"{meeting.first} against {meeting.second}: wins {rate}",
        *_side(f"What {meeting.first} won by most", meeting, meeting.won, prompts),
        *_side(f"What {meeting.second} won by most", meeting, meeting.lost, prompts),
    )


def _side(title: str, meeting: Meeting, rows: Sequence[Example], prompts: Mapping[str, Prompt]) -> list[str]:
    if not rows:
        return [soft(f"{title}: nothing")]
    return [f"<h3>{shown(title)}</h3>", *(_example(meeting, row, prompts[row.uid]) for row in rows)]


def _example(meeting: Meeting, row: Example, prompt: Prompt) -> str:
    first_wins = row.first.score > row.second.score
    asked = "\n".join(f"{turn.role}: {turn.content}" for turn in prompt.messages)
    if len(prompt.messages) == 1:
        asked = prompt.messages[0].content
    sides = [_said(meeting.first, row.first, first_wins), _said(meeting.second, row.second, not first_wins)]
    return f"<div class=card><h4>{shown(asked, PROMPT_LONGEST)}</h4><div class=sides>{''.join(sides)}</div></div>"


def _said(label: str, one: Judged, won: bool) -> str:
    kind = "good" if won else "bad"
    head = f"<b>{shown(label)}</b> <span class={kind}>{one.score:z.3f}</span> <small>{one.length} characters</small>"
    return f"<div class=side>{head}<div class=said>{shown(one.text)}</div></div>"
