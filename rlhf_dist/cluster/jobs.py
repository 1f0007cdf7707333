"""A command as a job on a Ray cluster: sent with this package's code and the folder that it is called in.

Ray's dashboard at RAY_ADDRESS takes the job. The token is RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH or
~/.ray/auth_token; RAY_AUTH_MODE=disabled is for a cluster without one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from rlhf_dist.cluster.job_files import Arrived, unpack
from rlhf_dist.cluster.job_folder import EXCLUDED
from rlhf_dist.errors import InputError, ResourceError, RunError
from rlhf_dist.telemetry.code_version import COMMIT, code_version

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

T = TypeVar("T")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
PACKAGE = Path(__file__).resolve().parents[1]
ANSWER_LIMIT_S = 10.0
"""For the dashboard's first answer."""
ASK_LIMIT_S = 60.0
"""For an answer of Ray's client."""
SEND_LIMIT_S = 600.0
"""For a job, whose folder is packed and sent."""
POLL_S = 2.0
LOG_LIMIT_S = 10.0
"""For the rest of the log of a job that has ended."""
TOO_LARGE = ("status code 413", "exceeds the maximum size")
"""What Ray's dashboard and its client say of a folder that is."""
RUN = "rlhf-dist-run"
"""In a job's metadata: its run directory."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOP_WAIT, STOP_WAIT_S = "RAY_JOB_STOP_WAIT_TIME_S", "180"
"""How long Ray lets a job that is told to stop end by itself; without it 3 s, in which no run is saved."""
SILENT_LIMIT_S = 300.0
"""How long the dashboard may be away while a job runs."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """One that takes jobs."""

    address: str
    """Of its dashboard."""
    headers: Mapping[str, str]
    """With the token, if there is one."""


def dashboard() -> Cluster:
    """The cluster at RAY_ADDRESS, whose dashboard answers and accepts the token. Raises `ResourceError`."""
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
        raise ResourceError(
            f"the cluster at {address} refuses the token (HTTP {answer.status_code}); use the one that its head was "
            "started with, in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        )
    if answer.status_code != 200:
        raise ResourceError(f"{address} answers HTTP {answer.status_code}; is it the dashboard of a Ray cluster?")
    return Cluster(address, headers)


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


def connect(cluster: Cluster) -> JobSubmissionClient:
    """A client of its dashboard. Raises `RunError`."""
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)  # else a dozen lines of what is packed and sent
    os.environ.pop("RAY_ADDRESS", None)  # It would come before the argument.
    return _within(ASK_LIMIT_S, lambda: JobSubmissionClient(cluster.address), f"{cluster.address} takes no jobs")


def send(client: JobSubmissionClient, words: Sequence[str], run: str, variables: Mapping[str, str]) -> str:
    """Send `rlhf-dist WORDS` as a job; returns its name.

    `run`: the run directory that it will make, as the job sees it; empty: none. `variables`: of its environment, in
    which nothing else of the environment here is. Raises `RunError`, and `InputError` where the folder is too large.
    """
    folder = Path.cwd()
    environment: dict[str, Any] = {"working_dir": str(folder), "excludes": list(EXCLUDED)}
    if PACKAGE.parent != folder:
        environment["py_modules"] = [str(PACKAGE)]
    commit = code_version().get("commit")  # .git stays here
    environment["env_vars"] = {STOP_WAIT: STOP_WAIT_S} | ({COMMIT: commit} if commit else {}) | dict(variables)
    entrypoint = f"python -m rlhf_dist {shlex.join(words)}"
    call = partial(client.submit_job, entrypoint=entrypoint, runtime_env=environment, metadata={RUN: run})
    try:
        return _within(SEND_LIMIT_S, call, "the cluster did not take the job")
    except RunError as error:
        if any(text in str(error) for text in TOO_LARGE):
            raise InputError(
                f"{folder} is too large to be sent, packed 100 MiB at most: call submit in a smaller folder, keep "
                f"large files elsewhere, or name them in .gitignore ({error})"
            ) from None
        raise


def run_of(client: JobSubmissionClient, job: str) -> tuple[str, str]:
    """The run directory of a job that `send` sent, and the address of the node that it ran on.

    Raises `InputError` where there is no such job, or it makes none, and `RunError`.
    """
    found = _within(ASK_LIMIT_S, lambda: {each.submission_id: each for each in client.list_jobs()}, "no list of jobs")
    if job not in found:
        raise InputError(f"{job}: the cluster has no such job; {by_hand('list')} shows those it has")
    run = (found[job].metadata or {}).get(RUN, "")
    if not run:
        raise InputError(f"{job} leaves no run directory, or was not sent by `rlhf-dist submit`")
    driver = found[job].driver_info
    return run, driver.node_ip_address if driver else ""


def still_runs(client: JobSubmissionClient, job: str) -> bool:
    """Whether it has not ended. Raises `RunError`."""
    return _within(ASK_LIMIT_S, partial(client.get_job_status, job), f"{job} is not known") not in ENDED


def bring(client: JobSubmissionClient, job: str, target: Path, limit: int) -> Arrived:
    """Copy the run directory of `job` to `target`, `limit` bytes at most, by a job in the same folder.

    Raises `RunError`.
    """
    run, _ = run_of(client, job)
    info = _within(ASK_LIMIT_S, partial(client.get_job_info, job), f"{job} is not known")
    entrypoint = f"python -m rlhf_dist.cluster.job_files {shlex.quote(run)} {limit}"
    call = partial(client.submit_job, entrypoint=entrypoint, runtime_env=info.runtime_env or {})
    carrier = _within(ASK_LIMIT_S, call, "the cluster does not send the files")
    end = time.monotonic() + SEND_LIMIT_S
    while (status := _within(ASK_LIMIT_S, partial(client.get_job_status, carrier), f"{carrier} is lost")) not in ENDED:
        if time.monotonic() > end:
            stop(client, carrier)
            raise RunError(f"{carrier} did not send the files of {run} in {SEND_LIMIT_S:g} s; it is {status}")
        time.sleep(POLL_S / 4)
    return unpack(_within(SEND_LIMIT_S, partial(client.get_job_logs, carrier), f"no log of {carrier}"), target)


def follow(cluster: Cluster, client: JobSubmissionClient, job: str, write: Callable[[str], object]) -> int:
    """Give the job's output to `write` until it ends; returns its exit code, 1 where it left none.

    Raises `RunError` when the dashboard is away for too long.
    """
    return asyncio.run(_follow(cluster, client, job, write))


async def _follow(cluster: Cluster, client: JobSubmissionClient, job: str, write: Callable[[str], object]) -> int:
    """The log comes over a web socket, which may stay open to a head that is gone: so the job is asked for too."""
    tail, heard, told = asyncio.create_task(_tail(client, job, write)), time.monotonic(), False
    async with httpx.AsyncClient(headers=cluster.headers, timeout=ANSWER_LIMIT_S) as web:
        while True:
            try:
                found = (await web.get(f"{cluster.address}/api/jobs/{job}")).raise_for_status().json()
            except (httpx.HTTPError, ValueError) as error:
                if time.monotonic() - heard > SILENT_LIMIT_S:
                    tail.cancel()
                    raise RunError(
                        f"the dashboard has not answered for {SILENT_LIMIT_S:g} s ({error}); the job may go on: "
                        f"ask again with {by_hand('status', job)}"
                    ) from None
            else:
                heard = time.monotonic()
                if found["status"] in ENDED:
                    await asyncio.wait({tail}, timeout=LOG_LIMIT_S)
                    tail.cancel()
                    return 0 if found["status"] == "SUCCEEDED" else found.get("driver_exit_code") or 1
            failed = tail.exception() if tail.done() else None
            if failed is not None and not told:
                told = True
                print(f"the log of {job} is not followed any more: {failed}", file=sys.stderr)
            await asyncio.sleep(POLL_S)


async def _tail(client: JobSubmissionClient, job: str, write: Callable[[str], object]) -> None:
    async for text in client.tail_job_logs(job):
        write(text)


def stop(client: JobSubmissionClient, job: str) -> None:
    """Ask the cluster to end the job. Raises `RunError`."""
    _within(ASK_LIMIT_S, partial(client.stop_job, job), f"{job} was not stopped (try {by_hand('stop', job)})")


def by_hand(verb: str, job: str = "") -> str:
    """Ray's own command, as it has to be written in a shell whose variables name the cluster and perhaps the token."""
    words = ["RAY_AUTH_MODE=token"] if os.environ.get("RAY_AUTH_MODE", "token") == "token" else []
    return f"`{' '.join([*words, 'ray job', verb, *([job] if job else [])])}`"


def _within(limit_s: float, call: Callable[[], T], failed: str) -> T:
    """What a call of Ray's client gives, which itself has no limit. Raises `RunError` that begins with `failed`."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(call())
        except Exception as error:  # Ray's have no common type
            found.set_exception(error)

    threading.Thread(target=run, daemon=True, name="job").start()
    try:
        return found.result(limit_s)
    except TimeoutError:
        raise RunError(f"{failed}: no answer in {limit_s:g} s") from None
    except Exception as error:
        raise RunError(f"{failed}: {' '.join(str(error).split())}") from None
