"""Why a group is dropped: fixed words, used in the ledger and as names of counters."""

from __future__ import annotations

from collections import Counter

from rlhf_dist.errors import DataError, RewardError

NON_FINITE = "non_finite"
"""All its responses are left out for their rewards, or the greedy one that they are compared with."""
NO_SIGNAL = "no_signal"
"""A group whose samples all scored the same."""
GREEDY_LOST = "greedy_lost"
"""A group whose greedy response did not come."""
STALE = "stale"
"""A group that a fault delayed beyond the lag."""
SLOWEST = "slowest"
"""A group that others of an over-sampled step overtook."""
WORKER_LOST = "worker_lost"
"""An attempt whose rollout worker is gone; the next attempt takes its place."""
STEP_SKIPPED = "step_skipped"
"""A group that no optimizer step was taken with, since the training step was skipped for its numbers."""
KL_STOP = "kl_stop"
"""A group that no optimizer step was taken with, since an earlier one of the training step passed `algo.kl_stop`."""
ROLLED_BACK = "rolled_back"
"""A group of a training step whose numbers went wrong, and from before which the run has begun again."""
END_OF_RUN = "end_of_run"
"""A group that was under way when the last step was done."""
UNTOLD = (NON_FINITE, NO_SIGNAL, STALE, SLOWEST, END_OF_RUN)
"""Reasons that are counted, without a line for each group in the event log."""


def refuse_whole_epoch(dropped: Counter[str], prompts: int, reason: str, detail: str) -> None:
    """Raise where as many groups as an epoch has prompts could not be used, and none could.

    DataError, or RewardError where the last was dropped for its rewards (`reason`, `detail`). Groups that could have
    been used, but for the others of their step, do not count.
    """
    unusable = dropped.total() - sum(dropped[usable] for usable in (NO_SIGNAL, STALE, SLOWEST, END_OF_RUN))
    if unusable and unusable >= prompts:
        reasons = ", ".join(f"{count} {each}" for each, count in dropped.items())
        failure = RewardError if reason == NON_FINITE else DataError
        raise failure(f"a whole epoch of prompts was dropped ({reasons}; the last: {detail})")
