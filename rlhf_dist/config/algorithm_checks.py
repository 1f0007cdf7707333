"""Rules between the keys of algorithm, critic, reference and the pre-training mix."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields
from typing import get_args

from rlhf_dist.config.methods import METHOD_KEYS, METHODS, Baseline, Method, methods_with
from rlhf_dist.config.schema import AlgoConfig, Config, CorrectionConfig, CriticConfig, KLConfig, ShapingConfig

CRITIC_SECTION = ("start", "side_by_side", "warmup_steps", "clip", "coef")
"""`critic.optimizer` is left out: a config of several stages has it for the one that needs it."""


def algorithm_problems(config: Config) -> Iterator[str]:
    """For `train`: a sentence for each; none where `name_problems` has one."""
    algo = config.algo
    method = METHODS.get(algo.name)
    if method is None:
        return
    wrong = list(_row(algo.name, method))
    yield from wrong
    if wrong:
        return
    yield from _method(config, method)
    if method.baseline == "critic":
        yield from _critic(config)
    yield from _kl(config)
    if config.loop.max_policy_lag != 0:
        yield (
            f"loop.max_policy_lag is {config.loop.max_policy_lag}; this version generates and learns in turn: "
            "it must be 0"
        )
    if algo.shaping.overlong_penalty != ShapingConfig().overlong_penalty and not algo.shaping.overlong_buffer:
        yield (
            f"algo.shaping.overlong_penalty is {algo.shaping.overlong_penalty} and has no effect with "
            "algo.shaping.overlong_buffer 0; set both or none"
        )
    longest = config.rollout.max_response_tokens
    if algo.shaping.overlong_buffer > longest:
        yield (
            f"algo.shaping.overlong_buffer is {algo.shaping.overlong_buffer} and rollout.max_response_tokens "
            f"{longest}; the penalty would begin before the first token: it must be at most that"
        )
    updates = config.learner.updates_per_batch * config.learner.epochs
    if algo.kl_stop and updates == 1:
        yield (
            f"algo.kl_stop is {algo.kl_stop} with one optimizer step a batch (learner.epochs 1, "
            "learner.updates_per_batch 1); there is nothing to leave out: raise those, or set it to 0"
        )


def name_problems(config: Config) -> Iterator[str]:
    """For every command: `algo.name` is a row of `METHODS`."""
    name = config.algo.name
    if name not in METHODS:
        plain = name.lower().replace("++", "_pp").replace("-", "_").replace(".", "_").replace(" ", "_")
        close = [plain] if plain in METHODS else difflib.get_close_matches(plain, METHODS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        yield f"algo.name is {name}; it must be one of {', '.join(METHODS)}{hint}"


def _row(name: str, method: Method) -> Iterator[str]:
    """What is wrong with a row of `METHODS`: somebody added it."""
    row = f"the row of {name} in rlhf_dist/config/methods.py"
    module, colon, function = method.recipe.partition(":")
    if not (module and colon and function):
        yield f"{row}: recipe is {method.recipe!r}; it must be MODULE:FUNCTION"
    if method.baseline not in get_args(Baseline):
        yield f"{row}: baseline is {method.baseline!r}; it must be one of {', '.join(get_args(Baseline))}"
    known = {key.name for key in fields(AlgoConfig)}
    if not isinstance(method.keys, tuple) or not known.issuperset(method.keys):
        yield f"{row}: keys is {method.keys!r}; it must be a tuple of keys of `algo`"


def _method(config: Config, method: Method) -> Iterator[str]:
    """Keys that the method has not, and what it cannot do without."""
    algo, learner = config.algo, config.learner
    if method.baseline == "group" and algo.group_size == 1:
        yield (
            f"algo.group_size is {algo.group_size} with algo.name {algo.name}; with one sample "
            "the group has no baseline and every advantage is 0: it must be at least 2, 8 is usual"
        )
    for key in METHOD_KEYS:
        if key not in method.keys and getattr(algo, key) != getattr(AlgoConfig(), key):
            yield (
                f"algo.{key} is {str(getattr(algo, key)).lower()} and has no effect with algo.name {algo.name}; "
                f"take it out, or choose {methods_with(key)}"
            )
    if method.baseline != "critic":
        for key in CRITIC_SECTION:
            value = getattr(config.critic, key)
            if value != getattr(CriticConfig(), key):
                yield (
                    f"critic.{key} is {str(value).lower()} and has no effect with algo.name {algo.name}, which has no "
                    f"critic; take it out, or choose {methods_with('lam')}"
                )
    if not method.ratio and learner.epochs * learner.updates_per_batch > 1:
        yield (
            f"learner.epochs is {learner.epochs} and learner.updates_per_batch {learner.updates_per_batch} with "
            f"algo.name {algo.name}, whose loss does not know that the policy has moved: both must be 1, or choose "
            f"{methods_with('clip_low')}"
        )
    if "mask_top_p" in method.keys:
        yield from _mask(config)
    yield from _baseline(config, method)
    yield from _correction(algo, method)


def _baseline(config: Config, method: Method) -> Iterator[str]:
    """What a method is compared with, and what would spoil the comparison."""
    algo = config.algo
    if (
        algo.name == "dapo"
        and algo.clip_low == algo.clip_high
        and not (algo.filter_groups or algo.shaping.overlong_buffer)
    ):
        yield (
            f"algo.name is dapo with clip_low and clip_high {algo.clip_low}, no filter_groups and no "
            "shaping.overlong_buffer: that is grpo; include configs/algo/dapo.yaml, or choose grpo"
        )
    if algo.name == "gspo" and max(algo.clip_low, algo.clip_high) > 0.1:
        yield (
            f"algo.clip_low is {algo.clip_low} and algo.clip_high {algo.clip_high} with algo.name gspo, whose ratio is "
            "that of a whole response by its length and hardly leaves 1: nothing would ever be clipped; 3e-4 and 4e-4 "
            "are usual"
        )
    if method.baseline == "greedy":
        for key in ("length_normalize", "overlong_buffer", "repetition_penalty", "missing_end_penalty"):
            if getattr(algo.shaping, key):
                yield (
                    f"algo.shaping.{key} is {str(getattr(algo.shaping, key)).lower()} with algo.name {algo.name}, "
                    "whose greedy responses are not shaped: the two would not compare; take it out"
                )
        if algo.shaping.normalize in ("running", "batch"):
            yield (
                f"algo.shaping.normalize is {algo.shaping.normalize} with algo.name {algo.name}, which has a baseline "
                "of its own; set it to off or scale"
            )
    if method.baseline == "step" and algo.group_size * config.loop.prompts_per_step == 1:
        yield (
            f"loop.prompts_per_step is 1 and algo.group_size 1 with algo.name {algo.name}, which compares the "
            "responses of a step; raise one of them"
        )
    if algo.filter_groups and algo.filter_rounds == 1:
        yield "algo.filter_rounds is 1 with algo.filter_groups true; nothing could be made up for: give 2 or more"
    if algo.filter_rounds != AlgoConfig().filter_rounds and not algo.filter_groups:
        yield (
            f"algo.filter_rounds is {algo.filter_rounds} and has no effect with algo.filter_groups false; set that to "
            "true, or take it out"
        )


def _mask(config: Config) -> Iterator[str]:
    """What a mask in the sampler does not go with."""
    rollout = config.rollout
    if rollout.tensor_parallel > 1:
        yield (
            f"rollout.tensor_parallel is {rollout.tensor_parallel} with algo.name {config.algo.name}, whose mask "
            "policy is held whole by each process of an engine: set it to 1, or choose ppo"
        )
    if rollout.top_p < 1 or rollout.top_k:
        yield (
            f"rollout.top_p is {rollout.top_p} and rollout.top_k {rollout.top_k} with algo.name {config.algo.name}, "
            "which has a mask of its own that the learner knows: set top_p to 1 and top_k to 0, and algo.mask_top_p "
            "instead"
        )


def _correction(algo: AlgoConfig, method: Method) -> Iterator[str]:
    correction = algo.correction
    if correction.level == "off":
        if method.corrected:
            yield (
                f"algo.correction.level is off with algo.name {algo.name}, which weighs by it; set it to token, as "
                "configs/algo/decoupled_ppo.yaml does, or choose ppo"
            )
        for key in ("mode", "low", "high"):
            value = getattr(correction, key)
            if value != getattr(CorrectionConfig(), key):
                yield (
                    f"algo.correction.{key} is {value} and has no effect with algo.correction.level off; set that to "
                    "token, sequence or geometric, or take it out"
                )
    elif correction.low == correction.high == 1:
        yield (
            "algo.correction.low and algo.correction.high are both 1; every ratio but that one would be "
            f"{'left out' if correction.mode == 'mask' else 'cut to it'}: set low below 1 or high above; 0 and 2 are "
            "usual"
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
    elif critic.coef != CriticConfig().coef:
        yield (
            f"critic.coef is {critic.coef} and has no effect with critic.start {critic.start}, whose loss stands "
            "alone; take it out, or set critic.start to shared"
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
    if kl.place == "loss" and kl.coef == 0:
        yield (
            "algo.kl.place is loss and has no effect with algo.kl.coef 0; set that above 0, as 0.001, or take it out"
        )
    if kl.place == "loss" and kl.estimator == "k1":
        yield (
            "algo.kl.estimator is k1 with algo.kl.place loss, where its gradient is 0 on average: only noise; choose "
            "k2, k3 or k3+, or set algo.kl.place to reward"
        )
    if kl.place == "reward" and kl.estimator != KLConfig().estimator:
        yield (
            f"algo.kl.estimator is {kl.estimator} and has no effect with algo.kl.place reward, which is always by k1; "
            "set algo.kl.place to loss, or take it out"
        )
    if kl.controller == "fixed":
        for key in ("target", "horizon"):
            if getattr(kl, key) != getattr(KLConfig(), key):
                yield (
                    f"algo.kl.{key} is {getattr(kl, key)} and has no effect with algo.kl.controller fixed; set that to "
                    "adaptive, or take it out"
                )
    if reference.ema and not reference.update_every:
        yield f"reference.ema is {reference.ema} and has no effect with reference.update_every 0; set both or none"
