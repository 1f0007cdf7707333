"""Rewards by rule: 1 where a response is right, else 0. Lists of strings in, float32 [n] out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_dist.errors import RewardError
from rlhf_dist.scoring.answers import answer_numeral, final_numeral, unreadable_answer
from rlhf_dist.scoring.numerals import Numeral, same_value


def exact_match(responses: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """1 where the response is the answer, white space around either ignored. float32 [n]."""
    pairs = zip(responses, answers, strict=True)
    return np.array([response.strip() == answer.strip() for response, answer in pairs], np.float32)


def number_match(responses: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """1 where the response's final number equals the answer's in value (2.0 is 2, 0.75 is 3/4; units, `$` and thousands
    commas do not count). float32 [n]. Raises RewardError for an answer that is not one number."""
    known = {answer: _number(answer) for answer in set(answers)}
    found = [(final_numeral(response), known[answer]) for response, answer in zip(responses, answers, strict=True)]
    return np.array([said is not None and same_value(said, right) for said, right in found], np.float32)


def _number(answer: str) -> Numeral:
    numeral = answer_numeral(answer)
    if numeral is None:
        reason = unreadable_answer("number", answer)
        raise RewardError(f"a reward of kind number cannot compare with the prompt's answer {answer!r}: {reason}")
    return numeral
