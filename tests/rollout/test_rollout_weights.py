"""Weights into the real vLLM engine: a bad push changes nothing or breaks the engine for good, and never in silence.

Every parameter is a bucket of its own here, so buckets end inside the fused layers (q, k and v; gate and up).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import real_engine
import torch
from real_engine import PROMPTS, SAMPLING, Learner, groups, largest_difference, requests, versions

from rlhf_dist.errors import EngineBroken, WeightSyncError
from rlhf_dist.rollout.trajectories import Turn
from rlhf_dist.rollout.vllm_engine import VllmEngine
from rlhf_dist.rollout.worker import RolloutWorker
from rlhf_dist.types import Receipt
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.changes import WORD_BYTES, encode
from rlhf_dist.weights.receipts import Announcement, receipt_problem
from rlhf_dist.weights.shared_memory import WeightWriter

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
learner, engine, worker = real_engine.learner, real_engine.engine, real_engine.worker

GOOD, BAD = 60, 61
"""The mask of the engine follows version 60 and then none up to 79."""


class Push:
    """The learner's end with a bucket for each parameter."""

    def __init__(self, learner: Learner, engine: VllmEngine) -> None:
        self.learner = learner
        self.engine = engine
        shapes = [(name, tuple(tensor.shape), "float32") for name, tensor in learner.weights()]
        self.writer = WeightWriter(make_plan(shapes, 1))

    def publish(self, version: int, change: float = 0.0) -> Announcement:
        """The learner's weights, each moved by `change`."""
        return self.writer.write(version, [(name, tensor.detach() + change) for name, tensor in self.learner.weights()])

    def load(self, version: int = GOOD) -> Announcement:
        """A push that succeeds."""
        announcement = self.publish(version)
        assert receipt_problem(announcement, self.engine.load_weights(announcement)) is None
        return announcement

    @property
    def model(self) -> Any:
        """vLLM's."""
        return self.engine._engine.model_executor.driver_worker.worker.model_runner.model

    def mend(self) -> None:
        """What nobody does to a broken engine: its process is given up. Here the next test needs it."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.engine._engine.model_config)
        self.engine._weights._state, self.engine._weights._held = "clean", None
        self.load()


@pytest.fixture(scope="module")
def push(learner: Learner, engine: VllmEngine) -> Iterator[Push]:
    made = Push(learner, engine)
    assert len(made.writer.plan.buckets) == len(learner.weights()) > 20
    made.load()
    yield made
    made.writer.close()


def agrees(push: Push, worker: RolloutWorker) -> bool:
    """Whether the engine samples with the learner's weights."""
    return largest_difference(push.learner, groups(worker, requests(n=2, prompts=PROMPTS[:1]))) <= 1e-4


def require_broken(push: Push, worker: RolloutWorker) -> None:
    """The engine gives no tokens and takes no weights any more."""
    with pytest.raises(EngineBroken, match="a load of weights failed in the middle"):
        groups(worker, requests())
    with pytest.raises(EngineBroken, match="a load of weights failed in the middle"):
        push.engine.load_weights(push.publish(GOOD))


def test_a_damaged_bucket_is_refused_before_anything_is_loaded_and_the_next_push_is_whole(
    push: Push, worker: RolloutWorker
) -> None:
    """For every bucket: with loads that began before all buckets were hashed, the next push lost a fused layer."""
    for index, bucket in enumerate(push.writer.plan.buckets):
        announcement = push.publish(BAD, change=0.1)
        push.writer._map[announcement.offset + bucket.offset] ^= 1
        with pytest.raises(WeightSyncError, match=rf"^version 61: bucket {index} arrived as .*; nothing was loaded"):
            push.engine.load_weights(announcement)
        assert agrees(push, worker), f"bucket {index}: the weights are as before"
        push.learner.move(seed=100 + index)
        push.load()
        assert agrees(push, worker), f"bucket {index}: {bucket.slots[0].name}"


