"""Rules between the keys of algorithm, critic, reference and the pre-training mix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_dist.config.schema import AlgoConfig, Config, CriticConfig

GROUP_METHODS = ("grpo", "dr_grpo")
"""Their baseline is the group of a prompt's samples."""
CRITIC_METHODS = ("ppo",)
"""Their baseline is a critic."""
CRITIC_KEYS = ("gamma", "lam", "whiten_advantages", "advantage_clip")
"""Of `algo`: without effect for methods that have no critic."""


def algorithm_problems(config: Config) -> Iterator[str]:
    """For `train`: a sentence for each."""
    algo = config.algo
    if algo.name in GROUP_METHODS:
        if algo.group_size == 1:
            yield (
                f"algo.group_size is {algo.group_size} with algo.name {algo.name}; with one sample "
                "the group has no baseline and every advantage is 0: it must be at least 2, 8 is usual"
            )
        yield from _changed("algo", algo, AlgoConfig(), CRITIC_KEYS, f"algo.name {algo.name}, which has no critic")
        critic_keys = ("start", "side_by_side", "warmup_steps", "clip", "coef")
        yield from _changed(
            "critic", config.critic, CriticConfig(), critic_keys, f"algo.name {algo.name}, which has no critic"
        )
    else:
        yield from _critic(config)
    yield from _kl(config)
    if config.loop.max_policy_lag != 0:
        yield (
            f"loop.max_policy_lag is {config.loop.max_policy_lag}; this version generates and learns in turn: "
            "it must be 0"
        )
    updates = config.learner.updates_per_batch * config.learner.epochs
    if algo.kl_stop and updates == 1:
        yield (
            f"algo.kl_stop is {algo.kl_stop} with one optimizer step a batch (learner.epochs 1, "
            "learner.updates_per_batch 1); there is nothing to leave out: raise those, or set it to 0"
        )


def _critic(config: Config) -> Iterator[str]:
    critic = config.critic
    if critic.start == "shared":
        if critic.side_by_side:
            yield "critic.side_by_side is true with critic.start shared; one trunk has one place: set it to false"
        if critic.warmup_steps:
            yield (
                f"critic.warmup_steps is {critic.warmup_steps} with critic.start shared; the policy's trunk cannot be "
                "frozen while its value head learns: set it to 0, or critic.start to policy"
            )
    if not critic.start:
        yield "critic.start is empty; give `policy`, `shared` or a reward model"
    if critic.warmup_steps >= config.loop.steps:
        yield (
            f"critic.warmup_steps is {critic.warmup_steps} of loop.steps {config.loop.steps}; the policy would never "
            "learn: lower it"
        )


def _kl(config: Config) -> Iterator[str]:
    kl, reference = config.algo.kl, config.reference
    rows = config.loop.prompts_per_step * config.algo.group_size
    if kl.controller == "adaptive" and kl.coef == 0:
        yield "algo.kl.coef is 0 with algo.kl.controller adaptive, which multiplies it; start above 0, as 0.05"
    if kl.controller == "adaptive" and 0.2 * rows >= kl.horizon:
        yield (
            f"algo.kl.horizon is {kl.horizon} with {rows} responses a step; one step could take the whole coefficient "
            f"away: give more than {0.2 * rows:g}, 10000 is usual"
        )
    if kl.coef == 0 and not kl.measure:
        for key, value in (
            ("path", reference.path),
            ("update_every", reference.update_every),
            ("replicas", reference.replicas),
        ):
            if value:
                yield (
                    f"reference.{key} is {value} but no reference is run: algo.kl.coef is 0; set that above 0, or "
                    "algo.kl.measure to true"
                )
    if (kl.coef or kl.measure) and (config.rollout.top_p < 1 or config.rollout.top_k):
        yield (
            f"rollout.top_p is {config.rollout.top_p} and rollout.top_k {config.rollout.top_k} with a reference "
            "(algo.kl); the sampler's logprobs are then of a cut distribution and the reference's are not, which would "
            "count as KL: set top_p to 1 and top_k to 0, or algo.kl.coef to 0"
        )
    if reference.ema and not reference.update_every:
        yield f"reference.ema is {reference.ema} and has no effect with reference.update_every 0; set both or none"


def _changed(section: str, found: Any, default: Any, keys: tuple[str, ...], why: str) -> Iterator[str]:
    for key in keys:
        value = getattr(found, key)
        if value != getattr(default, key):
            yield f"{section}.{key} is {str(value).lower()} and has no effect with {why}; take it out, or choose ppo"
