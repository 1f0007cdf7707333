"""A reward server elsewhere, asked over HTTP."""

from __future__ import annotations

import math
from urllib.parse import urljoin

import numpy as np

from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.errors import RewardError
from rlhf_dist.scoring.http_calls import Calls
from rlhf_dist.scoring.texts import Texts
from rlhf_dist.scoring.time_limits import Limit
from rlhf_dist.scoring.values import checked_scores


class HttpReward:
    """Sends {prompts, responses, answers, conversations, ended}, lists of one length, and takes {scores}."""

    def __init__(self, name: str, spec: RewardSpec, limit_s: float) -> None:
        """As `Calls`."""
        self._health = urljoin(spec.url, "health")
        self._calls = Calls("the reward server", name, spec, limit_s)

    def __call__(self, texts: Texts, limit: Limit | None = None) -> np.ndarray:
        """float32 [n]; NaN and infinity as they came, null, which stands for either in JSON, as NaN.

        May be called from several threads. Raises RewardError naming the address and what came.
        """
        body = {
            "prompts": texts.prompts,
            "responses": texts.responses,
            "answers": texts.answers,
            "conversations": [[{"role": m.role, "content": m.content} for m in turns] for turns in texts.conversations],
            "ended": texts.ended,
        }
        answer, calls = self._calls.post(body, limit), self._calls
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if scores is None:
            raise RewardError(f'{calls.who} answered {calls.shown(answer)}; it has to be {{"scores": [numbers]}}')
        if isinstance(scores, list):
            scores = [math.nan if score is None else score for score in scores]
        return checked_scores(calls.who, scores, texts.responses)

    def check(self) -> None:
        """One request to `health` beside the url, as a sign of life. Raises ResourceError."""
        self._calls.check(self._health)  # a server may know nothing but its scores

    def close(self) -> None:
        """Close its connections."""
        self._calls.close()
