"""The methods of `rlhf-dist prefer`: from the logprobs of judged responses to the loss of each pair. Pure.

A method is a row of `PAIR_LOSSES` here, with its formula in `preference.py`, and one of `config/prefer_keys.py`, which
says what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_dist.algo.preference import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from rlhf_dist.config.prefer_keys import PREFER_METHODS, PreferConfig


@dataclass(frozen=True, slots=True)
class Responses:
    """Judged responses, S of them."""

    logprobs: Tensor
    """[S] of the whole response, nats, by the policy; with gradient."""
    reference: Tensor
    """[S] the same by the reference; 0 for methods that have none."""
    tokens: Tensor
    """[S] float32, at least 1; of the response."""

    def at(self, rows: Tensor) -> Responses:
        """Those of the rows: int64 [P], or bool [S]."""
        return Responses(self.logprobs[rows], self.reference[rows], self.tokens[rows])

    @property
    def mean(self) -> Tensor:
        """[S] of the policy, nats per token."""
        return self.logprobs / self.tokens

    @property
    def reference_mean(self) -> Tensor:
        """[S] of the reference, nats per token."""
        return self.reference / self.tokens


PairLoss = Callable[[PreferConfig, Responses, Responses, float], Tensor]
"""(keys, chosen sides [P], rejected sides [P], KTO's reference point) -> loss of each pair [P]."""


def _dpo(config: PreferConfig, chosen: Responses, rejected: Responses, _: float) -> Tensor:
    return dpo_loss(chosen.logprobs, rejected.logprobs, chosen.reference, rejected.reference, config.beta)


def _ipo(config: PreferConfig, chosen: Responses, rejected: Responses, _: float) -> Tensor:
    return ipo_loss(chosen.mean, rejected.mean, chosen.reference_mean, rejected.reference_mean, config.beta)


def _kto(config: PreferConfig, chosen: Responses, rejected: Responses, reference_point: float) -> Tensor:
    """The mean over both sides, each as a single response."""
    sides = [(chosen, True), (rejected, False)]
    losses = [
        single_loss(config, side, torch.full_like(side.tokens, good, dtype=torch.bool), reference_point)
        for side, good in sides
    ]
    return (losses[0] + losses[1]) / 2


def _orpo(config: PreferConfig, chosen: Responses, rejected: Responses, _: float) -> Tensor:
    """The odds ratio's part, weighted; the supervised part is per token: `learns_chosen`."""
    return config.beta * orpo_loss(chosen.mean, rejected.mean)


def _simpo(config: PreferConfig, chosen: Responses, rejected: Responses, _: float) -> Tensor:
    return simpo_loss(chosen.mean, rejected.mean, config.beta, config.gamma)


PAIR_LOSSES: dict[str, PairLoss] = {"dpo": _dpo, "ipo": _ipo, "kto": _kto, "orpo": _orpo, "simpo": _simpo}


def single_loss(config: PreferConfig, responses: Responses, good_S: Tensor, reference_point: float) -> Tensor:
    """[S]; of KTO, the only method that learns from single responses. good_S: bool [S]."""
    return kto_loss(
        responses.logprobs,
        responses.reference,
        good_S,
        reference_point,
        config.beta,
        config.desirable_weight,
        config.undesirable_weight,
    )


def learns_chosen(config: PreferConfig) -> bool:
    """Whether the mean negative logprob of all tokens of the better responses is added to the loss (ORPO)."""
    return config.method == "orpo"


def implicit_rewards(config: PreferConfig, responses: Responses) -> Tensor:
    """[S], as TRL shows them: beta (logprob - ref_logprob), or beta times the mean logprob without a reference."""
    if PREFER_METHODS[config.method].reference:
        return config.beta * (responses.logprobs - responses.reference)
    return config.beta * responses.mean
