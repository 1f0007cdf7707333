"""The section of `rlhf-dist prefer`, and what each of its methods needs and reads.

Part of the schema (`schema.py` joins it). Imports without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_dist.config import effects
from rlhf_dist.config.keys import COUNT, NOT_NEGATIVE, POSITIVE, Given, key
from rlhf_dist.config.learning import OptimizerConfig


@dataclass(frozen=True, slots=True)
class PreferMethod:
    """A row of `PREFER_METHODS`."""

    reference: bool
    """Whether it compares with a reference model."""
    singles: bool = False
    """Whether it learns from single responses, too."""
    keys: tuple[str, ...] = ()
    """The keys of `prefer` that it has and others have not."""


PREFER_METHODS = {
    "dpo": PreferMethod(reference=True),
    "ipo": PreferMethod(reference=True),
    "kto": PreferMethod(reference=True, singles=True, keys=("desirable_weight", "undesirable_weight")),
    "orpo": PreferMethod(reference=False),
    "simpo": PreferMethod(reference=False, keys=("gamma",)),
}
START = "start"
"""Value of `prefer.reference`: the weights that training starts from."""


def _of_methods(test: Callable[[PreferMethod], object], why: str = "") -> Callable[[Any, Given], str]:
    have = [name for name, row in PREFER_METHODS.items() if test(row)]
    way = f"take it out, or set prefer.method to {' or '.join(have)}"
    return effects.where("prefer.method", effects.one_of(*have), way, why)


def _of_method(config: Any, key: Given) -> str:
    name = key.name.removeprefix("prefer.")
    return _of_methods(lambda row: name in row.keys)(config, key)


_HAS_REFERENCE = _of_methods(lambda row: row.reference, ", which needs no reference")
_NEEDS_REFERENCE = effects.needed(
    "prefer.method {c.prefer.method} compares with a reference model: set it to start (the weights that training "
    "starts from) or to a model, or set prefer.method to orpo or simpo",
    lambda c: PREFER_METHODS[c.prefer.method].reference,
)
_OTHER_PROMPTS = effects.says(
    lambda c, key: c.prefer.method == "kto" and key.value < 2,
    "{key.name} is {key.value}; it must be at least 2 with prefer.method kto, whose reference point is an estimate "
    "over the batch",
)


@dataclass(frozen=True)
class PreferConfig:
    """Training of a policy on preferences themselves, without a reward model and without rollouts, by `rlhf-dist
    prefer`."""

    method: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = "dpo"
    """docs/offline.md has the losses."""
    reference: str = key(START, _HAS_REFERENCE, _NEEDS_REFERENCE)
    """dpo, ipo, kto: the frozen model that the policy is compared with: `start`, the weights that training starts from,
    or a Hugging Face directory, hub name or run directory. Its logprobs are computed once, before training, and kept in
    the checkpoints."""
    beta: float = key(0.1, POSITIVE)
    """dpo, kto: how closely the policy is held to the reference; ipo: the chosen side is to lead by 1 / (2 beta) nats
    per token; orpo: weight of the odds ratio beside the supervised loss; simpo: scale of the mean logprob (its paper
    has 2 to 10)."""
    gamma: float = key(0.5, NOT_NEGATIVE, _of_method)
    """simpo: by how much the scaled mean logprob of the chosen side has to lead."""
    desirable_weight: float = key(1.0, POSITIVE, _of_method)
    """kto: weight of good responses; raise it where they are fewer than the bad ones."""
    undesirable_weight: float = key(1.0, POSITIVE, _of_method)
    """kto: weight of bad ones."""
    steps: int = key(300, COUNT)
    """Optimizer steps."""
    batch_size: int = key(64, COUNT, effects.one_a_rank("judgement"), _OTHER_PROMPTS)
    """Judgements per optimizer step, over all ranks: comparisons, rankings or thumbs."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-6))
    log_every: int = key(10, COUNT)
    """Steps."""
    eval_every: int = key(50, NOT_NEGATIVE)
    """Steps between passes over the held-out judgements; 0: only at the end."""
    checkpoint_every: int = key(0, NOT_NEGATIVE)
    """Steps; 0: only at the end."""
