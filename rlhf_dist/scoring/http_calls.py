"""Requests to a server that scores: with limits, with a token, again where that may help."""

from __future__ import annotations

import json
import os
import re
import ssl
import time
from collections.abc import Callable
from typing import Any

import httpx

from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.errors import ConfigError, ResourceError, RewardError
from rlhf_dist.scoring.time_limits import SHARE_OF_LIMIT, Limit

CONNECT_LIMIT_S = 10.0
FIRST_PAUSE_S = 0.5
"""Before the second try; doubled before each further one. A server may ask for a longer one (Retry-After)."""
LONGEST_PAUSE_S = 8.0
ANSWER_BYTES = 16 * 2**20
SHOWN = 120
"""Characters of an answer in a message."""


class _Failed(Exception):
    """One try that gave nothing."""

    def __init__(self, what: str, again: bool, pause_s: float = 0.0) -> None:
        """`pause_s`: asked for before another try."""
        super().__init__(what)
        self.again, self.pause_s = again, pause_s


class Calls:
    """The connections to one server. May be used from several threads."""

    def __init__(self, who: str, name: str, spec: RewardSpec, limit_s: float) -> None:
        """Connects to nothing yet. `who`: as in `the reward server`; `name`: of the reward; `limit_s`:
        `scoring.timeout_s`, for a call with all its tries.

        Raises ConfigError when the variable that `token_env` names holds no token.
        """
        self._url, self._retries, self._timeout_s = spec.url, spec.retries, spec.timeout_s
        self._key = f"scoring.rewards.{name}"
        self.who = f"{who} {name} ({spec.url.partition('?')[0]})"  # a query may hold a secret
        self._total_s = SHARE_OF_LIMIT * limit_s
        self._token_env = spec.token_env
        self._token = read_token(spec.token_env, f"{self._key}.token_env") if spec.token_env else ""
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        self._client = httpx.Client(
            headers=headers,
            follow_redirects=False,  # the token is for this address only
            trust_env=False,  # no proxy, and no password from ~/.netrc in the token's place
            verify=ssl.create_default_context(),
        )

    def post(self, body: Any, limit: Limit | None = None, before: Callable[[], None] = lambda: None) -> Any:
        """The answer's JSON, its texts without the token. `before` is called before each try. Raises RewardError naming
        the address and what came, and what `before` raises."""
        content = json.dumps(body).encode()
        deadline = time.monotonic() + self._total_s if limit is None else limit.deadline
        tries, pause = 0, FIRST_PAUSE_S
        while True:
            tries += 1
            left = deadline - time.monotonic()
            if left <= 0:
                key = limit.key if limit else "scoring.timeout_s"
                raise RewardError(f"{self.who} could not be asked before {key} had passed; raise that")
            before()
            try:
                return self._ask("POST", self._url, content, min(self._timeout_s, left))
            except _Failed as failed:
                wait = max(pause, failed.pause_s)
                late = time.monotonic() + wait >= deadline
                if not failed.again or tries > self._retries or late:
                    count = f" (tried {tries} times{', then scoring.timeout_s was near' if late else ''})"
                    way = f"; {self._way_out(late)}" if failed.again else ""
                    raise RewardError(f"{self.who} {failed}{count if tries > 1 else ''}{way}") from None
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def check(self, url: str) -> None:
        """One GET as a sign of life; a server may have no such page. Raises ResourceError."""
        try:
            self._ask("GET", url, None, min(self._timeout_s, self._total_s), missing_is_fine=True)
        except _Failed as failed:
            raise ResourceError(
                f"{self._key}.url: {self.who} {failed}; asked was {url}. Start it, or give its right address"
            ) from None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def shown(self, value: Any) -> str:
        """Cut for a message, on one line, without the token."""
        text = value.decode(errors="replace") if isinstance(value, (bytes, bytearray)) else value
        text = " ".join((text if isinstance(text, str) else json.dumps(text)).split())
        text = text.replace(self._token, "[token]") if self._token else text
        return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."

    def _way_out(self, late: bool) -> str:
        """What to do about a server that went away; `late`: no time was left for another try."""
        longer = "scoring.timeout_s" if late else f"{self._key}.retries or {self._key}.timeout_s"
        return f"start or mend it and go on with --resume (where there is a checkpoint), or raise {longer}"

    def _ask(self, method: str, url: str, content: bytes | None, limit_s: float, missing_is_fine: bool = False) -> Any:
        """The answer's JSON; None where a missing page is fine. Raises _Failed."""
        deadline = time.monotonic() + limit_s
        timeout = httpx.Timeout(limit_s, connect=min(limit_s, CONNECT_LIMIT_S))
        late = _Failed(f"did not answer within {limit_s:.3g} s", again=True)
        headers = {"Content-Type": "application/json"} if content is not None else {}
        try:
            with self._client.stream(method, url, content=content, headers=headers, timeout=timeout) as response:
                body = bytearray()
                for part in response.iter_bytes():
                    body += part
                    if time.monotonic() > deadline:  # the client's own limit is for each part
                        raise late
                    if len(body) > ANSWER_BYTES:
                        raise _Failed(f"answered with more than {ANSWER_BYTES >> 20} MiB", again=False)
        except httpx.ConnectTimeout:
            raise _Failed(f"could not be connected to within {timeout.connect:.3g} s", again=True) from None
        except httpx.TimeoutException:
            raise late from None
        except httpx.ConnectError as error:
            raise _Failed(f"cannot be reached: {self.shown(str(error))}", again=True) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _Failed(f"broke off: {type(error).__name__}: {self.shown(str(error))}", again=True) from None
        if missing_is_fine and response.status_code in (404, 405):
            return None
        self._check_status(response, body)
        try:
            return self._decoded(body)
        except (ValueError, RecursionError):
            kind = response.headers.get("content-type", "no content type").split(";")[0]
            raise _Failed(f"answered with {self.shown(kind)}, not JSON: {self.shown(body)}", again=False) from None

    def _check_status(self, response: httpx.Response, body: bytes | bytearray) -> None:
        status = response.status_code
        if status in (401, 403):
            way = f"the token in the variable {self._token_env} is not the server's"
            if not self._token:
                way = f"it wants a token: put it into an environment variable and name that in {self._key}.token_env"
            raise _Failed(f"answered {status}: {way}", again=False)
        if response.is_redirect:
            target = self.shown(response.headers.get("location", ""))
            raise _Failed(f"answered {status}, go to {target}; that is not followed: set the url to it", again=False)
        if not response.is_success:
            pause_s = _asked_pause(response.headers.get("retry-after", ""))
            try:
                detail = _detail(self._decoded(body))
            except (ValueError, RecursionError):
                detail = body
            raise _Failed(f"answered {status}: {self.shown(detail)}", status == 429 or status >= 500, pause_s)

    def _decoded(self, body: bytes | bytearray) -> Any:
        """The JSON in `body`, without the token: whoever cuts a text of it for a message could leave a part of that.

        Raises ValueError, RecursionError.
        """
        answer = json.loads(body)
        return without(self._token, answer) if self._token else answer


