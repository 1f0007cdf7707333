"""`rlhf-dist submit`: another command as a job on a Ray cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_dist.cli import arguments
from rlhf_dist.errors import InputError, RlhfError

if TYPE_CHECKING:
    from rlhf_dist.cluster.jobs import JobSubmissionClient

COMMANDS = ("train", "sft", "reward", "prefer", "pipeline", "eval")
USAGE = "usage: rlhf-dist submit [--env NAME[=VALUE] ...] COMMAND CONFIG.yaml [key=value ...] [options of COMMAND]"
FETCH = "usage: rlhf-dist submit fetch JOB [DIRECTORY] [--limit MIB]"
LIMIT_MIB = 100
"""Of what is copied."""
RESERVED = (
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_ENABLE_K8S_TOKEN_AUTH",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
)
"""Variables that tell a job its cluster, and how it proves that it belongs there."""
HELP = f"""{USAGE}
{FETCH.replace("usage:", "      ")}

Runs COMMAND ({", ".join(COMMANDS)}) as a job on a Ray cluster, follows its output
and ends with its exit code. RAY_ADDRESS names the cluster's dashboard
(default http://127.0.0.1:8265). The folder that this is called in and the code
of this package are sent along, without .git, .venv, runs, .env and the like, and
without what a .gitignore or .rayignore names.

--env NAME=VALUE sets an environment variable for the job, and --env NAME gives it
the value that NAME has here; both may be repeated. Ray keeps a job's environment,
readable for whoever has the cluster's token: no keys or passwords in it.

The token comes from RAY_AUTH_TOKEN, from the file RAY_AUTH_TOKEN_PATH or from
~/.ray/auth_token. Other environment variables are not sent. Set secret ones, such
as WANDB_API_KEY, where the cluster's nodes start Ray. The nodes need an environment with the
libraries of rlhf-dist in PATH.

Give output= a path on a disk that the nodes share. Where output is relative, the run
directory is copied here when the job has ended, checkpoints last and {LIMIT_MIB} MiB at
most. `fetch` copies that of a job later, from any path, or with another limit.

Ctrl-C asks whether to stop the job, or only to stop following it."""


def run(argv: Sequence[str]) -> int:
    """Submit and follow; the job's exit code."""
    if argv and (argv[0] in ("-h", "--help") or argv[1:] in (["-h"], ["--help"])):
        print(HELP)
        return 0
    from rlhf_dist.cluster import jobs

    if argv and argv[0] == "fetch":
        return fetch(argv[1:])
    environment, argv = taken_environment(argv)
    words, place = checked(argv)
    before = stamp(place)
    cluster = jobs.dashboard()
    with arguments.loading():
        client = jobs.connect(cluster)
    print(f"sending {Path.cwd()} to {cluster.address} ...", file=sys.stderr, flush=True)
    job = jobs.send(client, words, str(place or ""), environment)
    print(f"submitted {job}", file=sys.stderr, flush=True)
    try:
        code = jobs.follow(cluster, client, job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        if asks_to_stop(job):
            jobs.stop(client, job)
            kept = f"; `rlhf-dist submit fetch {job}` copies its run directory" if place else ""
            print(f"{job} is told to stop{kept}", file=sys.stderr)
        raise
    print(f"{job} {'succeeded' if code == 0 else f'ended with exit code {code}'}", file=sys.stderr)
    if place and code != 2 and "--dry-run" not in words:
        hand_over(client, job, place, before)
    return code


def hand_over(client: JobSubmissionClient, job: str, place: Path, before: float) -> None:
    """Say where the run directory is, and copy it here where it is in the job's own folder."""
    from rlhf_dist.cluster import jobs

    if place.is_absolute() and stamp(place) != before:
        print(f"run directory: {place}", file=sys.stderr)
        return
    try:
        if not place.is_absolute():
            copy(client, job, place, LIMIT_MIB)
            return
        _, node = jobs.run_of(client, job)
        print(f"run directory: {place} on {node}; `rlhf-dist submit fetch {job}` copies it here", file=sys.stderr)
    except RlhfError as error:
        print(f"the run directory of {job} was not copied: {error}", file=sys.stderr)


def copy(client: JobSubmissionClient, job: str, target: Path, limit_mib: int) -> None:
    """Copy a job's run directory, beside one that is there. Raises `RlhfError`."""
    from rlhf_dist.cluster import jobs

    if target.exists():
        first, target = target, target.with_name(f"{target.name}.{job}")
        if target.exists():
            raise InputError(f"{first} and {target} exist; name a directory that is to be made; {FETCH}")
    found = jobs.bring(client, job, target, limit_mib * 2**20)
    print(f"run directory: {target}, a copy of {found.source} on the cluster", file=sys.stderr)
    for offline in sorted(target.glob("wandb/offline-run-*")):
        print(f"its wandb run is offline; `wandb sync {offline}` uploads the copy", file=sys.stderr)
    if found.left:
        size = sum(size for _, size in found.left) / 2**20
        print(
            f"left there: {len(found.left)} files of {size:.0f} MiB, as {found.left[-1][0]}; to copy all: "
            f"rlhf-dist submit fetch {job} DIRECTORY --limit {ceil(size) + limit_mib}",
            file=sys.stderr,
        )


def stamp(place: Path | None) -> float:
    """When the run that is at the place here ended; 0 where there is none."""
    try:
        return (place / "summary.json").stat().st_mtime if place else 0.0
    except OSError:
        return 0.0


def fetch(words: Sequence[str]) -> int:
    """`submit fetch`. Raises `RlhfError`."""
    from rlhf_dist.cluster import jobs

    limit, rest = LIMIT_MIB, list(words)
    if "--limit" in rest:
        at = rest.index("--limit")
        if not rest[at + 1 : at + 2] or not rest[at + 1].isdecimal() or int(rest[at + 1]) == 0:
            raise InputError(f"--limit needs a number of MiB above 0; {FETCH}")
        limit = int(rest[at + 1])
        del rest[at : at + 2]
    if len(rest) not in (1, 2) or any(word.startswith("-") for word in rest):
        raise InputError(f"name a job; {FETCH}")
    if rest[1:] and Path(rest[1]).exists():
        raise InputError(f"{rest[1]} exists; name a directory that is to be made")
    cluster = jobs.dashboard()
    with arguments.loading():
        client = jobs.connect(cluster)
    run, _ = jobs.run_of(client, rest[0])
    if jobs.still_runs(client, rest[0]):
        print(f"{rest[0]} still runs; this copies what it has written so far", file=sys.stderr)
    copy(client, rest[0], Path(rest[1] if rest[1:] else Path(run).name), limit)
    return 0


def taken_environment(argv: Sequence[str]) -> tuple[dict[str, str], Sequence[str]]:
    """The job's variables, by each `--env` before the command, and the words after them.

    Raises `InputError`, whose message has no value: it may be a secret.
    """
    found: dict[str, str] = {}
    rest = [part for word in argv for part in (word.split("=", 1) if word.startswith("--env=") else [word])]
    while rest and rest[0] == "--env":
        name, given, value = rest[1].partition("=") if rest[1:] else ("", "", "")
        if not (name.isidentifier() and name.isascii()):
            raise InputError(f"--env needs NAME or NAME=VALUE, as in --env HF_HOME=/shared/hub; {USAGE}")
        if name in RESERVED:
            raise InputError(f"--env {name}: a job gets it from its cluster; leave it out")
        if name in found:
            raise InputError(f"--env {name}: it is given twice; give it once")
        if not given and name not in os.environ:
            raise InputError(f"--env {name}: it is not set here; set it, or give the value: --env {name}=VALUE")
        found[name] = value if given else os.environ[name]
        if not can_be_set(found[name]):
            raise InputError(
                f"--env {name}: its value is not text: it has a NUL character, or bytes that are not UTF-8"
            )
        del rest[:2]
    if "--env" in rest:
        raise InputError(f"--env comes before the command; {USAGE}")
    if found and rest[:1] and rest[0] not in COMMANDS:
        raise InputError(f"after --env NAME=VALUE comes a command: {', '.join(COMMANDS)}; {USAGE}")
    return found, rest


def can_be_set(value: str) -> bool:
    """Whether an environment variable can have this value, and a message can carry it there."""
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def checked(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """The words of the job and its run directory, after what can be known to be wrong here. Raises `InputError`."""
    if not argv or argv[0] not in COMMANDS:
        what = f"`{argv[0]}` is not a command for a cluster: {', '.join(COMMANDS)} are; " if argv else ""
        raise InputError(f"{what}{USAGE}")
    if not argv[1:] or argv[1].startswith("-") or arguments.is_override(argv[1]):
        raise InputError(f"{argv[0]} needs a config file first; {USAGE}")
    command, path, *rest = argv
    config = Path(path)
    if Path.cwd() == Path.home():
        raise InputError(
            f"{Path.cwd()} is your home, and the folder that submit is called in is sent: call it in another"
        )
    overrides = [word for word in rest if not word.startswith("--") and "=" in word]
    place = sent_as(config) if config.is_file() else config
    run = require_known_keys(command, config, overrides)
    from rlhf_dist.config.load import files_of

    for file in files_of(config):
        sent_as(file)
    return [command, str(place), *rest], None if command == "eval" else run


def sent_as(config: Path) -> Path:
    """Where a config is in the folder that is sent. Raises `InputError` where it is not sent."""
    if not config.resolve().is_relative_to(Path.cwd()):
        raise InputError(
            f"{config}: lies outside {Path.cwd()}, which is the folder that is sent; call submit elsewhere"
        )
    place = config.resolve().relative_to(Path.cwd())
    from rlhf_dist.cluster.job_folder import left_out

    if why := left_out(Path.cwd(), place):
        raise InputError(f"{config}: {why}; put the config elsewhere")
    return place


def require_known_keys(command: str, config: Path, overrides: Sequence[str]) -> Path:
    """Load the config, so that a wrong key costs no job; returns its run directory, as the job sees it."""
    from rlhf_dist.config.load import as_written

    stages = command == "pipeline"
    given = [word for word in overrides if ":" not in word.partition("=")[0]] if stages else overrides
    found = as_written(config, given)
    if found.output.startswith("~"):
        raise InputError(
            f"output is {found.output!r}: the home would be the one of the cluster's user, whom this machine does not "
            "know; give an absolute path, or a relative one, whose run directory is copied here"
        )
    if stages:
        from rlhf_dist.config.pipeline_checks import load_stages

        return load_stages(config, overrides)[0].path.parent
    return Path(found.output) / found.name


def asks_to_stop(job: str) -> bool:
    """Whether the user wants the job to end too; without a terminal it goes on."""
    from rlhf_dist.cluster.jobs import by_hand

    print(f"\n{job} goes on; {by_hand('stop', job)} ends it, {by_hand('logs --follow', job)} shows it", file=sys.stderr)
    if not sys.stdin.isatty():
        return False
    try:
        return input("stop it now? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False
