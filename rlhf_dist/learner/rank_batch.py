"""What one learner rank trains on in one step, as one object. Pure; without torch, which the collator does not load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from rlhf_dist.learner.shard import RankPlan, Shard
from rlhf_dist.types import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBatch(RankPlan):
    """A rank's rows end to end, with everything that is known of their tokens; b rows, T tokens, N of them sampled."""

    tokens: np.ndarray
    """int32 [T]."""
    loss_mask: np.ndarray
    """bool [T]; true for the N tokens that the policy sampled."""
    starts: np.ndarray
    """int64 [b + 1]; row i is tokens[starts[i]:starts[i + 1]]."""
    offsets: np.ndarray
    """int64 [b + 1]; the sampled tokens of row i are numbers offsets[i] to offsets[i + 1] of the N."""
    sampled: np.ndarray
    """float32 [N]; the sampler's logprobs."""
    cache_versions: np.ndarray
    """int32 [N]; the oldest weights that each was sampled with, see `Trajectory`."""
    reference: np.ndarray
    """float32 [N]; the reference's logprobs; empty where nobody asks for them."""
    origins: tuple[tuple[str, int], ...]
    """b; (key of its request, sample) of each row, as its group itself says: what the plan says has no part in it."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [b]; sampled tokens of each row."""
        return np.diff(self.offsets)

    def places(self, chosen: np.ndarray) -> np.ndarray:
        """int64; which of the N are of the chosen rows, row after row."""
        return spans(self.offsets, chosen)


def rank_batch(shard: Shard, groups: Sequence[Group], references: Sequence[np.ndarray]) -> RankBatch:
    """The shard's rows out of the step's groups; `references`: of each group float32 [sampled tokens], or none."""
    rows = list(zip(shard.groups, shard.samples, strict=True))
    samples = [groups[g].trajectories[s] for g, s in rows]
    by_sample = [group.sampled(found) for group, found in zip(groups, references, strict=True)] if references else []
    return RankBatch(
        **{field.name: getattr(shard, field.name) for field in fields(RankPlan)},
        tokens=joined([sample.tokens for sample in samples], np.int32),
        loss_mask=joined([sample.loss_mask for sample in samples], np.bool_),
        starts=np.cumsum([0, *(len(sample.tokens) for sample in samples)]),
        offsets=np.cumsum([0, *(sample.length for sample in samples)]),
        sampled=joined([sample.logprobs[sample.loss_mask] for sample in samples], np.float32),
        cache_versions=joined([sample.cache_versions[sample.loss_mask] for sample in samples], np.int32),
        reference=joined([by_sample[g][s] for g, s in rows] if references else [], np.float32),
        origins=tuple((groups[g].request.key, int(s)) for g, s in rows),
    )


def joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """End to end; there may be none."""
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)


def spans(edges: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """int64; all numbers of the spans edges[i]:edges[i + 1] of the chosen i, one span after another."""
    return joined([np.arange(edges[i], edges[i + 1]) for i in chosen], np.int64)