def read_token(variable: str, key: str) -> str:
    """The token in an environment variable. Raises ConfigError, which names the variable and never what it holds."""
    token = os.environ.get(variable, "")
    if not token:
        raise ConfigError(f"{key} = {variable}: this variable is not set or empty; put the server's token into it")
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigError(
            f"{key} = {variable}: what this variable holds is no token: it has blanks, line ends or characters beyond "
            "ASCII; perhaps a line end came along from a file"
        )
    return token


def without(token: str, value: Any) -> Any:
    """`value`, as JSON can hold it, with `[token]` in place of the token in its texts. Raises RecursionError."""
    if isinstance(value, str):
        return value.replace(token, "[token]")
    if isinstance(value, list):
        return [without(token, item) for item in value]
    if isinstance(value, dict):
        return {without(token, key): without(token, item) for key, item in value.items()}
    return value


def _detail(answer: Any) -> Any:
    """The message of an error as FastAPI, OpenAI and many others send it, else the whole answer."""
    if not isinstance(answer, dict):
        return answer
    error = answer.get("error")
    return answer.get("detail") or (error.get("message") if isinstance(error, dict) else None) or answer


def _asked_pause(header: str) -> float:
    """Seconds that a server asks to wait (Retry-After); 0 for none, and for a date."""
    return float(header) if re.fullmatch(r"\d{1,6}(\.\d{1,6})?", header.strip()) else 0.0
