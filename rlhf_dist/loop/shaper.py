"""What turns scores into rewards and moves with the run: running moments of the scores, the KL coefficient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from rlhf_dist.algo.advantages import against_greedy
from rlhf_dist.algo.controllers import make_controller
from rlhf_dist.algo.rewards import (
    RunningMoments,
    length_normalized,
    repetition_penalty,
    shape_scores,
    soft_overlong_penalty,
)
from rlhf_dist.config.schema import AlgoConfig, ShapingConfig
from rlhf_dist.loop.batch import Batch


class Shaper:
    """The controller's memory of rewards; part of a checkpoint."""

    def __init__(self, config: AlgoConfig, max_tokens: int) -> None:
        """`max_tokens`: the longest response allowed."""
        self._shaping = config.shaping
        self._max_tokens = max_tokens
        self._kl_in_reward = config.kl.place == "reward"
        self._controller = make_controller(config.kl)
        self._moments = RunningMoments()

    @property
    def kl_coef(self) -> float:
        """As it stands."""
        return self._controller.coef

    def shape(self, batch: Batch) -> np.ndarray:
        """float32 [B]: scores with penalties, normalised and clipped as `algo.shaping` says."""
        shaped, self._moments = shape_scores(
            penalized(batch, self._shaping, self._max_tokens),
            torch.from_numpy(batch.ended),
            self._shaping,
            self._moments,
        )
        return shaped.numpy().astype(np.float32)

    @property
    def kl_coef_by_response(self) -> float:
        """Of the KL of a whole response, where credit is by response and the KL in the reward; else 0."""
        return self.kl_coef if self._kl_in_reward else 0.0

    def metrics(self, shaped: np.ndarray) -> dict[str, float]:
        """What shaping did to the scores of a step; nothing where it is off."""
        shaping = self._shaping
        found: dict[str, float] = {}
        if shaping != ShapingConfig():
            found |= {
                "reward/shaped_mean": float(shaped.mean()),
                "reward/running_mean": self._moments.mean,
                "reward/running_std": self._moments.std,
            }
        if shaping.clip:
            found["reward/score_clipped"] = float((np.abs(shaped) >= np.float32(shaping.clip)).mean())
        return found

    def observe(self, batch: Batch) -> None:
        """Let the coefficient follow the KL of a step that is done."""
        if batch.compared:
            self._controller = self._controller.update(float(batch.kl.mean()), len(batch.kl))

    def state(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"kl_coef": self.kl_coef, "moments": asdict(self._moments)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self._controller = replace(self._controller, coef=float(state["kl_coef"]))
        self._moments = RunningMoments(**state["moments"])


@dataclass(frozen=True, slots=True)
class ShaperState:
    """What `Shaper.state` holds."""

    kl_coef: float
    moments: RunningMoments


def penalized(batch: Batch, shaping: ShapingConfig, max_tokens: int) -> torch.Tensor:
    """float32 [B]: scores less their baselines, by length, then with the penalties that a response alone tells."""
    scores = against_greedy(torch.from_numpy(batch.scores), torch.from_numpy(batch.baselines))
    lengths = torch.from_numpy(batch.lengths)
    if shaping.length_normalize:
        scores = length_normalized(scores, lengths)
    if shaping.overlong_buffer:
        penalty = soft_overlong_penalty(torch.from_numpy(batch.longest), max_tokens, shaping.overlong_buffer)
        scores = scores + shaping.overlong_penalty * penalty
    if shaping.repetition_penalty:
        scores = scores + repetition_penalty(torch.from_numpy(batch.distinct), shaping.repetition_penalty)
    return scores
