"""Weights that a learner sends straight into the real vLLM engine, while it has requests under way too.

By its name this comes after the files that share the engine and begin with its own weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import real_engine
from real_engine import Learner, groups, largest_difference, requests, versions
from weight_senders import Sender, push, sending

from rlhf_dist.rollout.vllm_engine import VllmEngine
from rlhf_dist.rollout.worker import RolloutWorker
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.receipts import receipt_problem

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
learner, engine, worker = real_engine.learner, real_engine.engine, real_engine.worker
FIRST: dict[Literal["broadcast", "ipc"], int] = {"broadcast": 80, "ipc": 100}
"""Versions that the mask of the engine follows, from the shared memory; and then none of the next 19."""


@pytest.fixture(scope="module", params=FIRST)
def sender(request: pytest.FixtureRequest, learner: Learner, engine: VllmEngine) -> Iterator[Sender]:
    """Each parameter is a bucket, so that buckets end inside of the fused layers."""
    transport: Literal["broadcast", "ipc"] = request.param
    learner.put_back()
    engine.load_weights(learner.publish(FIRST[transport]))
    plan = make_plan([(name, tuple(tensor.shape), "float32") for name, tensor in learner.weights()], 1)
    with sending(transport, 30.0, plan, lambda: [(n, tensor.detach()) for n, tensor in learner.weights()]) as found:
        yield found


def test_the_engine_samples_from_what_it_was_sent(sender: Sender, learner: Learner, worker: RolloutWorker) -> None:
    engine, first = worker._engine, FIRST[sender.transport]
    for number in (1, 2, 3):
        learner.move(seed=80 + number)
        announced = sender.publish(first + number)
        receipt = push(sender, announced, number, engine.load_weights)
        assert receipt_problem(announced, receipt) is None and len(receipt.hashes) > 20
        found = groups(worker, requests())
        assert versions(found) == {first + number} and largest_difference(learner, found) <= 1e-5


def test_memory_beside_the_model_is_that_of_buckets(
    sender: Sender, learner: Learner, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than two, and what vLLM keeps of a layer that is not whole."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from rlhf_dist.weights import direct_reader

    most, made = 0, []
    views = direct_reader.views

    def counted(bucket: object, data: object) -> object:
        nonlocal most
        made.append(StorageWeakRef(data.untyped_storage()))  # type: ignore[attr-defined]
        most = max(most, sum(not one.expired() for one in made))
        return views(bucket, data)  # type: ignore[arg-type]

    monkeypatch.setattr(direct_reader, "views", counted)
    learner.move(seed=90)
    announced = sender.publish(FIRST[sender.transport] + 9)
    assert receipt_problem(announced, push(sender, announced, 9, engine.load_weights)) is None
    assert len(made) > 20 and most <= 6, "q, k and v with their biases make one layer"
