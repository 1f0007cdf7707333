"""Windowed FIFO over the groups in training: how many may be issued, which are taken, which are too old. Pure.

**Lag** (windowed FIFO, MiniMax, arXiv:2605.26494, section 6.2.4). Groups are numbered as they are issued. Group q needs
a seat, and a group gives its seat back when it is dropped or when the version that it was trained into is published. So
q is issued at a version of at least ceil((q - d + 1) / P) - (S + 1), where d groups before it were dropped. It is
trained on by step floor((q - d + W - 1) / P) + 1 at the latest, since only the W - 1 groups after the oldest open one
may pass it. The lag, versions from its oldest token to the weights that learn from it, is therefore at most

    S + ceil((W - 1) / P) <= L = loop.max_policy_lag
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice, takewhile

from rlhf_dist.loop.controller_rules import Rules
from rlhf_dist.loop.open_groups import OpenRequest

Groups = Mapping[int, OpenRequest]
"""By number, oldest first."""


def to_issue(rules: Rules, taken: int, in_step: int, open_groups: int) -> int:
    """As many groups as there are seats, and no more than the run needs. `taken`: by steps so far; `in_step`: of those,
    the ones whose version is not published."""
    needed = rules.steps * rules.groups_per_step - taken
    needed += rules.extra_groups if needed else 0
    seats = rules.seats - in_step - (rules.extra_groups if in_step else 0)
    return min(seats, needed) - open_groups


def to_take(rules: Rules, groups: Groups, issued: int) -> list[OpenRequest]:
    """Those of a step, oldest first; fewer than it has where it cannot be taken yet. `issued`: groups so far."""
    waiting = next((number for number, one in groups.items() if one.experience is None), issued)
    reach = waiting + rules.window
    within = takewhile(lambda one: one.number < reach or rules.extra_groups, groups.values())
    return list(islice((one for one in within if one.experience is not None), rules.groups_per_step))


def too_old(rules: Rules, groups: Groups, version: int) -> list[OpenRequest]:
    """Groups that are ready, and were sampled too many versions ago to be trained on; none where the rules take all."""
    if not rules.drop_stale:
        return []
    done = [(one, one.experience.head) for one in groups.values() if one.experience is not None]
    return [one for one, head in done if rules.age_of(head, version) > rules.max_lag]
