"""A command as a job on a Ray cluster: sent with this package's code and the folder that it is called in.

Ray's dashboard at RAY_ADDRESS takes the job. The token is RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or
~/.ray/auth_token; RAY_AUTH_MODE=disabled is for a cluster without one.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from rlhf_dist.errors import ResourceError, RunError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
PACKAGE = Path(__file__).resolve().parents[1]
EXCLUDED = (".git", ".venv", "runs", "wandb", ".cache", "benchmarks/results", "__pycache__")
"""Of the folder: what is not sent."""
ANSWER_LIMIT_S = 10.0
"""For the dashboard's first answer."""
POLL_S = 1.0
SILENT_LIMIT_S = 300.0
"""How long the dashboard may be away while a job runs."""


def dashboard() -> str:
    """The address of the cluster's dashboard, where it answers and accepts the token. Raises `ResourceError`."""
    address = os.environ.get("RAY_ADDRESS", DEFAULT_ADDRESS).rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise ResourceError(f"RAY_ADDRESS={address} is not a dashboard's address; it looks like http://HOST:8265")
    token = _token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.get(f"{address}/api/version", headers=headers, timeout=ANSWER_LIMIT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = str(error) or type(error).__name__
        raise ResourceError(
            f"no Ray dashboard answers at {address} ({why}); start the cluster or set RAY_ADDRESS"
        ) from None
    if answer.status_code in (401, 403):
        raise ResourceError(f"the cluster at {address} refuses the token (HTTP {answer.status_code})")
    if answer.status_code != 200:
        raise ResourceError(f"{address} answers HTTP {answer.status_code}; is it the dashboard of a Ray cluster?")
    return address


def _token() -> str:
    """The cluster's, which Ray is then told to use; empty for a cluster without one. Raises `ResourceError`."""
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        return ""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError):
        token = ""
    if not token:
        raise ResourceError(
            f"no token for the cluster: RAY_AUTH_TOKEN is not set and {path} is missing or empty. Use the token that "
            "the cluster's head was started with; for a cluster without one: RAY_AUTH_MODE=disabled"
        )
    return token


def connect(address: str) -> JobSubmissionClient:
    """A client of the dashboard, which has answered. Raises `RunError`."""
    from ray.job_submission import JobSubmissionClient

    os.environ.pop("RAY_ADDRESS", None)  # It would come before the argument.
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # Ray's have no common type
        raise RunError(f"{address}: {' '.join(str(error).split())}") from None


def send(client: JobSubmissionClient, words: Sequence[str]) -> str:
    """Send `rlhf-dist WORDS` as a job; returns its name. Secrets of the environment stay here. Raises `RunError`."""
    folder = Path.cwd()
    environment: dict[str, Any] = {"working_dir": str(folder), "excludes": list(EXCLUDED)}
    if not PACKAGE.is_relative_to(folder):
        environment["py_modules"] = [str(PACKAGE)]
    try:
        return client.submit_job(entrypoint=f"python -m rlhf_dist {shlex.join(words)}", runtime_env=environment)
    except Exception as error:
        raise RunError(f"the cluster did not take the job: {' '.join(str(error).split())}") from None


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], object]) -> int:
    """Give the job's output to `write` until it ends; returns its exit code. Raises `RunError`."""
    try:
        asyncio.run(_tail(client, job, write))
    except KeyboardInterrupt:
        raise
    except Exception as error:  # of the network, of Ray, of the web socket
        print(f"the log of {job} is not followed any more: {error}", file=sys.stderr)
    return wait(client, job)


async def _tail(client: JobSubmissionClient, job: str, write: Callable[[str], object]) -> None:
    async for text in client.tail_job_logs(job):
        write(text)


def wait(client: JobSubmissionClient, job: str) -> int:
    """The exit code of a job, once it has ended. Raises `RunError` when the dashboard is away for too long."""
    heard = time.monotonic()
    while True:
        try:
            found = client.get_job_info(job)
        except Exception as error:
            if time.monotonic() - heard > SILENT_LIMIT_S:
                raise RunError(
                    f"the dashboard has not answered for {SILENT_LIMIT_S:g} s ({error}); ask again later with "
                    f"`ray job status {job}`"
                ) from None
        else:
            heard = time.monotonic()
            if found.status.is_terminal():
                return _code(found)
        time.sleep(POLL_S)


def _code(found: Any) -> int:
    """Of a job that ended; 1 where its process left none."""
    if found.status == "SUCCEEDED":
        return 0
    return found.driver_exit_code or 1


def stop(client: JobSubmissionClient, job: str) -> None:
    """Ask the cluster to end the job. Raises `RunError`."""
    try:
        client.stop_job(job)
    except Exception as error:
        raise RunError(f"{job} could not be stopped: {' '.join(str(error).split())}; `ray job stop {job}`") from None
