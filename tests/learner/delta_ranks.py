"""One learner rank in a process of its own: `python delta_ranks.py RANK WORLD PORT MODEL FOLDER`.

Trains in bfloat16 under ZeRO 1, 2 and 3 and publishes by changed words. Rank 0 is the other node too: it fetches each
version over a socket, and what lies there is compared with the learner's weights. `WORLD-RANK.pt` has what was found.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_dist.config.schema import LearnerConfig, ModelConfig, OptimizerConfig
from rlhf_dist.errors import WeightSyncError
from rlhf_dist.learner.deepspeed_engine import init_process_group
from rlhf_dist.learner.micro_batch_rows import pack_rows, response_row
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.relay import Fetch, Offer
from rlhf_dist.weights.shared_memory import WeightReader

HERE, SECRET = "127.0.0.1", b"of this test"
WARM, SMALL, LARGE = 1e-4, 1e-7, 1e-2
"""Learning rates: at the last nearly every word changes."""
MANY = 100
"""Pushes of one rank under ZeRO 1."""


class Learner:
    """A rank and, on rank 0, the relays."""

    def __init__(self, model: Path, stage: int, world: int) -> None:
        config = LearnerConfig(ranks=world, zero_stage=stage, delta_push=True)
        optimizer = OptimizerConfig(warmup_steps=0)
        self.engine = ModelEngine(model, ModelConfig(dtype="bfloat16"), config, optimizer, device="cpu", bucket_mib=1)
        self.offer, self.node = Offer(HERE, SECRET, timeout_s=20.0), Fetch(SECRET, timeout_s=20.0)
        self._chance = np.random.default_rng(self.engine.rank)
        self.version = 0

    def train(self, rate: float) -> None:
        """A step on random tokens, others on every rank."""
        tokens = self._chance.integers(3, 60, size=40).tolist()
        logprobs = self.engine.logprobs(pack_rows([response_row(tokens[:5], tokens[5:])], torch.device("cpu")), 1.0)
        self.engine.backward(-logprobs.mean(), last=True)
        self.engine.step(rate)

    def push(self) -> dict[str, Any]:
        """Publish, and on rank 0 fetch and compare."""
        self.version += 1
        announcement = self.engine.publish(self.version)
        weights = [(name, tensor.clone()) for name, tensor in self.engine.weights()]
        if announcement is None:
            return {}
        self.offer.offer(announcement)
        found = self.node.fetch(announcement, self.offer.address)
        changes = announcement.changes
        return {
            "learner": same(weights, announcement),
            "node": same(weights, found),
            "share": None if changes is None else changes.nbytes / announcement.plan.nbytes,
        }

    def close(self) -> None:
        self.offer.close()
        self.node.close()
        self.engine.close()


def same(weights: list[tuple[str, torch.Tensor]], announcement: Announcement) -> bool:
    """Bit for bit."""
    with closing(WeightReader().take(announcement)) as lease:
        pairs = zip(weights, lease.tensors(), strict=True)
        return all(a == b and torch.equal(x.view(torch.int16), y.view(torch.int16)) for (a, x), (b, y) in pairs)


def run_stage(learner: Learner, pushes: int) -> dict[str, Any]:
    """Pushes at small and large rates, of several steps at once, and one that moved nothing."""
    found: dict[str, Any] = {}
    for _ in range(3):
        learner.train(WARM)
    found["first"] = learner.push()
    found["small"] = []
    for _ in range(pushes):
        learner.train(SMALL)
        found["small"].append(learner.push())
    for _ in range(4):
        learner.train(SMALL)
    found["four steps"] = learner.push()
    found["not moved"] = learner.push()
    learner.train(LARGE)
    found["large"] = learner.push()
    learner.train(SMALL)
    found["after it"] = learner.push()
    return found


def missed(learner: Learner) -> str:
    """What is said of a word that changes behind the marks: at the latest when its bucket's turn comes."""
    with torch.no_grad():
        for _, parameter in learner.engine._deepspeed._engine.module.named_parameters():
            if parameter.numel():
                parameter.view(-1)[0] = 3.0
    try:
        for _ in range(len(learner.engine._publication._plan.buckets)):
            learner.engine._publication.moved = True
            learner.push()
    except WeightSyncError as error:
        return str(error)
    return ""


def main() -> None:
    rank, world, port = map(int, sys.argv[1:4])
    model, folder = map(Path, sys.argv[4:])
    init_process_group(rank, world, HERE, port, device="cpu", threads=1, timeout_s=60.0)
    found: dict[Any, Any] = {}
    for stage in (1, 2, 3):
        learner = Learner(model, stage, world)
        with closing(learner):
            found[stage] = run_stage(learner, MANY if (stage, world) == (1, 1) else 5)
            if (stage, world) == (1, 1):
                found["missed"] = missed(learner)
    torch.save(found, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main()
