"""The processes of `bench load`: `learner CONFIG.yaml` or `engine CONFIG.yaml`. For each line of input a line of JSON.

The learner publishes its weights once more and says how they are to be had, and with an empty line sends them where
that is by sending; an engine loads what it is told of.
"""

from __future__ import annotations

import base64
import json
import pickle
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from rlhf_dist.config.load import from_yaml
from rlhf_dist.config.schema import Config, WeightsConfig
from rlhf_dist.learner.deepspeed_engine import LOOPBACK
from rlhf_dist.learner.direct_publication import DirectPublication
from rlhf_dist.models.hf import load_model
from rlhf_dist.weights.buckets import WeightPlan, make_plan
from rlhf_dist.weights.receipts import Announcement, MeetingPoint, Round, receipt_problem
from rlhf_dist.weights.shared_memory import WeightWriter

TRIES = 5
COPIES, PARTS = 4, 8
"""Of all bytes, by an engine after each load, which takes about as long; with memory for a part of them."""


def learner(config: Config) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Publishes: seconds, the announcement, and seconds of one copy of as many bytes."""
    model = load_model(Path(config.model.path), config.model.dtype, "sdpa")
    tensors = [(name, tensor.detach()) for name, tensor in model.named_parameters()]
    shapes = [(name, tuple(tensor.shape), config.model.dtype) for name, tensor in tensors]
    plan = make_plan(shapes, config.weights.bucket_mib * 2**20)
    shared = config.weights.transport == "shared_memory"
    end = WeightWriter(plan) if shared else Sender(config.weights, plan, tensors)
    source, target = touched(plan.nbytes).numpy(), touched(plan.nbytes).numpy()

    def push(told: dict[str, Any]) -> dict[str, Any]:
        if not told:
            return {"problem": end.send() if isinstance(end, Sender) else ""}
        with torch.no_grad():
            for _, tensor in tensors:
                tensor.mul_(1.01)  # every bucket moves
        copies = []
        for _ in range(TRIES):
            begun = time.perf_counter()
            target[:] = source  # numpy's memcpy has one thread, whatever torch has
            copies.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        announcement = end.write(told["version"], tensors)
        publish_s = time.perf_counter() - begun
        announcements = [announcement] * told["engines"]
        if isinstance(end, Sender):
            announcements = end.rounds(announcement, told["engines"])
        return {
            "publish_s": publish_s,
            "copy_s": min(copies),
            "bytes": plan.nbytes,
            "announcements": [base64.b64encode(pickle.dumps(one)).decode() for one in announcements],
        }

    return push


def touched(nbytes: int) -> torch.Tensor:
    """Memory of its own: what was never written is one page of zeros, which is read from the processor's cache."""
    return torch.ones(nbytes, dtype=torch.uint8)


@dataclass
class OneRank:
    """What a publication asks of DeepSpeed, for a learner of one rank."""

    rank: int = 0
    zero_stage: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def of_all_ranks(self, mine: Any) -> list[Any]:
        """There is no other."""
        return [mine]


class Sender:
    """Sends weights straight to the engines."""

    def __init__(self, weights: WeightsConfig, plan: WeightPlan, tensors: list[tuple[str, torch.Tensor]]) -> None:
        assert weights.transport != "shared_memory"
        meeting = MeetingPoint((LOOPBACK, 0), weights.transport, weights.timeout_s)
        engine: Any = OneRank()
        self._publication = DirectPublication(engine, lambda _: iter(tensors), plan, meeting, shared=False)
        self._made: Round | None = None

    def write(self, version: int, tensors: object) -> Announcement:
        """Hash what is to be sent."""
        self._publication.moved = True
        found = self._publication.publish(version)
        assert found is not None
        return found

    def rounds(self, announcement: Announcement, engines: int) -> list[Announcement]:
        """For each engine; they connect anew when there are more or fewer."""
        last, number, meeting = self._made, announcement.version, announcement.meeting
        names = tuple(f"engine {index}" for index in range(engines))
        group = last.group if last is not None and last.engines == names else number
        assert meeting is not None
        self._made = Round(number, group, number, meeting, names)
        return [replace(announcement, round=replace(self._made, first=1 + index)) for index in range(engines)]

    def send(self) -> str:
        """The round; what went wrong, if something did."""
        assert self._made is not None
        return self._publication.send(self._made).problem


def engine(config: Config) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Loads: seconds, CPU seconds, the kernel's of them, page faults; CPU seconds of as many plain copies.

    The receipt has to be right.
    """
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
        before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        receipt = made.load_weights(announcement)
        load_s, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
        user_s, kernel_s = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
        faults = after.ru_minflt - before.ru_minflt
        found = {"load_s": load_s, "cpu_s": user_s + kernel_s, "kernel_s": kernel_s, "faults": faults}
        assert receipt_problem(announcement, receipt) is None
        nonlocal memory
        part = announcement.plan.nbytes // PARTS
        memory = memory or (touched(part), touched(part))
        copying = cpu_s()
        for _ in range(COPIES * PARTS):
            memory[0].copy_(memory[1])
        return found | {"copies_cpu_s": cpu_s() - copying, "rss_mib": rss_mib()}

    return load


def cpu_s() -> float:
    """CPU seconds of this process so far, those in the kernel too."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rss_mib() -> int:
    """MiB of memory that this process has touched and not given back, shared memory apart."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("\nRssAnon:")[1].split()[0]) // 1024


def main() -> None:
    """An engine in a thread, as a rollout worker's: the C library gives threads their memory in another way."""
    kind, path = sys.argv[1:]
    if kind == "learner":
        serve(kind, path)
    else:
        thread = Thread(target=serve, args=(kind, path))
        thread.start()
        thread.join()


def serve(kind: str, path: str) -> None:
    """Answer until there are no more questions."""
    answer = {"learner": learner, "engine": engine}[kind](from_yaml(Path(path).read_text(encoding="utf-8")))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
