"""Scripts of learner ranks as processes of their own, one alone and others together, and how their weights compare."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from forks import ForkServer

Weights = dict[str, torch.Tensor]


def run_ranks(
    forks: ForkServer, script: str, folder: Path, *words: object, worlds: Sequence[int] = (1, 2)
) -> dict[tuple[int, int], dict[Any, Any]]:
    """(world size, rank) -> what `script RANK WORLD PORT *words` left as FOLDER/WORLD-RANK.pt, side by side."""
    ports, ranks = {}, [(world, rank) for world in worlds for rank in range(world)]
    for world in worlds:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            ports[world] = probe.getsockname()[1]
    jobs = {f"{world}-{rank}": (rank, world, ports[world], *words) for world, rank in ranks}
    forks.run(Path(__file__).with_name(script), folder, jobs)
    return {key: torch.load(folder / f"{key[0]}-{key[1]}.pt", weights_only=False) for key in ranks}


def distance(found: Weights, expected: Weights, start: Weights) -> float:
    """Length of the difference, relative to how far `expected` has gone from `start`."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[name] - expected[name]).double().square().sum()) for name in expected)
    gone = sum(float((expected[name] - start[name]).double().square().sum()) for name in expected)
    assert gone > 0
    return (apart / gone) ** 0.5
