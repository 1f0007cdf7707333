"""`rlhf-dist submit`: another command as a job on a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_dist.cli import arguments
from rlhf_dist.errors import InputError

COMMANDS = ("train", "sft", "reward", "pipeline", "eval")
USAGE = "usage: rlhf-dist submit COMMAND CONFIG.yaml [key=value ...] [options of COMMAND]"
HELP = f"""{USAGE}

Runs COMMAND ({", ".join(COMMANDS)}) as a job on a Ray cluster, follows its output
and ends with its exit code. RAY_ADDRESS names the cluster's dashboard
(default http://127.0.0.1:8265). The folder that this is called in and the code
of this package are sent along, without .git, .venv, runs, .env and the like.

The token comes from RAY_AUTH_TOKEN, from the file RAY_AUTH_TOKEN_PATH or from
~/.ray/auth_token. Environment variables such as WANDB_API_KEY are not sent: set
them where the cluster's nodes start Ray. The nodes need an environment with the
libraries of rlhf-dist in PATH, and output= has to be on a disk that they share.

Ctrl-C asks whether to stop the job, or only to stop following it."""


def run(argv: Sequence[str]) -> int:
    """Submit and follow; the job's exit code."""
    if argv and argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    words = checked(argv)
    from rlhf_dist.cluster import jobs

    cluster = jobs.dashboard()
    with arguments.loading():
        client = jobs.connect(cluster)
    job = jobs.send(client, words)
    print(f"submitted {job} to {cluster.address}", file=sys.stderr, flush=True)
    try:
        code = jobs.follow(cluster, client, job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        if asks_to_stop(job):
            jobs.stop(client, job)
        raise
    print(f"{job} {'succeeded' if code == 0 else f'ended with exit code {code}'}", file=sys.stderr)
    return code


def checked(argv: Sequence[str]) -> list[str]:
    """The words of the job, after what can be known to be wrong here. Raises `InputError`."""
    if len(argv) < 2 or argv[0] not in COMMANDS:
        what = f"`{argv[0]}` is not a command for a cluster: {', '.join(COMMANDS)} are; " if argv else ""
        raise InputError(f"{what}{USAGE}")
    command, path, *rest = argv
    config = Path(path)
    if not config.is_file():
        raise InputError(f"{path}: there is no such config; {USAGE}")
    if Path.cwd() == Path.home():
        raise InputError(
            f"{Path.cwd()} is your home, and the folder that submit is called in is sent: call it in another"
        )
    if not config.resolve().is_relative_to(Path.cwd()):
        raise InputError(f"{path}: lies outside {Path.cwd()}, which is the folder that is sent; call submit elsewhere")
    overrides = [word for word in rest if not word.startswith("--") and "=" in word]
    place = config.resolve().relative_to(Path.cwd())
    from rlhf_dist.cluster.jobs import EXCLUDED

    if excluded := next((name for name in EXCLUDED if place.is_relative_to(name)), None):
        raise InputError(f"{path}: lies in {excluded}, which is not sent; put the config elsewhere")
    output = require_known_keys(command, config, overrides)
    if not Path(output).is_absolute():
        print(
            f"note: output is {output}: the run directory lies in the job's own copy of this folder, which Ray removes "
            "later. Give output= a path that the nodes share to keep it",
            file=sys.stderr,
        )
    return [command, str(place), *rest]


def require_known_keys(command: str, config: Path, overrides: Sequence[str]) -> str:
    """Load the config, so that a wrong key costs no job; returns `output`. Files are looked at on the cluster."""
    if command == "pipeline":
        from rlhf_dist.config.pipeline_checks import load_stages

        return load_stages(config, overrides)[0].config.output
    from rlhf_dist.config.load import load

    return load(config, overrides).output


def asks_to_stop(job: str) -> bool:
    """Whether the user wants the job to end too; without a terminal it goes on."""
    print(f"\n{job} goes on; `ray job stop {job}` ends it", file=sys.stderr)
    if not sys.stdin.isatty():
        return False
    try:
        return input("stop it now? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False
