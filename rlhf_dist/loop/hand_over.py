"""Which requests are to go on with another rollout worker than the one that samples them. Pure.

A worker that has missed a push goes on with what it has, under weights that are older with each step, and may be given
up with all of it. One that is the last to have work holds the learner up while others have none. Both are asked to hand
over: what was sampled stays, with its versions, and another worker samples the rest. Only where groups may have tokens
of several versions, that is with a policy lag.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rlhf_dist.loop.controller_rules import Rules
from rlhf_dist.loop.events import Command, Forget, HandOver, Recall, Tell
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.open_groups import OpenRequest
from rlhf_dist.types import Partial


def hand_overs(rules: Rules, open_requests: Iterable[OpenRequest], members: Members) -> list[Command]:
    """Whom to ask for what; these requests are marked. An evaluation stays where it is: it is of one version."""
    if rules.max_lag == 0:
        return []
    serving, under_way = set(members.serving), dict[str, list[OpenRequest]]()
    for one in open_requests:
        if one.worker and one.head is None and not one.evaluates:
            under_way.setdefault(one.worker, []).append(one)
    found = {worker: had for worker, had in under_way.items() if worker not in serving}
    if not serving:
        found = {}  # Nobody could go on.
    elif not found and members.idle and not any(one.leaves for had in under_way.values() for one in had):
        found = younger_half(under_way)
    commands: list[Command] = []
    for worker, had in found.items():
        leaving = [one for one in had if not one.leaves]
        for one in leaving:
            one.leaves = True
        # Each is put before all that waits as it comes: the oldest last.
        keys = [one.request.key for one in sorted(leaving, key=group_number, reverse=True)]
        commands += [HandOver(worker, tuple(keys))] if keys else []
    return commands


def go_on(one: OpenRequest, event: Partial) -> list[Command]:
    """Make it the next part of the same attempt, from what its worker has left; no worker has it now."""
    where = f"goes on with another worker than {one.worker}" if one.worker else "goes on from its last copy"
    forget: list[Command] = [Forget((event.key,))] if one.copied else []
    one.request = replace(one.request, part=one.request.part + 1, begun=event.body)
    one.worker, one.leaves, one.copied, one.orphaned = "", False, False, False
    text = f"{event.key} {where}, {int(event.lengths.sum())} tokens so far"
    return [*forget, Tell("handed_over", text, one.request.uid)]


def recall(gone: Iterable[OpenRequest], members: Members, now: float) -> list[Command]:
    """Those of a lost worker are to go on from their copies, which the collator has; no worker has them now."""
    commands: list[Command] = []
    for one in gone:
        one.worker, one.leaves, one.copied = "", False, False
        members.server("collator", one.request.key, now)
        commands.append(Recall(one.request.key))
    return commands


def younger_half(under_way: dict[str, list[OpenRequest]]) -> dict[str, list[OpenRequest]]:
    """Of the worker that has most groups under way, those issued last, each with its baseline; of one group nothing."""
    numbers = {worker: sorted({group_number(one) for one in had}) for worker, had in under_way.items()}
    worker = max(numbers, key=lambda name: len(numbers[name]), default="")
    leaving = numbers.get(worker, [])
    leaving = leaving[(len(leaving) + 1) // 2 :]
    return {worker: [one for one in under_way[worker] if group_number(one) in leaving]} if leaving else {}


def group_number(one: OpenRequest) -> int:
    """Of a greedy baseline: the number of the group that is compared with it."""
    return one.partner.number if one.number < 0 and one.partner is not None else one.number
