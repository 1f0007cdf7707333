"""How far generation may run ahead of learning: seats and window, from the `loop` section. Imports without torch.

With P groups a step, a target lag of S steps and a window of W groups, no group is older than S + ceil((W - 1) / P)
versions when it is trained on (`loop/controller.py` has the proof).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_dist.config.schema import LoopConfig


def window_of(loop: LoopConfig) -> int:
    """W. By itself half of the lag goes to the window: one step's groups for each two versions."""
    return loop.window or 1 + loop.prompts_per_step * (loop.max_policy_lag // 2)


def target_lag(loop: LoopConfig) -> int:
    """S; below 0 where the window alone is more than `max_policy_lag` allows."""
    return loop.max_policy_lag - -(-(window_of(loop) - 1) // loop.prompts_per_step)
