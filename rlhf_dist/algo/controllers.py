"""The coefficient of the KL penalty from step to step: frozen values that give their successor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rlhf_dist.config.schema import KLConfig
from rlhf_dist.errors import ConfigError

ERROR_LIMIT = 0.2
"""The proportional error of the KL is cut to +- this."""


@dataclass(frozen=True, slots=True)
class FixedKL:
    """A coefficient that stays."""

    coef: float
    """Of the KL penalty, in the unit of scores per nat."""

    def update(self, kl: float, samples: int) -> FixedKL:
        """Itself; arguments as in `AdaptiveKL.update`."""
        return self


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """A coefficient that brings the KL of a response to a target.

        error = clip(kl / target - 1, -0.2, 0.2)        coef <- coef (1 + error samples / horizon)

    Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (arXiv:1909.08593), section 2.2.
    """

    coef: float
    """Of the KL penalty now, in the unit of scores per nat; above 0, because 0 would stay 0. What a resume needs."""
    target: float
    """Nats per response, above 0."""
    horizon: int
    """Responses over which the coefficient moves by its full rate."""

    def update(self, kl: float, samples: int) -> AdaptiveKL:
        """The controller after `samples` responses whose mean KL to the reference was `kl` nats per response.

        Raises ConfigError when so many responses could turn the coefficient to 0 or below in one step.
        """
        assert math.isfinite(kl), kl
        if ERROR_LIMIT * samples >= self.horizon:
            raise ConfigError(
                f"algo.kl.horizon is {self.horizon} and a step has {samples} responses: one step could take the whole "
                f"coefficient away; give a horizon above {ERROR_LIMIT * samples:g}, usually many times the responses"
            )
        error = min(max(kl / self.target - 1.0, -ERROR_LIMIT), ERROR_LIMIT)
        return replace(self, coef=self.coef * (1.0 + error * samples / self.horizon))


def make_controller(config: KLConfig) -> FixedKL | AdaptiveKL:
    """The controller at the start of a run; a resumed run replaces its `coef`.

    Raises ConfigError for an adaptive one that starts at 0, where it would stay.
    """
    if config.controller == "fixed":
        return FixedKL(config.coef)
    if not config.coef > 0:
        raise ConfigError(
            f"algo.kl.coef is {config.coef} and algo.kl.controller adaptive: it multiplies the coefficient, which has "
            "to start above 0 (usually 0.05)"
        )
    return AdaptiveKL(config.coef, config.target, config.horizon)
