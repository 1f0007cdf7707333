"""math-verify as a process of its own: sympy can compute without end, and then the process is ended."""

from __future__ import annotations

import time
from collections.abc import Callable

from rlhf_dist.config.reward_words import has_math_verify
from rlhf_dist.errors import ConfigError, RewardError
from rlhf_dist.scoring.answers import unreadable_answer
from rlhf_dist.scoring.child import Child, ChildEnded, ChildLate
from rlhf_dist.scoring.expressions import expression
from rlhf_dist.scoring.sandbox import Sandbox

START_LIMIT_S = 60.0
"""For importing math-verify and sympy."""
READ_LIMIT_S = 5.0
"""For one answer, before the start."""
MOST_LATE = 3
"""Answers that took longer before the others are no longer tried."""


class Verifier:
    """The process, which starts with the first request. Not for several threads at once."""

    def __init__(self, sandbox: Callable[[], Sandbox | None] = lambda: None) -> None:
        """`sandbox`: makes what each process is enclosed in."""
        self._sandbox = sandbox
        self._child: Child | None = None

    def reads(self, latex: str) -> bool:
        """Whether math-verify reads it. Raises as `same`, ChildLate after READ_LIMIT_S."""
        self.start()
        return self._ask([latex], time.monotonic() + READ_LIMIT_S)

    def same(self, latex: str, text: str, deadline: float) -> bool:
        """Whether the text ends in an expression equal to `latex`. Raises ChildLate, ChildEnded, and RewardError where
        math-verify cannot be imported."""
        self.start()
        return self._ask([latex, text], deadline)

    def start(self) -> None:
        """Have the process, so that its start counts against no limit."""
        if self._child is not None:
            return
        child = Child({"verifier": "math_verify"}, self._sandbox())
        try:
            said = child.first_word(time.monotonic() + START_LIMIT_S)
        except (ChildLate, ChildEnded) as error:
            way = f"({error})" if isinstance(error, ChildEnded) else f"within {START_LIMIT_S:g} s"
            raise RewardError(f"the process of math-verify did not start {way}") from None
        if "refused" in said:
            child.close()
            raise RewardError(f"math-verify cannot be used: {said['refused']}; install it again, or uninstall it")
        self._child = child

    def close(self) -> None:
        """End the process. May be called twice."""
        child, self._child = self._child, None
        if child is not None:
            child.close()

    def _ask(self, request: list[str], deadline: float) -> bool:
        child, self._child = self._child, None
        assert child is not None, "start() comes first"
        answer = child.ask(request, deadline)
        self._child = child
        return bool(answer)


class AnswerReader:
    """Which answers of data rows a reward can compare with, with math-verify where it is installed."""

    def __init__(self) -> None:
        self._verifier = Verifier()
        self._known: dict[str, str | None] = {}
        self._late = 0

    def unreadable(self, kind: str, answer: str) -> str | None:
        """As `answers.unreadable_answer`; an expression is readable where math-verify reads it. Raises ConfigError
        where math-verify cannot be imported."""
        reason = unreadable_answer(kind, answer)
        latex = expression(answer) if reason and kind == "number" else None
        if reason is None or latex is None:
            return reason
        if not has_math_verify():
            return f"{reason}; expressions need math-verify: pip install math-verify"
        if latex not in self._known:
            self._known[latex] = self._unread(latex)
        return self._known[latex]

    def close(self) -> None:
        """End the process."""
        self._verifier.close()

    def _unread(self, latex: str) -> str | None:
        if self._late >= MOST_LATE:
            return f"it was not read: math-verify took longer than {READ_LIMIT_S:g} s for {MOST_LATE} others"
        try:
            self._verifier.start()
        except RewardError as error:
            raise ConfigError(str(error)) from None
        try:
            return None if self._verifier.reads(latex) else "math-verify does not read it as an expression"
        except ChildLate:
            self._late += 1
            return f"math-verify did not read it within {READ_LIMIT_S:g} s; write it in a simpler form"
        except ChildEnded as ended:
            return f"math-verify ended its process ({ended})"
