"""One of two ranks that load a model under ZeRO-3: `python load_ranks.py RANK WORLD PORT MODEL SMALL FOLDER`.

Leaves `WORLD-RANK.pt`: the memory that it took, and the weights that the two of them hold.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch

from rlhf_dist.learner.deepspeed_engine import init_process_group, zero_scatter
from rlhf_dist.models.hf import load_model


def anonymous_bytes() -> int:
    """Of this process's memory, what no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def most_taken(work: Callable[[], Any]) -> tuple[int, Any]:
    """(bytes by which this process's memory grew at most meanwhile, what was made)."""
    before, most, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = work()
    done.set()
    watcher.join()
    return max(most[0], anonymous_bytes()) - before, found


def main() -> None:
    rank, world, port = (int(word) for word in sys.argv[1:4])
    model, small, folder = (Path(word) for word in sys.argv[4:7])
    init_process_group(rank, world, "127.0.0.1", port, device="cpu", threads=1, timeout_s=120.0)
    scatter = zero_scatter(3, "float32", 1.0)
    load_model(small, "float32", "segmented", scatter)  # what is made at the first time only
    taken, loaded = most_taken(lambda: load_model(model, "float32", "segmented", scatter))
    held = sum(parameter.ds_tensor.numel() for parameter in loaded.parameters())
    weights = {}
    for name, parameter in loaded.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    torch.save({"taken": taken, "held": held, "weights": weights}, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main()
