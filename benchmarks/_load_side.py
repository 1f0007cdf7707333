"""The processes of `bench load`: `learner CONFIG.yaml` or `engine CONFIG.yaml`. For each line of input a line of JSON.

The learner writes its weights to shared memory once more and says where; an engine loads what it is told of.
"""

from __future__ import annotations

import base64
import json
import pickle
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlhf_dist.config.load import from_yaml
from rlhf_dist.config.schema import Config
from rlhf_dist.models.hf import load_model
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.receipts import Announcement, receipt_problem
from rlhf_dist.weights.shared_memory import WeightWriter

TRIES = 5
COPIES, PARTS = 4, 8
"""Of all bytes, by an engine after each load, which takes about as long; with memory for a part of them."""


def learner(config: Config) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Publishes: seconds, the announcement, and seconds of one copy of as many bytes."""
    model = load_model(Path(config.model.path), config.model.dtype, "sdpa")
    tensors = [(name, tensor.detach()) for name, tensor in model.named_parameters()]
    shapes = [(name, tuple(tensor.shape), config.model.dtype) for name, tensor in tensors]
    writer = WeightWriter(make_plan(shapes, config.weights.bucket_mib * 2**20))
    source, target = touched(writer.plan.nbytes), touched(writer.plan.nbytes)

    def push(told: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            for _, tensor in tensors:
                tensor.mul_(1.01)  # every bucket moves
        copies = []
        for _ in range(TRIES):
            begun = time.perf_counter()
            target.copy_(source)
            copies.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        announcement = writer.write(told["version"], tensors)
        return {
            "publish_s": time.perf_counter() - begun,
            "copy_s": min(copies),
            "bytes": writer.plan.nbytes,
            "announcement": base64.b64encode(pickle.dumps(announcement)).decode(),
        }

    return push


def touched(nbytes: int) -> torch.Tensor:
    """Memory of its own: what was never written is one page of zeros, which is read from the processor's cache."""
    return torch.ones(nbytes, dtype=torch.uint8)


def engine(config: Config) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Loads: seconds, and CPU seconds of the process; the same of as many plain copies. The receipt has to be right."""
    from rlhf_dist.rollout.vllm_engine import VllmEngine

    made = VllmEngine(
        Path(config.model.path),
        config.rollout,
        dtype=config.model.dtype,
        device="cpu",
        threads=config.rollout.cpus,
        name="rollout worker",
        chat=False,
    )

    memory: tuple[torch.Tensor, torch.Tensor] | None = None

    def load(told: dict[str, Any]) -> dict[str, Any]:
        announcement: Announcement = pickle.loads(base64.b64decode(told["announcement"]))
        torch.set_num_threads(told["threads"])
        before, begun = cpu_s(), time.perf_counter()
        receipt = made.load_weights(announcement)
        found = {"load_s": time.perf_counter() - begun, "cpu_s": cpu_s() - before}
        assert receipt_problem(announcement, receipt) is None
        nonlocal memory
        part = announcement.plan.nbytes // PARTS
        memory = memory or (touched(part), touched(part))
        before = cpu_s()
        for _ in range(COPIES * PARTS):
            memory[0].copy_(memory[1])
        return found | {"copies_cpu_s": cpu_s() - before}

    return load


def cpu_s() -> float:
    """CPU seconds of this process so far, those in the kernel too."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    kind, path = sys.argv[1:]
    answer = {"learner": learner, "engine": engine}[kind](from_yaml(Path(path).read_text(encoding="utf-8")))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
