"""Kind `number` as a reward: numbers by our own exact rule, expressions by math-verify."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from rlhf_dist.config.reward_words import has_math_verify
from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.errors import RewardError
from rlhf_dist.scoring.answers import unreadable_answer
from rlhf_dist.scoring.child import ChildEnded, ChildLate
from rlhf_dist.scoring.expressions import expression, given
from rlhf_dist.scoring.rules import number_match
from rlhf_dist.scoring.sandbox import sandbox_of
from rlhf_dist.scoring.score_list import short
from rlhf_dist.scoring.time_limits import Limit, Turn
from rlhf_dist.scoring.verifier import Verifier


class NumberReward:
    """1 where the response's final number equals the answer's, or its final expression one that is no number."""

    def __init__(self, name: str, spec: RewardSpec) -> None:
        self._label, self._timeout_s = f"the reward {name}", spec.timeout_s
        self._limit_key = f"scoring.rewards.{name}.timeout_s"
        self._turn = Turn()
        self._verifier = Verifier(partial(sandbox_of, spec))

    def __call__(self, responses: Sequence[str], answers: Sequence[str], limit: Limit | None = None) -> np.ndarray:
        """float32 [n]. Raises RewardError for an answer that cannot be compared with, and when comparing takes too
        long; may be called from several threads."""
        verified = {answer: self._latex(answer) for answer in set(answers) if unreadable_answer("number", answer)}
        if not verified:
            return number_match(responses, answers)
        with self._turn.take(limit, self._label):
            self._verifier.start()
            own = Limit.within(self._timeout_s, self._limit_key, limit)  # the start does not count
            return np.array(
                [
                    self._same(verified[answer], answer, response, own)
                    if answer in verified
                    else number_match([response], [answer])[0]
                    for response, answer in zip(responses, answers, strict=True)
                ],
                np.float32,
            )

    def close(self) -> None:
        """End math-verify's process."""
        self._verifier.close()

    def _latex(self, answer: str) -> str:
        """Raises RewardError for an answer that is neither a number nor an expression that can be verified here."""
        latex = expression(answer)
        if latex is not None and has_math_verify():
            return latex
        reason = unreadable_answer("number", answer)
        more = "; expressions need math-verify, which is not installed on this machine" if latex is not None else ""
        raise RewardError(f"{self._label} cannot compare with the prompt's answer {short(answer)}: {reason}{more}")

    def _same(self, latex: str, answer: str, response: str, limit: Limit) -> bool:
        at = f"for the answer {short(answer)} and the response {short(response)}"
        try:
            return self._verifier.same(latex, given(response), limit.deadline)
        except ChildLate:
            raise RewardError(
                f"{self._label}: math-verify did not finish within {limit.seconds:g} s {at}; leave the prompt out, or "
                f"raise {limit.key}; a run that has begun goes on with --resume"
            ) from None
        except ChildEnded as ended:
            raise RewardError(f"{self._label}: math-verify ended its process ({ended}) {at}") from None
