"""What has to hold of what `numbers_ranks.py` found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refused(found: Sequence[dict[str, Any]], shares: int) -> None:
    """Of all ranks of a case. The second of four optimizer steps was refused by all of them, and the two behind it were
    left out; the first was taken. What follows leads to the same weights and moments, bit for bit, as if the three had
    never been planned."""
    for rank, of_rank in enumerate(found):
        spoilt = rank < len(found) // shares
        for kind, what in (("infinite", "advantage"), ("too large", "gradient")):
            if kind not in of_rank:
                continue
            bad, without = of_rank[kind], of_rank["without"]
            assert bad["refused"] and not without["refused"]
            assert bad["metrics"].values()["learner/updates"] == 1 and bad["metrics"].maxima["policy_fault_max"] == 1.0
            assert "policy_fault_max" not in without["metrics"].maxima
            assert equal(bad["weights"], without["weights"]) and equal(bad["optimizer"], without["optimizer"])
            assert bad["metrics"].values()["policy/loss"] == without["metrics"].values()["policy/loss"]
            assert bad["seen"].times.tolist() != [0.0] * len(bad["seen"].times)
            assert bad["seen"].times.tolist() == without["seen"].times.tolist()
            fault = bad["fault"]
            assert (fault.what, fault.update) == (what if spoilt else "gradient", 1)
            if fault.what == "advantage":
                assert (fault.value, fault.origin, fault.token) == (np.inf, bad["row"], 0)
        if "critic" not in of_rank:
            continue
        metrics, fault = of_rank["critic"]["metrics"], of_rank["critic"]["fault"]
        assert metrics.maxima["critic_fault_max"] == 1.0 and metrics.values()["critic/updates"] == 1
        assert (fault.what, fault.update) == ("returns" if spoilt else "gradient", 1)
        assert fault.origin == (of_rank["critic"]["row"] if spoilt else None)
