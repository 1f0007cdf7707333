"""What an algorithm is: a frozen value made of functions. Its recipe, in a file of this room, fills it in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rlhf_dist.algo.kl import KLKind
from rlhf_dist.config.methods import METHODS, RatioTo

Statistics = dict[str, Tensor]
"""Name -> per-token values [N], without gradient."""
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Statistics]]
"""(logprobs [N], old_logprobs [N], advantages [N], offsets [B + 1]) -> (per-token loss [N], statistics)."""
Correction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Statistics]]
"""(old_logprobs [N], the sampler's logprobs [N], offsets [B + 1]) -> (factor of each token's loss [N], statistics)."""
ResponseCredit = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(scores [B], groups [B], response lengths [B]) -> [B], one number a response."""


@dataclass(frozen=True, slots=True)
class GroupCredit:
    """Credit by response: from the scores of a step alone, so the controller gives it."""

    advantages: ResponseCredit
    """Each is spread over its row's response tokens."""
    centered: ResponseCredit
    """What is done to the KL of the responses before it is taken off the advantages: the same comparison without a
    division, so that the coefficient keeps its meaning."""


@dataclass(frozen=True, slots=True)
class TokenCredit:
    """Credit by token: from rewards and a critic's values, given where the tokens are."""

    estimate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(rewards [B, T], values [B, T], mask [B, T]) -> (advantages [B, T], returns [B, T]). Values are 0
    where the method has no critic."""
    whiten: bool
    """Advantages to mean 0 and deviation 1, over all tokens of the step."""
    clip: float
    """Then cut to +-clip; 0: off."""


@dataclass(frozen=True, slots=True)
class LaggingMask:
    """Only the likeliest tokens of the policy as it was some steps ago can be drawn."""

    top_p: float
    """What their probabilities add up to."""
    every: int
    """Versions after which that policy takes the weights of the one that learns."""

    def follows(self, version: int) -> bool:
        """Whether it takes the weights of this version."""
        return self.at(version) == version

    def at(self, version: int) -> int:
        """Its own version while the policy is at `version`."""
        return version - version % self.every


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What the loop and the learner know of an algorithm. Made of module functions and numbers, so that it pickles."""

    name: str
    """Its row in `METHODS`, which says what it needs."""
    credit: GroupCredit | TokenCredit
    loss: Loss
    ratio_to: RatioTo
    """Whose logprobs the loss gets as the old ones: the learner's before the batch's first update, or the sampler's."""
    token_weights: Callable[[Tensor, int], Tensor]
    """(response lengths [B] of the whole optimizer step, longest response allowed) -> weights [B] float64.
    The step's loss is the sum over rows and their response tokens of weight x per-token loss. Because the weights are
    made once, from all rows of all ranks, the cut into ranks and micro-batches changes nothing."""
    correction: Correction | None
    """None: off."""
    idle_without_credit: bool
    """A row with advantage 0 has loss 0 and gradient 0, so the learner may leave it out; its tokens still count in
    `token_weights`."""
    entropy_coef: float
    """Weight of the entropy bonus: loss - entropy_coef x entropy, per token."""
    kl_estimator: KLKind | None
    """Estimator of the KL to the reference that the loss has beside it; None: none in the loss."""
    kl_stop: float
    """Mean approximate KL per token to the policy that the ratio is taken to, after which the batch's other updates are
    left out; 0: off."""
    entropy_share: float
    """Share of the tokens, those of the highest entropy, that have a policy loss; 1: all."""
    off_policy_limit: float
    """Nats per token: a response with negative advantage that the policy has left by more has no policy loss;
    0: off."""

    mask: LaggingMask | None = None
    """What may be drawn, by the sampler and in the learner's probabilities; None: everything."""

    @property
    def credit_by_token(self) -> bool:
        """Whether credit is made where the tokens are."""
        return isinstance(self.credit, TokenCredit)

    @property
    def needs_critic(self) -> bool:
        """Whether credit comes from a critic's values."""
        return METHODS[self.name].baseline == "critic"

    @property
    def greedy_baseline(self) -> bool:
        """Whether a greedy response to each prompt is sampled and scored too, and its score taken off the others'."""
        return METHODS[self.name].baseline == "greedy"
