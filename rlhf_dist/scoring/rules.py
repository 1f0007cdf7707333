"""Rewards by rule: 1 where a response is right, else 0. Lists of strings in, float32 [n] out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal

import numpy as np

from rlhf_dist.errors import RewardError

FINAL = "####"
"""GSM8K's mark before the final answer."""
NUMBER = re.compile(
    r"(?:(?<![\w.)])[-−])?"  # a minus between two operands is not a sign
    r"\$?"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"((?:[eE][+-]?[0-9]{1,3}(?![0-9]))?)"
)


def exact_match(responses: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """1 where the response is the answer, white space around either ignored. float32 [n]."""
    pairs = zip(responses, answers, strict=True)
    return np.array([response.strip() == answer.strip() for response, answer in pairs], np.float32)


def number_match(responses: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """1 where the response's final number equals the answer's in value (2.0 is 2; `$`, thousands commas, a closing dot
    do not count). float32 [n]. Raises RewardError for an answer without a number."""
    return np.array(
        [final_number(response) == _number(answer) for response, answer in zip(responses, answers, strict=True)],
        np.float32,
    )


def regex_match(pattern: str) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    """A rule: 1 where the pattern matches the whole response (a dot matches newlines too). Raises re.error."""
    compiled = re.compile(pattern, re.DOTALL)

    def match(responses: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        return np.array([compiled.fullmatch(response) is not None for response in responses], np.float32)

    return match


def final_number(text: str) -> Decimal | None:
    """The first number after the last `####`, or without that mark the last number of the text; None without one."""
    _, mark, rest = text.rpartition(FINAL)
    found = list(NUMBER.finditer(rest))
    if not found:
        return None
    match = found[0] if mark else found[-1]
    value = Decimal(match[1].replace(",", "") + match[2])
    return -value if match[0][0] in "-−" else value


def _number(answer: str) -> Decimal:
    value = final_number(answer)
    if value is None:
        raise RewardError(f"a reward of kind number needs a number to compare with, the prompt's answer is {answer!r}")
    return value
