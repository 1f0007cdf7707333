"""Scripts of learner ranks as processes of their own, one alone and two together, and how their weights compare."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

LIMIT_S = 300.0

Weights = dict[str, torch.Tensor]


def run_ranks(script: str, folder: Path, *words: object) -> dict[tuple[int, int], dict[Any, Any]]:
    """(world size, rank) -> what `script RANK WORLD PORT *words` left as FOLDER/WORLD-RANK.pt, side by side."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    processes = {}
    for world in (1, 2):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        for rank in range(world):
            command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, (rank, world, port, *words))]
            with open(folder / f"{world}-{rank}.log", "w") as log:
                processes[world, rank] = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
    try:
        for (world, rank), process in processes.items():
            assert process.wait(LIMIT_S) == 0, (folder / f"{world}-{rank}.log").read_text()[-3000:]
    finally:
        for process in processes.values():
            process.kill()
            process.wait(30)
    return {key: torch.load(folder / f"{key[0]}-{key[1]}.pt", weights_only=False) for key in processes}


def distance(found: Weights, expected: Weights, start: Weights) -> float:
    """Length of the difference, relative to how far `expected` has gone from `start`."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    gone = sum(float((expected[name] - start[name]).double().square().sum()) for name in expected)
    assert gone > 0
    return (apart / gone) ** 0.5
