"""What the learner's ranks send each other in a step, and how long that takes. Pure.

DeepSpeed is told not to send beside computing (`overlap_comm`), so nothing of it is hidden. On a CPU nothing is
counted: how fast ranks exchange there is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_dist.config.schema import Config
from rlhf_dist.planning.memory import BYTES
from rlhf_dist.planning.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Ring:
    """The ranks of one model, in a ring."""

    ranks: int
    wire: float
    """Bytes a second between neighbours, of the slowest part."""

    def seconds(self, nbytes: float) -> float:
        """Of bringing so many bytes, of which each rank has a share, to all; or of adding them up to shares."""
        return nbytes * (self.ranks - 1) / self.ranks / self.wire


def of_training(config: Config, shape: ModelShape, ring: Ring, micro_batches: int, updates: int) -> float:
    """Seconds of weights and gradients in so many micro-batches with gradients, which make so many updates.

    ZeRO-3 gathers the weights forward and backward and adds gradients up to shares, each micro-batch. ZeRO-2 adds
    up each micro-batch and brings new weights to all once an update. Below it gradients are added up to all, which is
    both halves of it, once an update; ZeRO-1 then brings the weights besides.
    """
    stage, one = config.learner.zero_stage, ring.seconds(BYTES[config.model.dtype] * shape.parameters)
    if stage == 3:
        return 3 * micro_batches * one
    if stage == 2:
        return (micro_batches + updates) * one
    return updates * (2 + (stage == 1)) * one


def of_forward(config: Config, shape: ModelShape, ring: Ring, micro_batches: int) -> float:
    """The same without gradients."""
    whole = BYTES[config.model.dtype] * shape.parameters
    return micro_batches * ring.seconds(whole) if config.learner.zero_stage == 3 else 0.0


def of_sequences(config: Config, shape: ModelShape, wire: float, tokens: float, passes: float) -> float:
    """Seconds in which ranks that share sequences exchange heads for tokens, in so many passes as long as a forward.

    `tokens`: of a rank. Queries, keys, values and results, in each layer.
    """
    parts = config.learner.sequence_parallel
    a_token = BYTES[config.model.dtype] * shape.layers * 2 * shape.head_dim * (shape.heads + shape.kv_heads)
    return passes * tokens * a_token * (parts - 1) / parts / wire
