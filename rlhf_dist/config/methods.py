"""The methods that `algo.name` can be: one row each. Imports without torch, so that a config is checked at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from rlhf_dist.config.keys import Problems, told

if TYPE_CHECKING:  # learning.py says of its keys which methods have them
    from rlhf_dist.config.schema import Config

Baseline = Literal["critic", "group", "step", "greedy", "none"]
RatioTo = Literal["proximal", "behaviour"]
"""The learner before the batch's first update, or the policy that sampled."""
NO_RATIO: tuple[RatioTo, ...] = ()

CLIP = ("clip_low", "clip_high")
DUAL_CLIP = (*CLIP, "dual_clip")
RETURNS = ("gamma", "whiten_advantages", "advantage_clip")
GAE = (*RETURNS, "lam")
AGGREGATION = ("aggregation",)
FILTER = ("filter_groups",)
MASK = ("mask_top_p", "mask_every")

MASKED: Problems = {
    "rollout.tensor_parallel is {c.rollout.tensor_parallel} with algo.name {c.algo.name}, whose mask policy is held "
    "whole by each process of an engine: set it to 1, or choose ppo": lambda c: c.rollout.tensor_parallel > 1,
    "learner.sequence_parallel is {c.learner.sequence_parallel} with algo.name {c.algo.name}, whose mask policy reads "
    "whole rows on each rank: set it to 1, or choose ppo": lambda c: c.learner.sequence_parallel > 1,
    "rollout.top_p is {c.rollout.top_p} and rollout.top_k {c.rollout.top_k} with algo.name {c.algo.name}, which has "
    "a mask of its own that the learner knows: set top_p to 1 and top_k to 0, and algo.mask_top_p "
    "instead": lambda c: c.rollout.top_p < 1 or c.rollout.top_k,
}
UNCORRECTED: Problems = {
    "algo.correction.level is off with algo.name {c.algo.name}, which weighs by it; set it to token, as "
    "configs/algo/decoupled_ppo.yaml does, or choose ppo": lambda c: c.algo.correction.level == "off",
}
IS_GRPO: Problems = {
    "algo.name is dapo with clip_low and clip_high {c.algo.clip_low}, no filter_groups and no shaping.overlong_buffer: "
    "that is grpo; include configs/algo/dapo.yaml, or choose grpo": lambda c: (
        c.algo.clip_low == c.algo.clip_high and not (c.algo.filter_groups or c.algo.shaping.overlong_buffer)
    ),
}
WIDE_CLIP: Problems = {
    "algo.clip_low is {c.algo.clip_low} and algo.clip_high {c.algo.clip_high} with algo.name gspo, whose ratio is that "
    "of a whole response by its length and hardly leaves 1: nothing would ever be clipped; 3e-4 and 4e-4 are "
    "usual": lambda c: max(c.algo.clip_low, c.algo.clip_high) > 0.1,
}
ALONE: dict[Baseline, Problems] = {
    "group": {
        "algo.group_size is 1 with algo.name {c.algo.name}; with one sample the group has no baseline and every "
        "advantage is 0: it must be at least 2, 8 is usual": lambda c: c.algo.group_size == 1,
    },
    "step": {
        "loop.prompts_per_step is 1 and algo.group_size 1 with algo.name {c.algo.name}, which compares the responses "
        "of a step; raise one of them": lambda c: c.algo.group_size * c.loop.prompts_per_step == 1,
    },
    "greedy": {
        "algo.shaping.normalize is {c.algo.shaping.normalize} with algo.name {c.algo.name}, which has a baseline of "
        "its own; set it to off or scale": lambda c: c.algo.shaping.normalize in ("running", "batch"),
    },
}
"""What leaves a baseline nothing to compare, or compares twice."""


