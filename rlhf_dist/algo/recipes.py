"""The algorithms: for each a function that makes an `Algorithm` of `AlgoConfig` and of the functions of this room."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from rlhf_dist.algo.advantages import (
    batch_centered,
    gae,
    group_centered_batch_whitened,
    group_normalized,
    leave_one_out,
    optimal_baseline,
)
from rlhf_dist.algo.aggregation import sequence_mean, sequence_sum, token_mean
from rlhf_dist.algo.algorithm import (
    Algorithm,
    Correction,
    GroupCredit,
    LaggingMask,
    Loss,
    ResponseCredit,
    Statistics,
    TokenCredit,
)
from rlhf_dist.algo.corrections import Level, Mode, importance_weights
from rlhf_dist.algo.losses import cispo_loss, clipped_policy_loss, reinforce_loss, sequence_policy_loss
from rlhf_dist.config.methods import METHODS, Method
from rlhf_dist.config.schema import AlgoConfig, CorrectionConfig
from rlhf_dist.errors import ConfigError

AGGREGATIONS = {"token_mean": token_mean, "sequence_mean": sequence_mean, "sequence_sum": sequence_sum}
"""`algo.aggregation` -> token weights."""
BASELINES = {"token": ("critic", "none"), "response": ("group", "step", "greedy", "none")}
"""How credit is given -> what it can be compared with."""


def ppo(config: AlgoConfig) -> Algorithm:
    """PPO (arXiv:1707.06347) as RLHF has it (InstructGPT, arXiv:2203.02155): a critic, GAE, clipped losses.

    The score is the reward of a response's last token; the KL to the reference, when it is in the reward, is taken off
    that of each.
    """
    return make(config, critic_credit(config), clipped(config))


def decoupled_ppo(config: AlgoConfig) -> Algorithm:
    """PPO with the distance of the sampler (behaviour) from the learner before its update (proximal) as a weight.

    Batch-size invariance (arXiv:2110.00641); AReaL (arXiv:2505.24298) uses it where rollouts are older than the
    weights. The other methods take their ratio to either (`algo.ratio_to`); this one to the proximal logprobs, and it
    must have the weight, `algo.correction`.
    """
    return make(config, critic_credit(config), clipped(config))


def nlpo(config: AlgoConfig) -> Algorithm:
    """NLPO (arXiv:2210.01241): PPO whose actions are the likeliest tokens (top-p) of the policy some steps ago."""
    return replace(
        make(config, critic_credit(config), clipped(config)),
        mask=LaggingMask(config.mask_top_p, config.mask_every),
    )


def a2c(config: AlgoConfig) -> Algorithm:
    """Synchronous advantage actor-critic (arXiv:1602.01783, without the asynchrony): a critic, no ratio, no clip."""
    return make(config, critic_credit(config), by_token(reinforce_loss))


def reinforce(config: AlgoConfig) -> Algorithm:
    """REINFORCE (Williams, 1992) with a baseline: scores less the mean of the step's."""
    credit = GroupCredit(partial(of_scores, batch_centered), partial(of_scores, batch_centered))
    return make(config, credit, by_token(reinforce_loss))


def reinforce_pp(config: AlgoConfig) -> Algorithm:
    """REINFORCE++ (arXiv:2501.03262): discounted rewards to come, whitened over the step; PPO's loss, no critic.

    Its KL is in the reward, token by token.
    """
    estimate = partial(gae, gamma=config.gamma, lam=1.0)
    credit = TokenCredit(estimate, config.whiten_advantages, config.advantage_clip)
    return make(config, credit, clipped(config))


def reinforce_pp_baseline(config: AlgoConfig) -> Algorithm:
    """REINFORCE++-baseline (arXiv:2501.03262): scores less their group's mean, divided by the step's deviation."""
    credit = GroupCredit(partial(of_groups, group_centered_batch_whitened), group_centered())
    return make(config, credit, clipped(config))


def rloo(config: AlgoConfig) -> Algorithm:
    """RLOO (arXiv:2402.14740): scores less the mean of the other samples of their prompt; no ratio, no clip."""
    credit = GroupCredit(partial(of_groups, leave_one_out), partial(of_groups, leave_one_out))
    return make(config, credit, by_token(reinforce_loss))


def opo(config: AlgoConfig) -> Algorithm:
    """OPO (arXiv:2505.23585): the baseline that is best for the gradient's variance, exactly on policy."""
    return make(config, GroupCredit(optimal_baseline, optimal_baseline), by_token(reinforce_loss))


def remax(config: AlgoConfig) -> Algorithm:
    """ReMax (arXiv:2310.10505): scores less that of a greedy response to the same prompt, sampled besides."""
    credit = GroupCredit(unchanged, partial(of_scores, batch_centered))
    return make(config, credit, by_token(reinforce_loss))


def grpo(config: AlgoConfig) -> Algorithm:
    """GRPO: group-normalised scores (unbiased standard deviation), PPO's clipped loss.

    DeepSeekMath (arXiv:2402.03300), which averages within each response first (`algo.aggregation=sequence_mean`); the
    token mean is DAPO's (arXiv:2503.14476).
    """
    return make(config, grpo_credit(), clipped(config))


def dr_grpo(config: AlgoConfig) -> Algorithm:
    """Dr. GRPO (arXiv:2503.20783): scores less their group's mean, the scale kept.

    The paper divides the sum over tokens by a constant (`algo.aggregation=sequence_sum`), so that no response is
    diluted by its own length. The token mean has the same property within a step, and keeps the size of a step
    from depending on the length limit; from step to step it differs from the paper by the mean length over that limit.
    """
    return make(config, GroupCredit(group_centered(), group_centered()), clipped(config))


