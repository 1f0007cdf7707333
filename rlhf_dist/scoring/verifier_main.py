"""math-verify in a reward's own process. It sets no timer there: the process is ended when it takes too long."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any


def answerer() -> Callable[[Any], Any]:
    """Request -> answer: [latex] -> whether it is read; [latex, text] -> whether the text ends in an equal expression.

    Raises whatever importing math-verify does.
    """
    from math_verify import LatexExtractionConfig, parse, verify  # pyright: ignore[reportMissingImports]

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of the timers that are off
    only_latex = [LatexExtractionConfig()]

    def read(latex: str) -> Any:
        return parse(f"${latex}$", only_latex, fallback_mode="no_fallback", parsing_timeout=None)

    def answer(request: list[str]) -> bool:
        try:
            right = read(request[0])
        except Exception:
            return False
        if len(request) == 1 or not right:
            return bool(right)
        try:
            found = parse(request[1], fallback_mode="no_fallback", parsing_timeout=None)
            return bool(found) and bool(verify(right, found, timeout_seconds=None))
        except Exception:  # a response may be anything, braces a thousand deep too: it is not equal
            return False

    return answer