@dataclass(frozen=True, slots=True)
class Method:
    """All that is to be known of a method, but for its recipe's maths."""

    recipe: str
    """MODULE:FUNCTION; the function makes an `Algorithm` of `AlgoConfig`."""
    baseline: Baseline
    """What a response is compared with. critic: values by token; group: the other samples of its prompt, so that one
    sample a prompt is too few; step: all responses of the step; greedy: a greedy response to the same prompt, sampled
    besides; none: nothing but the whitening of the step."""
    keys: tuple[str, ...]
    """Keys of `algo` that have an effect with it, beside those that all methods have."""
    ratio: tuple[RatioTo, ...] = ("proximal", "behaviour")
    """What `algo.ratio_to` can be. `NO_RATIO`: the loss does not know that the policy has moved, so a batch cannot be
    passed over several times."""
    refuses: Problems = field(default_factory=dict)
    """What else of a config it does not work with."""


METHODS: dict[str, Method] = {
    "ppo": Method("rlhf_dist.algo.recipes:ppo", "critic", (*DUAL_CLIP, *GAE, *AGGREGATION)),
    "decoupled_ppo": Method(
        "rlhf_dist.algo.recipes:decoupled_ppo",
        "critic",
        (*DUAL_CLIP, *GAE, *AGGREGATION),
        ratio=("proximal",),
        refuses=UNCORRECTED,
    ),
    "nlpo": Method("rlhf_dist.algo.recipes:nlpo", "critic", (*DUAL_CLIP, *GAE, *AGGREGATION, *MASK), refuses=MASKED),
    "a2c": Method("rlhf_dist.algo.recipes:a2c", "critic", (*GAE, *AGGREGATION), ratio=NO_RATIO),
    "reinforce": Method("rlhf_dist.algo.recipes:reinforce", "step", AGGREGATION, ratio=NO_RATIO),
    "reinforce_pp": Method("rlhf_dist.algo.recipes:reinforce_pp", "none", (*DUAL_CLIP, *RETURNS, *AGGREGATION)),
    "reinforce_pp_baseline": Method(
        "rlhf_dist.algo.recipes:reinforce_pp_baseline", "group", (*DUAL_CLIP, *AGGREGATION, *FILTER)
    ),
    "remax": Method("rlhf_dist.algo.recipes:remax", "greedy", AGGREGATION, ratio=NO_RATIO),
    "rloo": Method("rlhf_dist.algo.recipes:rloo", "group", (*AGGREGATION, *FILTER), ratio=NO_RATIO),
    "opo": Method("rlhf_dist.algo.recipes:opo", "group", (*AGGREGATION, *FILTER), ratio=NO_RATIO),
    "grpo": Method("rlhf_dist.algo.recipes:grpo", "group", (*DUAL_CLIP, *AGGREGATION, *FILTER)),
    "dr_grpo": Method("rlhf_dist.algo.recipes:dr_grpo", "group", (*DUAL_CLIP, *AGGREGATION, *FILTER)),
    "dapo": Method("rlhf_dist.algo.recipes:dapo", "group", (*DUAL_CLIP, *AGGREGATION, *FILTER), refuses=IS_GRPO),
    "gspo": Method("rlhf_dist.algo.recipes:gspo", "group", (*CLIP, *FILTER), refuses=WIDE_CLIP),
    "cispo": Method("rlhf_dist.algo.recipes:cispo", "group", (*CLIP, *AGGREGATION, *FILTER)),
}
"""`algo.name` -> row."""


def method_problems(config: Config, method: Method) -> Iterator[str]:
    """A sentence for each thing that the method cannot do without."""
    epochs, updates = config.learner.epochs, config.learner.updates_per_batch
    if not method.ratio and epochs * updates > 1:
        yield (
            f"learner.epochs is {epochs} and learner.updates_per_batch {updates} with algo.name {config.algo.name}, "
            "whose loss does not know that the policy has moved: both must be 1, or choose "
            f"{', '.join(name for name, row in METHODS.items() if row.ratio)}"
        )
    yield from told({**ALONE.get(method.baseline, {}), **method.refuses}, config)
