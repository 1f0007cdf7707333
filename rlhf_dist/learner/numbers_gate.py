"""A gate before the step of DeepSpeed's optimizers: what they do with a norm that is not finite, on demand.

They leave out a step, and forget its gradients, where they find the norm of these invalid; so a norm is made invalid
where the step is refused. The optimizers are known by the methods that give their norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def ask_before_step(optimizer: Any, zero_stage: int, refused: Callable[[Tensor], bool]) -> None:
    """From now on `refused` decides, given the gradient norm, whether the optimizer of a ZeRO stage above 0 steps.

    Every rank asks, with the same norm; one that is not finite is given as infinite.
    """
    if zero_stage == 3:
        groups = optimizer._get_norm_groups

        def judged_groups() -> list[Tensor]:
            found = groups()
            norm = combined(found)
            return [torch.full_like(norm, -1.0)] if refused(norm) else found

        optimizer._get_norm_groups = judged_groups
    elif hasattr(optimizer, "scaled_global_norm"):
        whole = optimizer.scaled_global_norm

        def judged_norm(norm_type: int = 2) -> Tensor:
            norm = whole(norm_type)
            return torch.full_like(norm, -1.0) if refused(norm) else norm

        optimizer.scaled_global_norm = judged_norm
        # In bfloat16, too, an invalid norm counts then; and the other search for what is not finite is not needed.
        optimizer.check_grad_overflow, optimizer.check_overflow = True, lambda **_: None
    else:  # bfloat16 with ZeRO 1: all gradients are on every rank
        gradients = optimizer.get_grads_for_norm

        def judged_gradients(for_clipping: bool = False) -> Any:
            found = gradients(for_clipping)
            if for_clipping:
                return found
            norm = torch.nn.utils.get_total_norm(found[0])
            return ([torch.full_like(norm, math.nan).view(1)], found[1]) if refused(norm) else found

        optimizer.get_grads_for_norm = judged_gradients


def combined(groups: list[Tensor]) -> Tensor:
    """The norm of all groups; infinite where one is -1, as DeepSpeed says invalid."""
    norms = torch.stack([torch.as_tensor(norm, dtype=torch.float32) for norm in groups])
    invalid = (~norms.isfinite() | (norms < 0)).any()
    return torch.where(invalid, math.inf, torch.linalg.vector_norm(norms))
