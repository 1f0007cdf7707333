"""All rewards of a prompt group, each on its own and their weighted sum."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from rlhf_dist.config.schema import RewardSpec, ScoringConfig
from rlhf_dist.errors import ConfigError, RewardError
from rlhf_dist.scoring.function import FunctionReward
from rlhf_dist.scoring.rules import exact_match, number_match, regex_match
from rlhf_dist.types import Rollout, Scores

Reward = Callable[[Sequence[str], Sequence[str], Sequence[str]], np.ndarray]
"""(prompts, responses, answers), n strings each -> float32 [n]."""


class Scorer:
    """Scores one prompt group at a time by the rewards of the `scoring` section."""

    def __init__(self, config: ScoringConfig) -> None:
        """Raises ConfigError for a pattern that does not compile or a function that cannot be imported."""
        if not config.rewards:
            raise ConfigError("scoring.rewards is empty; name at least one reward, such as exact: {kind: exact}")
        self._rewards = {name: (spec, _reward(name, spec)) for name, spec in config.rewards.items()}

    def score(self, rollout: Rollout) -> Scores:
        """The group's rewards, float32 [n] each; functions see the last user turn as the prompt. Raises RewardError."""
        prompt, n = rollout.prompt, len(rollout.texts)
        asked = next(m.content for m in reversed(prompt.messages) if m.role == "user")
        components: dict[str, np.ndarray] = {}
        total = np.zeros(n, np.float64)
        for name, (spec, reward) in self._rewards.items():
            if spec.kind in ("exact", "number") and not prompt.answer:
                raise RewardError(
                    f"the reward {name} compares with an answer and prompt {prompt.uid} of {prompt.source} has none; "
                    "set data.answer_key or use a reward of another kind"
                )
            components[name] = reward([asked] * n, list(rollout.texts), [prompt.answer] * n)
            total += spec.weight * components[name].astype(np.float64)
        return Scores(total.astype(np.float32), components)


def preflight(config: ScoringConfig) -> None:
    """Make every reward once, so that a bad one is told before anything starts. Raises ConfigError."""
    Scorer(config)


def _reward(name: str, spec: RewardSpec) -> Reward:
    if spec.kind == "function":
        return FunctionReward(name, spec)
    if spec.kind == "exact":
        rule = exact_match
    elif spec.kind == "number":
        rule = number_match
    else:
        rule = _regex(name, spec.pattern)
    return lambda prompts, responses, answers: rule(responses, answers)


def _regex(name: str, pattern: str) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    key = f"scoring.rewards.{name}.pattern"
    if not pattern:
        raise ConfigError(f"{key} is empty; kind regex needs a Python pattern for the whole response")
    try:
        return regex_match(pattern)
    except re.error as error:
        raise ConfigError(f"{key}={pattern!r} is not a Python pattern: {error}") from error
