"""A language model behind an OpenAI-style endpoint as a reward: one request for each different response."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError as FutureTimeout
from urllib.parse import urljoin

import numpy as np

from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.errors import ConfigError, RewardError
from rlhf_dist.scoring.http_calls import Calls
from rlhf_dist.scoring.judge_text import Case, NoScore, read_score, request_body
from rlhf_dist.scoring.one_by_one import Given
from rlhf_dist.scoring.score_list import short
from rlhf_dist.scoring.texts import Texts, read_text
from rlhf_dist.scoring.time_limits import Limit

GRACE_S = 5.0
"""For a request to end after its own limit."""


class BudgetSpent(RewardError):
    """`judge.max_requests` is used up, which no response is to blame for."""


class Judge:
    """Asks for scores, several at once. May be called from several threads, which share `judge.concurrency`."""

    def __init__(self, name: str, spec: RewardSpec, limit_s: float) -> None:
        """Connects to nothing yet. `limit_s`: `scoring.timeout_s`. Raises ConfigError for a rubric that cannot be read
        and as `Calls`."""
        self._config, key = spec.judge, f"scoring.rewards.{name}.judge"
        self._key = f"{key}.max_requests"
        file = self._config.rubric_file
        self._rubric = read_text(file, f"{key}.rubric_file") if file else self._config.rubric
        if not self._rubric.strip():
            raise ConfigError(f"{key}.rubric_file={file}: the rubric is empty; say what is good and what is bad")
        self._models = urljoin(spec.url, "../models")
        self._calls = Calls("the judge", name, spec, limit_s)
        self._pool = ThreadPoolExecutor(self._config.concurrency, thread_name_prefix=f"judge {name}")
        self._lock = threading.Lock()
        self._asked = 0

    def each(self, texts: Texts, limit: Limit, go_on: bool) -> Given:
        """Scores, and why responses have none. `go_on`: after the first that has none; otherwise that is raised.

        Raises BudgetSpent. Equal responses are asked for once.
        """
        columns = (texts.conversations, texts.responses, texts.answers, texts.ended)
        cases = [Case(*row) for row in zip(*columns, strict=True)]
        asked = {case: self._pool.submit(self._score, case, limit) for case in dict.fromkeys(cases)}
        try:
            found = {case: self._ended(future, case, limit, go_on) for case, future in asked.items()}
        finally:
            for future in asked.values():
                future.cancel()
        failed = {i: why for i, case in enumerate(cases) if isinstance(why := found[case], str)}
        values = [np.nan if i in failed else found[case] for i, case in enumerate(cases)]
        return Given(np.array(values, np.float32), failed)

    def __call__(self, texts: Texts, limit: Limit) -> np.ndarray:
        """float32 [n]. Raises RewardError for the first response without a score."""
        return self.each(texts, limit, go_on=False).values

    def check(self) -> None:
        """Ask for the endpoint's list of models, as a sign of life. Raises ResourceError."""
        self._calls.check(self._models)

    def close(self) -> None:
        """Close the connections; requests under way come to their own limits."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._calls.close()

    def _ended(self, future: Future[float], case: Case, limit: Limit, go_on: bool) -> float | str:
        """The score, or why there is none. Raises RewardError where that is not to go on."""
        try:
            return future.result(max(0.0, limit.deadline - time.monotonic()) + GRACE_S)
        except BudgetSpent:
            raise
        except RewardError as error:
            why = str(error)
        except FutureTimeout:
            why = f"{self._calls.who} did not answer within {limit.seconds:g} s; raise {limit.key}"
        if go_on:
            return why
        raise RewardError(why)

    def _score(self, case: Case, limit: Limit) -> float:
        answer = self._calls.post(request_body(case, self._rubric, self._config), limit, self._count)
        try:
            return read_score(answer, self._config)
        except NoScore as wrong:
            what = self._calls.shown(str(wrong))
            raise RewardError(f"{self._calls.who} {what}; for the response {short(case.response)}") from None

    def _count(self) -> None:
        """One more request. Raises BudgetSpent."""
        most = self._config.max_requests
        with self._lock:
            if most and self._asked >= most:
                raise BudgetSpent(
                    f"{self._calls.who} was asked {most} times, as often as {self._key} allows; raise it, and go on "
                    "with --resume (where there is a checkpoint)"
                )
            self._asked += 1
