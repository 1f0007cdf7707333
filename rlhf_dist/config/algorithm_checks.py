"""Rules between the keys of algorithm, critic and reference. What single methods ask for is in `methods.py`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields
from typing import get_args

from rlhf_dist.config import effects
from rlhf_dist.config.keys import Problems, given, told
from rlhf_dist.config.methods import METHODS, Baseline, Method, RatioTo, method_problems
from rlhf_dist.config.schema import AlgoConfig, Config

PROBLEMS: Problems = {
    "algo.filter_rounds is 1 with algo.filter_groups true; nothing could be made up for: give 2 or more": lambda c: (
        c.algo.filter_groups and c.algo.filter_rounds == 1
    ),
    "algo.kl.coef is 0 with algo.kl.controller adaptive, which multiplies it; start above 0, as 0.05": lambda c: (
        c.algo.kl.controller == "adaptive" and c.algo.kl.coef == 0
    ),
    "rollout.top_p is {c.rollout.top_p} and rollout.top_k {c.rollout.top_k} with a reference (algo.kl); the sampler's "
    "logprobs are then of a cut distribution and the reference's are not, which would count as KL: set top_p to 1 and "
    "top_k to 0, or algo.kl.coef to 0": lambda c: (
        (c.algo.kl.coef or c.algo.kl.measure) and (c.rollout.top_p < 1 or c.rollout.top_k)
    ),
    "rollout.top_p is {c.rollout.top_p} and rollout.top_k {c.rollout.top_k} with algo.ratio_to {c.algo.ratio_to} and "
    "algo.correction.level {c.algo.correction.level}; the sampler's logprobs are then of a cut distribution and the "
    "learner's are not, so their ratio would be wrong by what is cut away: set top_p to 1 and top_k to 0": lambda c: (
        (c.algo.ratio_to == "behaviour" or c.algo.correction.level != "off")
        and (c.rollout.top_p < 1 or c.rollout.top_k)
    ),
    "algo.kl.estimator is k1 with algo.kl.place loss, where its gradient is 0 on average: only noise; choose k2, k3 or "
    "k3+, or set algo.kl.place to reward": lambda c: c.algo.kl.place == "loss" and c.algo.kl.estimator == "k1",
    "algo.shaping.overlong_buffer is {c.algo.shaping.overlong_buffer} and rollout.max_response_tokens "
    "{c.rollout.max_response_tokens}; the penalty would begin before the first token: it must be at most "
    "that": lambda c: c.algo.shaping.overlong_buffer > c.rollout.max_response_tokens,
    "critic.warmup_steps is {c.critic.warmup_steps} of loop.steps {c.loop.steps}; the policy would never learn: lower "
    "it": lambda c: METHODS[c.algo.name].baseline == "critic" and c.critic.warmup_steps >= c.loop.steps,
    "loop.witness is true with critic.warmup_steps {c.critic.warmup_steps}; in these steps the policy's optimizer "
    "takes none of the samples that the ledger counts as trained: set critic.warmup_steps to 0, or loop.witness to "
    "false": lambda c: c.loop.witness and METHODS[c.algo.name].baseline == "critic" and c.critic.warmup_steps > 0,
}

LAG: Problems = {
    "loop.max_policy_lag is {c.loop.max_policy_lag} with algo.ratio_to {c.algo.ratio_to} and algo.correction.level "
    "{c.algo.correction.level}; tokens that older weights sampled would count as the learner's own: set algo.ratio_to "
    "to behaviour, or algo.correction.level to token": lambda c: (
        uncorrected(c) and "behaviour" in METHODS[c.algo.name].ratio and c.algo.ratio_to == "proximal"
    ),
    "loop.max_policy_lag is {c.loop.max_policy_lag} with algo.correction.level {c.algo.correction.level} and algo.name "
    "{c.algo.name}, which has no ratio to the sampler; tokens that older weights sampled would count as the learner's "
    "own: set algo.correction.level to token, or loop.max_policy_lag to 0": lambda c: (
        uncorrected(c) and "behaviour" not in METHODS[c.algo.name].ratio
    ),
}
"""What rollouts that are older than the weights cannot do without."""


def uncorrected(config: Config) -> bool:
    """Whether tokens may be stale and no weight says so."""
    return config.loop.max_policy_lag > 0 and config.algo.correction.level == "off"


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
    yield from method_problems(config, method)
    yield from told({**PROBLEMS, **LAG}, config)
    correction = algo.correction
    if correction.level != "off" and correction.low == correction.high == 1:
        yield (
            "algo.correction.low and algo.correction.high are both 1; every ratio but that one would be "
            f"{'left out' if correction.mode == 'mask' else 'cut to it'}: set low below 1 or high above; 0 and 2 are "
            "usual"
        )
    rows = config.loop.prompts_per_step * algo.group_size
    if algo.kl.controller == "adaptive" and 0.2 * rows >= algo.kl.horizon:
        yield (
            f"algo.kl.horizon is {algo.kl.horizon} with {rows} responses a step; one step could take the whole "
            f"coefficient away: give more than {0.2 * rows:g}, 10000 is usual"
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
    if not isinstance(method.ratio, tuple) or not set(get_args(RatioTo)).issuperset(method.ratio):
        yield f"{row}: ratio is {method.ratio!r}; it must be a tuple of {', '.join(get_args(RatioTo))}, or empty"
    if not isinstance(method.keys, tuple) or not {key.name for key in fields(AlgoConfig)}.issuperset(method.keys):
        yield f"{row}: keys is {method.keys!r}; it must be a tuple of keys of `algo`"
        return
    of_some = {key.name for key in given(AlgoConfig()) if effects.of_method in key.rules}
    for key in method.keys:
        if key not in of_some:
            yield f"{row}: keys has {key!r}, which every method has; give it effects.of_method in config/learning.py"