def dapo(config: AlgoConfig) -> Algorithm:
    """DAPO (arXiv:2503.14476): GRPO with a wider upper bound, the mean over tokens and a penalty near the length limit.

    What sets it apart are keys: `algo.clip_high`, `algo.aggregation`, `algo.shaping.overlong_buffer`;
    configs/algo/dapo.yaml sets them.
    """
    return make(config, grpo_credit(), clipped(config))


def gspo(config: AlgoConfig) -> Algorithm:
    """GSPO (arXiv:2507.18071): GRPO's credit, the ratio and the clip of whole sequences, the mean over sequences."""
    loss = partial(sequence_policy_loss, clip_low=config.clip_low, clip_high=config.clip_high)
    return make(config, grpo_credit(), loss, "sequence_mean")


def cispo(config: AlgoConfig) -> Algorithm:
    """CISPO (MiniMax-M1, arXiv:2506.13585): GRPO's credit; the ratio is a bounded weight, so all tokens learn."""
    loss = partial(cispo_loss, clip_low=config.clip_low, clip_high=config.clip_high)
    return make(config, grpo_credit(), by_token(loss))


def _recipe(name: str, method: Method, config: AlgoConfig) -> Algorithm:
    """What the row's function makes. Raises ConfigError where there is none, or where it is not what the row says."""
    where = f"the method {name} ({method.recipe}, its row in rlhf_dist/config/methods.py)"
    module, _, function = method.recipe.partition(":")
    try:
        found = importlib.import_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{where}: {error.filename}:{error.lineno}: {error.msg}") from None
    except ImportError as error:
        raise ConfigError(f"{where} cannot be imported: {error}") from None
    recipe = getattr(found, function, None)
    if not callable(recipe):
        raise ConfigError(f"{where}: {module} has no function {function!r}")
    made = recipe(config)
    if not isinstance(made, Algorithm):
        raise ConfigError(f"{where} returned {type(made).__name__}; it has to return an Algorithm, as make(...) does")
    by = "token" if made.credit_by_token else "response"
    if method.baseline not in BASELINES[by]:
        raise ConfigError(
            f"{where}: its credit is by {by}, and the row's baseline is {method.baseline}; credit by {by} goes with "
            f"{', '.join(BASELINES[by])}"
        )
    return replace(made, name=name)


ALGORITHMS: dict[str, Callable[[AlgoConfig], Algorithm]] = {
    name: partial(_recipe, name, method) for name, method in METHODS.items()
}
"""`algo.name` -> its recipe, imported when it is called."""


def make(config: AlgoConfig, credit: GroupCredit | TokenCredit, loss: Loss, aggregation: str = "") -> Algorithm:
    """An algorithm of its credit, its loss, and what the config puts beside them.

    `aggregation` overrides the config's, where the loss fits one only.
    """
    kl_in_loss = config.kl.place == "loss" and config.kl.coef > 0
    return Algorithm(
        name=config.name,
        credit=credit,
        loss=loss,
        ratio_to=config.ratio_to,
        token_weights=AGGREGATIONS[aggregation or config.aggregation],
        correction=correction(config.correction),
        # The share of entropies is of all tokens.
        idle_without_credit=isinstance(credit, GroupCredit)
        and not kl_in_loss
        and config.entropy_coef == 0
        and config.entropy_share == 1,
        entropy_coef=config.entropy_coef,
        kl_estimator=config.kl.estimator if kl_in_loss else None,
        kl_stop=config.kl_stop,
        entropy_share=config.entropy_share,
        off_policy_limit=config.off_policy_limit,
    )


def correction(config: CorrectionConfig) -> Correction | None:
    """The weights of `algo.correction`, or None where it is off."""
    if config.level == "off":
        return None
    return partial(_weights, config.level, config.mode, config.low, config.high)


def _weights(
    level: Level, mode: Mode, low: float, high: float, old: Tensor, sampled: Tensor, offsets: Tensor
) -> tuple[Tensor, Statistics]:
    return importance_weights(old, sampled, level, mode, low, high, offsets)


def critic_credit(config: AlgoConfig) -> TokenCredit:
    """GAE from a critic's values."""
    estimate = partial(gae, gamma=config.gamma, lam=config.lam)
    return TokenCredit(estimate, config.whiten_advantages, config.advantage_clip)


def grpo_credit() -> GroupCredit:
    """Scores by their group's mean and deviation; the KL by its mean only."""
    return GroupCredit(partial(of_groups, partial(group_normalized, std="unbiased")), group_centered())


def group_centered() -> ResponseCredit:
    """Less the group's mean."""
    return partial(of_groups, partial(group_normalized, std="none"))


def clipped(config: AlgoConfig) -> Loss:
    """PPO's loss."""
    return by_token(
        partial(
            clipped_policy_loss,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip or None,  # 0 means off in the config
        )
    )


def by_token(loss: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Statistics]]) -> Loss:
    """A loss that looks at each token alone, as one that is given the sequences too."""
    return partial(_by_token, loss)


def _by_token(
    loss: Callable[..., tuple[Tensor, Statistics]], logprobs: Tensor, old: Tensor, advantages: Tensor, offsets: Tensor
) -> tuple[Tensor, Statistics]:
    return loss(logprobs, old, advantages)


def unchanged(scores: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
    """For credit that is compared already."""
    return scores


def of_scores(advantages: Callable[[Tensor], Tensor], scores: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
    """For credit that looks at scores only."""
    return advantages(scores)


def of_groups(
    advantages: Callable[[Tensor, Tensor], Tensor], scores: Tensor, groups: Tensor, lengths: Tensor
) -> Tensor:
    """For credit that looks at scores and groups."""
    return advantages(scores, groups)
