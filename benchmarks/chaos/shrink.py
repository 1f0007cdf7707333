"""From a run that fails to the smallest one found that fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace

from chaos.plan import WRITES, Fault, Plan, Settings

Fails = Callable[[Plan], bool]
"""Whether a plan still fails in the same way."""
SMALLEST = Settings(steps=1, groups=1, prompts=30, room=100)
"""What settings are tried to be set to, one by one."""


class Tries:
    """So many plans may be run."""

    def __init__(self, fails: Fails, most: int) -> None:
        self._fails, self.left = fails, most
        self._known: dict[Plan, bool] = {}

    def fails(self, plan: Plan) -> bool:
        """False once nothing may be run any more."""
        if plan not in self._known:
            if self.left <= 0:
                return False
            self.left -= 1
            self._known[plan] = self._fails(plan)
        return self._known[plan]


def shrink(plan: Plan, fails: Fails, most: int = 300) -> Plan:
    """Fewer faults, then simpler settings, then rounder times, for as long as anything helps.

    `plan` fails; at most so many others are run.
    """
    tries = Tries(fails, most)
    while True:
        before = plan
        plan = replace(plan, faults=fewer(plan.faults, lambda faults, at=plan: tries.fails(replace(at, faults=faults))))
        for step in (shorter, simpler, earlier):
            plan = first_that_fails(plan, step, tries)
        if plan == before:
            return plan


def fewer(faults: tuple[Fault, ...], fails: Callable[[tuple[Fault, ...]], bool]) -> tuple[Fault, ...]:
    """Take out halves, quarters ... and single faults."""
    size = len(faults)
    while size:
        at = 0
        while at < len(faults):
            rest = faults[:at] + faults[at + size :]
            if fails(rest):
                faults = rest
            else:
                at += size
        size //= 2
    return faults


def first_that_fails(plan: Plan, step: Callable[[Plan], Iterator[Plan]], tries: Tries) -> Plan:
    """Go to the first of a plan's neighbours that fails, and on from there."""
    while (found := next((one for one in step(plan) if one != plan and tries.fails(one)), None)) is not None:
        plan = found
    return plan


def shorter(plan: Plan) -> Iterator[Plan]:
    """One life less: what is in it is left out, and what comes after it comes one life earlier."""
    for life in sorted({fault.life for fault in plan.faults} | {fault.life - 1 for fault in plan.faults if fault.life}):
        rest = (fault for fault in plan.faults if fault.life != life)
        yield replace(plan, faults=tuple(replace(one, life=one.life - (one.life > life)) for one in rest))


def simpler(plan: Plan) -> Iterator[Plan]:
    """One setting less, or one smaller."""
    settings = plan.settings
    for name in (field.name for field in fields(Settings)):
        was, smallest = getattr(settings, name), getattr(SMALLEST, name)
        between: Sequence[object] = (smallest,)
        if isinstance(was, int) and not isinstance(was, bool) and was > smallest + 1:
            between = (smallest, was - 1)
        for value in between:
            changed = replace(settings, **{name: value})
            if value != was and possible(changed):
                yield replace(plan, settings=changed)


def possible(settings: Settings) -> bool:
    """Whether a config may say so."""
    widest = 1 + settings.groups * settings.lag
    moves, witness = settings.moves and not settings.reference, settings.witness and settings.critic > 1
    back = settings.on_fault == "roll_back" and not settings.goes_back
    return settings.window <= widest and not (moves or witness or back)


def earlier(plan: Plan) -> Iterator[Plan]:
    """One fault in an earlier life, at a rounder time, or shorter."""
    for index, fault in enumerate(plan.faults):
        whole = fault.kind in WRITES
        changes = [
            *([replace(fault, life=fault.life - 1)] if fault.life else []),
            *([] if whole else [replace(fault, at=0.0), replace(fault, at=float(int(fault.at)))]),
            *([replace(fault, at=1.0)] if whole and fault.at > 1 else []),
            *(
                [replace(fault, seconds=0.0), replace(fault, seconds=float(int(fault.seconds)))]
                if fault.seconds
                else []
            ),
        ]
        for changed in changes:
            if changed != fault:
                yield replace(plan, faults=(*plan.faults[:index], changed, *plan.faults[index + 1 :]))
