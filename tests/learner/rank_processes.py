"""Scripts of learner ranks as processes of their own, one alone and two together, and how their weights compare.

`python rank_processes.py SCRIPT FOLDER PORT PORT WORDS...` imports the script once and forks a process for each rank:
the imports take longer than much of what a rank does.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

LIMIT_S = 300.0
RANKS = ((1, 0), (2, 0), (2, 1))
"""(world size, rank)."""

Weights = dict[str, torch.Tensor]


def run_ranks(script: str, folder: Path, *words: object) -> dict[tuple[int, int], dict[Any, Any]]:
    """(world size, rank) -> what `script RANK WORLD PORT *words` left as FOLDER/WORLD-RANK.pt, side by side."""
    ports = []
    for _ in (1, 2):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            ports.append(probe.getsockname()[1])
    command = [sys.executable, __file__, script, folder, *ports, *words]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{Path(__file__).parents[1]}"}
    process = subprocess.Popen([*map(str, command)], env=environment, start_new_session=True)
    try:
        code = process.wait(LIMIT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    logs = {key: (folder / f"{key[0]}-{key[1]}.log").read_text() for key in RANKS} if code else {}
    assert code == 0, "\n".join(f"{key}: {log[-3000:]}" for key, log in logs.items() if "Traceback" in log)
    return {key: torch.load(folder / f"{key[0]}-{key[1]}.pt", weights_only=False) for key in RANKS}


def fork_ranks(script: str, folder: Path, ports: Sequence[str], words: Sequence[str]) -> int:
    """The first exit code that is not 0, at once: the other ranks would only wait for the one that failed."""
    main = importlib.import_module(Path(script).stem).main
    for world, rank in RANKS:
        if os.fork() == 0:
            sys.argv = [script, str(rank), str(world), ports[world - 1], *words]
            run_rank(main, folder / f"{world}-{rank}.log")
    for _ in RANKS:
        code = os.waitstatus_to_exitcode(os.wait()[1])
        if code:
            return code
    return 0


def run_rank(main: Any, log: Path) -> None:
    """One rank, in its own process, to its end."""
    with log.open("w", buffering=1) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            main()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)


def distance(found: Weights, expected: Weights, start: Weights) -> float:
    """Length of the difference, relative to how far `expected` has gone from `start`."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    gone = sum(float((expected[name] - start[name]).double().square().sum()) for name in expected)
    assert gone > 0
    return (apart / gone) ** 0.5


if __name__ == "__main__":
    sys.exit(abs(fork_ranks(sys.argv[1], Path(sys.argv[2]), sys.argv[3:5], sys.argv[5:])))
