"""One learner rank that sends its weights: `python direct_ranks.py RANK WORLD PORT MODEL FOLDER`.

Two ranks under ZeRO 3, by broadcast and by ipc. Rank 0's process has an engine's receiving end in a thread. What was
found is in `WORLD-RANK.pt`.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from weight_senders import CPU, HERE, Taken, receive, round_of

from rlhf_dist.config.schema import LearnerConfig, ModelConfig, OptimizerConfig
from rlhf_dist.errors import WeightSyncError
from rlhf_dist.learner.deepspeed_engine import init_process_group
from rlhf_dist.learner.micro_batch_rows import pack_rows, response_row
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.weights.direct_reader import DirectReader
from rlhf_dist.weights.receipts import Announcement, MeetingPoint, Round, Sent

ENGINE = "w0"


def train(engine: ModelEngine) -> None:
    """A step on random tokens, others on every rank."""
    tokens = np.random.default_rng(engine.rank).integers(3, 60, size=40).tolist()
    logprobs = engine.logprobs(pack_rows([response_row(tokens[:5], tokens[5:])], CPU), 1.0)
    engine.backward(-logprobs.mean(), last=True)
    engine.step(1e-3)


def send(engine: ModelEngine, announced: Announcement | None, number: int, reader: DirectReader) -> tuple[Sent, Taken]:
    """A round, with the receiving end where there is an announcement: on rank 0."""
    made: list[Round | None] = [None if announced is None else round_of(announced, number, number, (ENGINE,))]
    torch.distributed.broadcast_object_list(made, 0)
    taken = Taken()

    def take() -> None:
        nonlocal taken
        assert announced is not None
        taken = receive(reader, replace(announced, round=made[0]))

    thread = threading.Thread(target=take, daemon=True)
    if announced is not None:
        thread.start()
    assert made[0] is not None
    sent = engine.send(made[0])
    if announced is not None:
        thread.join(30)
        assert not thread.is_alive()
    return sent, taken


def breaks(opened: Any, *given: Any) -> Any:
    """A way that sends nothing, where the rank has one."""
    way, problem = opened(*given)
    if way is not None:
        way.send = fails
    return way, problem


def fails(index: int, nbytes: int, ends: float) -> None:
    raise WeightSyncError("the cable is cut")


def run(transport: Literal["broadcast", "ipc"], model: Path, world: int) -> dict[str, Any]:
    """Two pushes with a step between; one that rank 0 cannot go on with; one more."""
    engine = ModelEngine(
        model,
        ModelConfig(dtype="bfloat16"),
        LearnerConfig(ranks=world, zero_stage=3),
        OptimizerConfig(warmup_steps=0),
        device="cpu",
        bucket_mib=1,
        meeting=MeetingPoint((HERE, 0), transport, 20.0),
    )
    found: dict[str, Any] = {"same": [], "sent": []}
    reader = DirectReader(CPU)
    for number in (1, 2, 3, 4):
        train(engine)
        announced = engine.publish(number)
        publication: Any = engine._publication
        opened = publication._open
        publication._open = partial(breaks, opened) if number == 3 else opened
        sent, taken = send(engine, announced, number, reader)
        publication._open = opened
        weights = {name: tensor.clone() for name, tensor in engine.weights()}
        same = taken.weights.keys() == weights.keys() and all(
            torch.equal(tensor.view(torch.int16), taken.weights[name].view(torch.int16))
            for name, tensor in weights.items()
        )
        found["same"].append(same and announced is not None and taken.hashes == announced.hashes)
        found["sent"].append(sent)
    found["number alone"] = engine.publish(9) == (announced and replace(announced, version=9))
    engine.close()
    return found


def main() -> None:
    rank, world, port = map(int, sys.argv[1:4])
    model, folder = map(Path, sys.argv[4:6])
    init_process_group(rank, world, HERE, port, device="cpu", threads=1, timeout_s=60.0)
    found = {transport: run(transport, model, world) for transport in ("broadcast", "ipc")}
    torch.save(found, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main()