def test_the_packed_form_of_a_tied_head_is_gone_before_the_next_one_is_made(
    push: Push, worker: RolloutWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is then there for the next one. It is the largest piece of a small model."""
    head = push.model.lm_head
    method, before = head.quant_method, weakref.ref(head.cpu_linear)
    pack, alive = method.process_weights_after_loading, list[bool]()

    def watched(layer: Any) -> None:
        if layer is head:
            alive.append(before() is not None)
        pack(layer)

    monkeypatch.setattr(method, "process_weights_after_loading", watched)
    push.learner.move(seed=90)
    push.load()
    assert alive == [False]
    assert agrees(push, worker)


def test_a_tensor_that_the_engine_skips_in_silence_is_found_and_breaks_the_engine(
    push: Push, worker: RolloutWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = push.model.load_weights
    for slot in push.writer.plan.slots:

        def skipping(weights: Any, name: str = slot.name) -> Any:
            return load((found, tensor) for found, tensor in weights if found != name)

        monkeypatch.setattr(push.model, "load_weights", skipping)
        announcement = push.publish(BAD, change=0.1)
        problem = receipt_problem(announcement, push.engine.load_weights(announcement))
        assert problem is not None and problem.broken
        assert f"its engine loaded 0 of {slot.elements:,} elements of {slot.name}" in problem.text
        monkeypatch.undo()
        require_broken(push, worker)
        push.mend()
    assert agrees(push, worker)


def test_a_part_of_a_fused_layer_that_is_not_announced_is_found(push: Push, worker: RolloutWorker) -> None:
    for missing, layer in (("v_proj.weight", "qkv_proj"), ("up_proj.weight", "gate_up_proj"), ("norm.weight", "norm")):
        given = [(name, tensor.detach()) for name, tensor in push.learner.weights() if not name.endswith(missing)]
        writer = WeightWriter(make_plan([(name, tuple(t.shape), "float32") for name, t in given], 1))
        announcement = writer.write(BAD, given)
        receipt = push.engine.load_weights(announcement)
        writer.close()
        assert receipt.unfilled and all(layer in name for name in receipt.unfilled), receipt.unfilled
        problem = receipt_problem(announcement, receipt)
        assert problem is not None and problem.broken and layer in problem.text
        require_broken(push, worker)
        push.mend()
    assert agrees(push, worker)


def test_a_load_that_fails_after_any_tensor_breaks_the_engine(
    push: Push, worker: RolloutWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = push.model.load_weights
    for count in range(0, len(push.writer.plan.slots), 5):

        def failing(weights: Any, count: int = count) -> Any:
            def some() -> Iterator[tuple[str, torch.Tensor]]:
                for index, pair in enumerate(weights):
                    if index == count:
                        raise OSError("memory went away")
                    yield pair

            return load(some())

        monkeypatch.setattr(push.model, "load_weights", failing)
        with pytest.raises(EngineBroken, match=r"the load of version 61 failed \(OSError: memory went away\)"):
            push.engine.load_weights(push.publish(BAD, change=0.1))
        monkeypatch.undo()
        require_broken(push, worker)
        push.mend()
    assert agrees(push, worker)


@pytest.mark.parametrize(
    ("mode", "call", "message"),
    [
        (
            "recompute",
            "reset_prefix_cache",
            r"vLLM did not give up the keys and values of the old weights \(no room\); with "
            r"rollout\.kv_after_push keep it would not have to$",
        ),
        (
            "keep",
            "add_request",
            r"vLLM did not take requests without a token again \(RuntimeError: no room\); with "
            r"rollout\.kv_after_push recompute it would not have to$",
        ),
    ],
)
def test_caches_that_stay_old_break_the_engine_and_the_message_names_the_other_way(
    push: Push, worker: RolloutWorker, monkeypatch: pytest.MonkeyPatch, mode: str, call: str, message: str
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room")

    push.engine.submit(Turn("without a token", [1, 2, 3], SAMPLING, 0))
    monkeypatch.setattr(push.engine, "kv_after_push", mode)
    monkeypatch.setattr(push.engine._engine, call, failing)
    with pytest.raises(EngineBroken, match=f"^the load of version 61 is done, but {message}"):
        push.engine.load_weights(push.publish(BAD, change=0.1))
    monkeypatch.undo()
    push.engine.abort(["without a token"])
    require_broken(push, worker)
    push.mend()
    assert agrees(push, worker)


def test_weights_that_did_not_move_are_not_read_again_and_tokens_get_the_new_number(
    push: Push, worker: RolloutWorker
) -> None:
    announcement = push.load()
    nowhere = replace(announcement, version=GOOD + 5, path="/dev/shm/not-there")
    receipt = push.engine.load_weights(nowhere)
    assert receipt == Receipt("rollout worker 0", GOOD + 5, announcement.hashes, receipt.loaded)
    assert receipt_problem(nowhere, receipt) is None
    found = groups(worker, requests())
    assert versions(found) == {GOOD + 5} and largest_difference(push.learner, found) <= 1e-4
    push.learner.move(seed=7)
    with pytest.raises(WeightSyncError, match="version 61: /dev/shm/not-there cannot be read: No such file"):
        push.engine.load_weights(replace(push.publish(BAD), path="/dev/shm/not-there"))
    push.load()


def test_pushes_by_changed_words_are_loaded_as_whole_ones(push: Push, worker: RolloutWorker) -> None:
    """What lies in shared memory after each is the learner's, bit for bit, and the engine samples with that."""
    before = push.load()
    for number in range(5):
        old = [tensor.detach().clone() for _, tensor in push.learner.weights()]
        push.learner.move(seed=300 + number)
        pieces = []
        for slot, (_, tensor), earlier in zip(push.writer.plan.slots, push.learner.weights(), old, strict=True):
            words, was = (one.detach().flatten().view(torch.int16).numpy() for one in (tensor, earlier))
            where = np.flatnonzero(words != was)
            pieces.append(encode(slot.offset // WORD_BYTES, where, words[where].view(np.uint16)))
        before = push.writer.change(BAD + number, before, pieces)
        found = dict(pair for bucket in push.writer.plan.buckets for pair in push.writer.tensors(before, bucket))
        assert all(torch.equal(found[name], tensor.detach()) for name, tensor in push.learner.weights())
        assert receipt_problem(before, push.engine.load_weights(before)) is None
        assert agrees(push, worker)


def test_embeddings_are_written_where_they_are(push: Push, worker: RolloutWorker) -> None:
    """They are not made beside themselves, nor packed for products that nobody computes with them."""
    table = push.model.model.embed_tokens
    place, packed = table.weight.data_ptr(), table.cpu_linear
    push.learner.move(seed=400)
    push.load()
    assert (table.weight.data_ptr(), table.cpu_linear) == (place, packed)
    sent = dict(push.learner.weights())["model.embed_tokens.weight"].detach()
    assert torch.equal(table.weight[: len(sent)], sent)
    assert agrees(push, worker)
