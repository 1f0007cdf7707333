"""The methods that `algo.name` can be: one row each. Imports without torch, so that a config is checked at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Baseline = Literal["critic", "group", "step", "greedy", "none"]

CLIP = ("clip_low", "clip_high")
DUAL_CLIP = (*CLIP, "dual_clip")
RETURNS = ("gamma", "whiten_advantages", "advantage_clip")
GAE = (*RETURNS, "lam")
AGGREGATION = ("aggregation",)
FILTER = ("filter_groups",)
MASK = ("mask_top_p", "mask_every")


@dataclass(frozen=True, slots=True)
class Method:
    """What a config may say of a method, and where its recipe is."""

    recipe: str
    """MODULE:FUNCTION; the function makes an `Algorithm` of `AlgoConfig`."""
    baseline: Baseline
    """What a response is compared with. critic: values by token; group: the other samples of its prompt, so that one
    sample a prompt is too few; step: all responses of the step; greedy: a greedy response to the same prompt, sampled
    besides; none: nothing but the whitening of the step."""
    keys: tuple[str, ...]
    """Keys of `algo` that have an effect with it, beside those that all methods have."""
    ratio: bool = True
    """Whether the loss knows the policy that sampled, so that a batch may be passed over several times."""
    corrected: bool = False
    """Whether `algo.correction` belongs to it and has to be on."""


METHODS: dict[str, Method] = {
    "ppo": Method("rlhf_dist.algo.recipes:ppo", "critic", (*DUAL_CLIP, *GAE, *AGGREGATION)),
    "decoupled_ppo": Method(
        "rlhf_dist.algo.recipes:decoupled_ppo", "critic", (*DUAL_CLIP, *GAE, *AGGREGATION), corrected=True
    ),
    "nlpo": Method("rlhf_dist.algo.recipes:nlpo", "critic", (*DUAL_CLIP, *GAE, *AGGREGATION, *MASK)),
    "a2c": Method("rlhf_dist.algo.recipes:a2c", "critic", (*GAE, *AGGREGATION), ratio=False),
    "reinforce": Method("rlhf_dist.algo.recipes:reinforce", "step", AGGREGATION, ratio=False),
    "reinforce_pp": Method("rlhf_dist.algo.recipes:reinforce_pp", "none", (*DUAL_CLIP, *RETURNS, *AGGREGATION)),
    "reinforce_pp_baseline": Method(
        "rlhf_dist.algo.recipes:reinforce_pp_baseline", "group", (*DUAL_CLIP, *AGGREGATION, *FILTER)
    ),
    "remax": Method("rlhf_dist.algo.recipes:remax", "greedy", AGGREGATION, ratio=False),
    "rloo": Method("rlhf_dist.algo.recipes:rloo", "group", (*AGGREGATION, *FILTER), ratio=False),
    "opo": Method("rlhf_dist.algo.recipes:opo", "group", (*AGGREGATION, *FILTER), ratio=False),
    "grpo": Method("rlhf_dist.algo.recipes:grpo", "group", (*DUAL_CLIP, *AGGREGATION, *FILTER)),
    "dr_grpo": Method("rlhf_dist.algo.recipes:dr_grpo", "group", (*DUAL_CLIP, *AGGREGATION, *FILTER)),
    "dapo": Method("rlhf_dist.algo.recipes:dapo", "group", (*DUAL_CLIP, *AGGREGATION, *FILTER)),
    "gspo": Method("rlhf_dist.algo.recipes:gspo", "group", (*CLIP, *FILTER)),
    "cispo": Method("rlhf_dist.algo.recipes:cispo", "group", (*CLIP, *AGGREGATION, *FILTER)),
}
"""`algo.name` -> row."""

METHOD_KEYS = tuple(sorted({key for method in METHODS.values() for key in method.keys}))
"""Keys of `algo` that some methods have and some have not."""


def methods_with(key: str) -> str:
    """The methods that `key` has an effect with, for a message."""
    return ", ".join(name for name, method in METHODS.items() if key in method.keys)
