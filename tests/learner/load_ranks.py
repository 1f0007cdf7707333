"""One of two ranks that load a model under ZeRO-3: `python load_ranks.py RANK WORLD PORT MODEL SMALL FOLDER`.

Leaves `WORLD-RANK.pt`: the memory that it took, and the weights that the two of them hold.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlhf_dist.config.schema import LearnerConfig, ModelConfig, OptimizerConfig
from rlhf_dist.learner import model_engine
from rlhf_dist.learner.deepspeed_engine import init_process_group
from rlhf_dist.learner.model_engine import ModelEngine
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


def start(model: Path, world: int) -> tuple[ModelEngine, dict[str, int]]:
    """An engine, and of its loading the memory that it took at most and how many weights the rank has after it."""
    measured: dict[str, int] = {}

    def load(*args: Any) -> Any:
        measured["taken"], loaded = most_taken(lambda: load_model(*args))
        measured["held"] = sum(parameter.ds_tensor.numel() for parameter in loaded.parameters())
        return loaded

    model_engine.load_model = load
    learner = LearnerConfig(ranks=world, zero_stage=3)
    settings = ModelConfig(dtype="float32", attention="segmented")
    return ModelEngine(model, settings, learner, OptimizerConfig(), device="cpu", bucket_mib=1), measured


def main() -> None:
    rank, world, port = (int(word) for word in sys.argv[1:4])
    model, small, folder = (Path(word) for word in sys.argv[4:7])
    init_process_group(rank, world, "127.0.0.1", port, device="cpu", threads=1, timeout_s=120.0)
    start(small, world)[0].close()  # what is made at the first time only
    engine, measured = start(model, world)
    weights = {name: tensor.clone() for name, tensor in engine.weights()}
    torch.save(measured | {"weights": weights}, folder / f"{world}-{rank}.pt")
    engine.close()


if __name__ == "__main__":
    main()
