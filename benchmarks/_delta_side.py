"""The learner of `bench delta` in a process of its own: CONFIG.yaml TRAIN WARMUP STEPS. Its last line is JSON.

The model of the canonical work learns to reverse its prompts in bfloat16, first at a rate that shapes it. Then, rate by
rate, each measured step is published twice: by the words that changed, and whole, each to a node of its own.
"""

from __future__ import annotations

import json
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from _canonical import CHARACTERS, END, PROMPT_CHARACTERS, TOKENS

from rlhf_dist.config.load import from_yaml
from rlhf_dist.config.schema import Config
from rlhf_dist.learner.changed_words import mark
from rlhf_dist.learner.deepspeed_engine import LOOPBACK, init_process_group
from rlhf_dist.learner.micro_batch_rows import Row, pack_rows, response_row
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.learner.publication import Publication
from rlhf_dist.planning.placement import local_machine, place
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.relay import Fetch, Offer
from rlhf_dist.weights.shared_memory import WeightWriter

RATES = (1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
SHAPING_RATE = 1e-3
ROWS = 64
SECRET, LIMIT_S = b"bench delta", 60.0


class Nodes:
    """Where a version is offered and where it goes: two ends of a socket."""

    def __init__(self) -> None:
        self._offer = Offer(LOOPBACK, SECRET, timeout_s=LIMIT_S)
        self._fetch = Fetch(SECRET, timeout_s=LIMIT_S)

    def send(self, announcement: Announcement) -> float:
        """Seconds from published to hashed in the other node's memory."""
        begun = time.perf_counter()
        self._offer.offer(announcement)
        found = self._fetch.fetch(announcement, self._offer.address)
        assert found.hashes == announcement.hashes
        return time.perf_counter() - begun

    def close(self) -> None:
        """Listen no more, give the memory back."""
        self._offer.close()
        self._fetch.close()


class Learner:
    """Trains, and publishes both ways."""

    def __init__(self, config: Config) -> None:
        self.engine = ModelEngine(
            Path(config.model.path),
            config.model,
            config.learner,
            config.learner.optimizer,
            device="cpu",
            bucket_mib=config.weights.bucket_mib,
        )
        self._chance = random.Random(config.seed)
        self._version = 0
        self._whole: WeightWriter | None = None
        self._parts = self.engine._deepspeed.parts()
        self.by_changes, self.whole = Nodes(), Nodes()

    def train(self, rate: float) -> float:
        """One optimizer step; the mean loss of a token."""
        rows = [self._row() for _ in range(ROWS)]
        logprobs = self.engine.logprobs(pack_rows(rows, torch.device("cpu")), 1.0)
        loss = -logprobs.mean()
        self.engine.backward(loss, last=True)
        self.engine.step(rate)
        return float(loss.detach())

    def _row(self) -> Row:
        word = [TOKENS.index(letter) for letter in self._chance.choices(CHARACTERS, k=PROMPT_CHARACTERS)]
        return response_row(word, [*reversed(word), TOKENS.index(END)])

    def push(self) -> dict[str, float]:
        """Publish and send, by changes and whole."""
        self._version += 1
        published_s, found = timed(lambda: self.engine.publish(self._version))
        writer = self._whole = self._whole or WeightWriter(found.plan)
        whole_s, whole = timed(lambda: writer.write(self._version, self.engine.weights()))
        assert whole.hashes == found.hashes, "both ways lead to the same weights"
        return {
            "bytes": (found.changes or found.plan).nbytes,
            "publish_s": published_s,
            "send_s": self.by_changes.send(found),
            "whole_publish_s": whole_s,
            "whole_send_s": self.whole.send(whole),
        }

    def mark_s(self) -> float:
        """Seconds to mark what a step changed, over all weights."""
        scratch = [torch.zeros(-(-part.words.numel() // 8), dtype=torch.uint8) for part in self._parts]
        begun = time.perf_counter()
        for part, marks in zip(self._parts, scratch, strict=True):
            mark(part, marks)
        return time.perf_counter() - begun

    def changed(self) -> int:
        """Words that are marked."""
        publication = self.engine._publication
        assert isinstance(publication, Publication), "changed words go through shared memory"
        marks = publication._marks
        return 0 if marks is None else marks.count()

    def close(self) -> None:
        """Give shared memory back."""
        for one in (self.engine, self.by_changes, self.whole, self._whole):
            if one is not None:
                one.close()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it gives."""
    begun = time.perf_counter()
    found = call()
    return time.perf_counter() - begun, found


def measure(learner: Learner, rate: float, warmup: int, steps: int) -> dict[str, float]:
    """Medians over the measured steps at this rate."""
    found: list[dict[str, float]] = []
    for step in range(warmup + steps):
        step_s, loss = timed(lambda: learner.train(rate))
        if step < warmup:
            continue
        if step == warmup:
            learner.push()  # what the warm-up changed
            step_s, loss = timed(lambda: learner.train(rate))
        facts = {"words": float(learner.changed()), "step_s": step_s, "mark_s": learner.mark_s(), "loss": loss}
        found.append(facts | learner.push())
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def main() -> None:
    config = from_yaml(Path(sys.argv[1]).read_text(encoding="utf-8"))
    train, warmup, steps = map(int, sys.argv[2:])
    with socket.create_server((LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    threads = place(config, local_machine(), "sft").learner_threads
    init_process_group(0, 1, LOOPBACK, port, device="cpu", threads=threads, timeout_s=LIMIT_S)
    learner = Learner(config)
    with closing(learner):
        losses = [learner.train(SHAPING_RATE) for _ in range(train)]
        learner.push()
        rates = {f"{rate:g}": measure(learner, rate, warmup, steps) for rate in RATES}
        elements = sum(tensor.numel() for _, tensor in learner.engine.weights())
    print(json.dumps({"parameters": elements, "threads": threads, "losses": losses, "rates": rates}))


if __name__ == "__main__":
    main()
