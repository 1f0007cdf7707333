"""The section about numbers gone wrong; part of the schema (`schema.py` joins it). Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf_dist.config.effects import WITH_REFERENCE, but, only, where
from rlhf_dist.config.keys import COUNT, NOT_NEGATIVE, Given, key
from rlhf_dist.config.methods import METHODS


def can_roll_back(config: Any, given: Given) -> str:
    """A run that can go back, and has something to go back to."""
    if given.value != "roll_back":
        return ""
    name, moves = config.algo.name, config.reference.update_every
    if name in METHODS and "mask_every" in METHODS[name].keys:
        return (
            f"{given.name} is roll_back with algo.name {name}, whose learner cannot go back inside a run; set the "
            "first to skip"
        )
    if moves:
        return (
            f"{given.name} is roll_back with reference.update_every {moves}: a reference that moves cannot go back "
            "inside a run; set the first to skip, or the second to 0"
        )
    if not config.loop.checkpoint_every and not config.learner.keep_state_every:
        return (
            f"{given.name} is roll_back with loop.checkpoint_every 0 and learner.keep_state_every 0: nothing is saved "
            "before the end of the run; set one of them, or the first to skip"
        )
    return ""


@dataclass(frozen=True)
class NumbersConfig:
    """What a training step may not come to, and what is done then (docs/reliability.md)."""

    on_fault: Literal["stop", "skip", "roll_back"] = key("stop", can_roll_back)
    """A loss, gradient, advantage or logprob that is NaN or infinite, or one of the limits below passed. stop: the run
    ends. skip: the optimizer steps that are left of the training step are not taken, and the run goes on. roll_back:
    the learner goes back to the newest checkpoint, or state in memory (`learner.keep_state_every`), where that led to a
    fault again to the one before, and the groups of the step are left out from then on. The batch is saved for
    `rlhf-dist replay` in any case. Rewards have keys of their own: `scoring.non_finite`, `scoring.on_failure`."""
    max_faults: int = key(3, COUNT, where("numbers.on_fault", but("stop"), "set that to skip or roll_back"))
    """So many faults in a row, without a new step that is learnt from, are skipped or rolled back; one more ends the
    run."""
    max_kl: float = key(0.0, NOT_NEGATIVE, WITH_REFERENCE)
    """Largest KL to the reference of a step's responses (`kl/reference`: nats a response, mean); looked at before the
    step is learnt from. 0: no limit."""
    max_logprob_diff: float = key(
        0.0,
        NOT_NEGATIVE,
        only(
            lambda c: c.rollout.top_p == 1 and c.rollout.top_k == 0,
            " with rollout.top_p {c.rollout.top_p} and rollout.top_k {c.rollout.top_k}, which cut what is sampled "
            "from: logprobs do not compare; set it to 0",
        ),
    )
    """Largest difference between rollout and learner logprobs (`rollout/logprob_diff_max`: nats, of the tokens that the
    learner's own version sampled) that is learnt from. `loop.logprob_diff_limit`, below it, warns. 0: no limit."""
    still_weights: bool = True
    """After two training steps in a row whose gradient is not 0 (norm above 1e-3), and whose learning rate is at least
    a thousandth of `learner.optimizer.lr`, weights of which not one has changed are a fault; false: they are not. In
    bfloat16 a tiny model may need several small steps for that."""
