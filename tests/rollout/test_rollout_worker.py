"""A rollout worker over a stand-in engine: the pump, which prompts reach the engine, and how the others come back."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pumping import answered, groups_of, pumped
from sample_groups import SAMPLING
from small_tokenizers import small_tokenizer
from stand_in_engine import Engine, asked, submit, talking, uids

from rlhf_dist.config.schema import RolloutConfig
from rlhf_dist.data.render import render
from rlhf_dist.errors import EngineBroken, RunError
from rlhf_dist.models.hf import load_tokenizer
from rlhf_dist.rollout.vllm_engine import VllmEngine, can_exchange, decoded, memory_of, sampling_params
from rlhf_dist.rollout.worker import Cancel, RolloutWorker, Sleep
from rlhf_dist.types import Beat, Message, Receipt, Unanswered
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.receipts import Announcement

ANNOUNCEMENT = Announcement(7, "unused", 0, make_plan([("a", (4,), "float32")], 8), ("hash",))
LIMIT_S = 30.0


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    return Engine(load_tokenizer(tiny_model))


@pytest.fixture
def worker(engine: Engine) -> RolloutWorker:
    return RolloutWorker("w", engine, chat=False, max_prompt_tokens=4)


def test_prompts_without_tokens_and_too_long_ones_are_dropped_and_the_others_answered(worker: RolloutWorker) -> None:
    found = pumped(worker, submit(*asked("abc", "äöü", "abcde", "b")))
    drops = [event for event in found if isinstance(event, Unanswered)]
    assert [(event.key, event.drop.uid, event.drop.reason) for event in drops] == [
        ("train/0/1/0", "0/1", "prompt_empty"),
        ("train/0/2/0", "0/2", "prompt_too_long"),
    ]
    assert drops[1].drop.detail == "5 tokens; rollout.max_prompt_tokens is 4"
    assert uids(found) == ["0/3", "0/0"]


def test_each_sample_is_a_turn_of_its_own_and_its_group_has_it_in_its_place(
    worker: RolloutWorker, engine: Engine
) -> None:
    """The engine ends the last samples first, and groups end in the middle of a step."""
    requests = asked("abc", "b", n=3)
    found = pumped(worker, submit(*requests))
    assert uids(found) == ["0/1", "0/0"]
    for event, group in zip(answered(found), groups_of(found), strict=True):
        assert group.request in requests and event.key == group.request.key
        assert event.head.lengths.tolist() == [1, 1, 1]
        assert [sample.tokens[-1] for sample in group.trajectories] == [0, 1, 2], "sample i has the seed i here"
    assert [turn.seed for turn in engine.turns] == [0, 1, 2] * 2
    assert {turn.sampling for turn in engine.turns} == {requests[0].sampling}


def test_a_worker_sleeps_after_what_was_asked_before(worker: RolloutWorker, engine: Engine) -> None:
    """Its number is 2: it waits for the message that ends the request, although that comes later."""
    (request,) = asked("abc")
    worker.post(0, submit(request))
    worker.turn()
    asleep = Sleep()
    worker.post(2, asleep)
    worker.turn()
    assert not asleep.done.done()
    worker.post(1, Cancel((request.key,)))
    worker.turn()
    assert asleep.done.result(0) is None and engine.sleeps == 1


def test_a_worker_with_requests_under_way_does_not_sleep(worker: RolloutWorker, engine: Engine) -> None:
    asleep = Sleep()
    worker.post(0, submit(*asked("abc", n=3)))
    worker.post(1, asleep)
    worker.turn()
    with pytest.raises(RunError, match="w was to sleep with 1 requests under way"):
        asleep.done.result(0)
    assert engine.sleeps == 0


def test_what_is_asked_twice_is_kept_apart(worker: RolloutWorker, engine: Engine) -> None:
    """As an evaluation asks for greedy responses and for sampled ones to the same prompts; and a group asked again."""
    (request,) = asked("abc", n=2)
    others = [replace(request, purpose="eval"), replace(request, purpose="eval_greedy"), replace(request, attempt=1)]
    found = pumped(worker, submit(request, *others))
    assert {event.key for event in answered(found)} == {each.key for each in (request, *others)}
    assert len({turn.key for turn in engine.turns}) == 8


def test_messages_are_done_in_the_order_of_their_numbers(worker: RolloutWorker, engine: Engine) -> None:
    """Ray keeps no order among them: here a group is cancelled by a message that comes before the one that begins it.

    What is cancelled before it has begun would be sampled for nobody.
    """
    first, second, third = asked("abc", "b", "c", n=4)
    worker.post(2, submit(third))
    worker.post(1, Cancel((first.key,)))
    worker.turn()
    assert engine.turns == [], "number 0 has not come"
    worker.post(0, submit(first, second))
    worker.turn()
    assert [turn.key.rsplit("/", 2)[0] for turn in engine.turns] == [first.key] * 4 + [second.key] * 4 + [third.key] * 4
    assert uids(pumped(worker)) == ["0/2", "0/1"], "the first was cancelled after it had begun"


def test_weights_load_between_two_steps_and_what_is_under_way_goes_on(worker: RolloutWorker, engine: Engine) -> None:
    worker.post(0, submit(*asked("abc", n=4)))
    worker.turn()
    receipts: list[Receipt] = []
    loading = threading.Thread(target=lambda: receipts.append(worker.load_weights(ANNOUNCEMENT)))
    loading.start()
    while worker._inbox.empty():  # it has been asked for
        time.sleep(0.001)
    assert (receipts, engine.version) == ([], 0), "not by the thread that asks"
    found = pumped(worker)
    loading.join(LIMIT_S)
    assert [(receipt.worker, receipt.version) for receipt in receipts] == [("w", 7)]
    (group,) = groups_of(found)
    made = [sample.versions[sample.loss_mask].tolist() for sample in group.trajectories]
    assert made == [[7], [7], [0], [0]], "two samples a step, the last ones first"
    (event,) = answered(found)
    assert (event.head.oldest_version, event.head.newest_version, event.head.mean_version) == (0, 7, 3.5)
    assert len(engine.turns) == 4, "nothing was begun again"


def test_what_is_cancelled_ends_and_nothing_is_heard_of_it(worker: RolloutWorker, engine: Engine) -> None:
    first, second = asked("abc", "b", n=3)
    worker.post(0, submit(first, second))
    worker.turn()  # two samples of the second end
    worker.post(1, Cancel((second.key, "train/0/9/0")))
    found = pumped(worker)
    assert uids(found) == ["0/0"] and engine.under_way == []
    assert [event for event in found if isinstance(event, Unanswered)] == []
    assert len(engine.turns) == 6
    assert uids(pumped(worker, submit(second))) == ["0/1"], "it may be asked for again"


def test_a_beat_tells_of_steps(worker: RolloutWorker) -> None:
    assert worker.events(0) == [Beat("w", 0)]
    worker.post(0, submit(*asked("abc", "b", n=4)))
    worker.turn()
    assert worker.events(0) == [Beat("w", 1)]
    worker.turn()
    *_, last = worker.events(0)
    assert last == Beat("w", 2)
    worker.post(1, Cancel(("train/0/0/0",)))
    worker.turn()
    assert worker.events(0) == [Beat("w", 2)], "no step without work"
    assert last.work.tokens >= 2 and last.work.busy_s > 0.0


def test_who_asks_for_events_waits_for_one_and_no_longer_than_he_says(worker: RolloutWorker) -> None:
    begun = time.monotonic()
    assert worker.events(0.2) == [Beat("w", 0)]
    assert time.monotonic() - begun >= 0.2
    worker.post(0, submit(*asked("abc")))
    later = threading.Timer(0.2, worker.turn)
    begun = time.monotonic()
    later.start()
    assert uids(worker.events(LIMIT_S)) == ["0/0"] and time.monotonic() - begun < LIMIT_S / 2


@pytest.mark.parametrize("error", [IndexError("no such block"), EngineBroken("a load failed")])
def test_an_engine_that_fails_is_told_by_events(worker: RolloutWorker, engine: Engine, error: Exception) -> None:
    engine.fails = error
    pump = threading.Thread(target=worker.run, daemon=True)
    pump.start()
    worker.post(0, submit(*asked("abc")))
    with pytest.raises(type(error), match=str(error)):
        for _ in range(20):
            worker.events(1.0)
    pump.join(LIMIT_S)
    assert not pump.is_alive()
    with pytest.raises(type(error), match=str(error)):
        worker.events(LIMIT_S)


def test_a_load_that_fails_is_told_to_who_asked_for_it_and_the_pump_goes_on(
    worker: RolloutWorker, engine: Engine
) -> None:
    threading.Thread(target=worker.run, daemon=True).start()
    engine.fails = OSError("gone")
    with pytest.raises(OSError, match="gone"):
        worker.load_weights(ANNOUNCEMENT)
    engine.fails = None
    assert worker.load_weights(ANNOUNCEMENT).version == 7 and engine.prepared[-1] == 7
    worker.post(0, submit(*asked("abc")))
    found: list[Any] = []
    while not uids(found):
        found += worker.events(1.0)
    assert [group.trajectories[0].versions[-1] for group in groups_of(found)] == [7]


Settings = dict[str, Any]


class Seen(Exception):
    """The engine would start now."""


@pytest.fixture
def started_with(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What vLLM was to be started with."""
    import vllm

    settings: Settings = {}

    def arguments(**found: Any) -> Any:
        settings.update(found)
        raise Seen

    monkeypatch.setattr(vllm, "EngineArgs", arguments)
    return settings


@pytest.mark.parametrize(("parallel", "executor"), [(1, "uni"), (4, "mp")])
def test_vllm_never_asks_ray_for_gpus_of_its_own(
    started_with: Settings, tiny_model: Path, parallel: int, executor: str
) -> None:
    config = RolloutConfig(tensor_parallel=parallel)
    with pytest.raises(Seen):
        VllmEngine(tiny_model, config, dtype="float32", device="cpu", threads=1, name="w", chat=True)
    assert (started_with["tensor_parallel_size"], started_with["distributed_executor_backend"]) == (parallel, executor)


def test_the_processes_of_an_engine_share_its_cache_and_prepare_nothing_beside_it() -> None:
    whole, halves = RolloutConfig(kv_cache_gib=1.0), RolloutConfig(kv_cache_gib=1.0, tensor_parallel=2)
    assert memory_of(whole, "cpu", False) == {"kv_cache_memory_bytes": 2**30}
    assert memory_of(halves, "cpu", False) == {"kv_cache_memory_bytes": 2**29}
    assert [can_exchange(config, "cpu") for config in (whole, halves)] == [True, False]


@pytest.mark.parametrize(
    ("tokens", "reason", "stop", "plain", "special"),
    [
        ("a<think>b</think>c</s>", "stop", None, "abc", "a<think>b</think>c"),
        ("ab<end>", "stop", "<end>", "ab", "ab"),  # closed by a token that is not special
        ("ab<end>c", "length", None, "ab<end>c", "ab<end>c"),
        ("a<think>b##", "stop", "##", "ab", "a<think>b"),  # closed by a stop text
        ("ab", "length", None, "ab", "ab"),
    ],
)
def test_the_text_of_a_response_lacks_what_ended_it(
    tokens: str, reason: str, stop: str | None, plain: str, special: str
) -> None:
    tokenizer = small_tokenizer(plain=["<end>"])
    ids = tokenizer.encode(tokens, add_special_tokens=False)
    by_token = ids[-1] if stop == "<end>" else stop
    unknown = [len(tokenizer) + 3]  # a row of the model that the tokenizer has no token for
    sample = SimpleNamespace(token_ids=[*unknown, *ids], finish_reason=reason, stop_reason=by_token)
    assert decoded(tokenizer, sample, special=False) == plain
    assert decoded(tokenizer, sample, special=True) == special


def test_tokens_that_end_a_turn_end_a_sample_and_chance_has_a_seed() -> None:
    found = sampling_params(SAMPLING, 9, (7, 2))
    assert (found.stop_token_ids, found.seed, found.n) == ([7, 2], 9, 1)
    assert sampling_params(replace(SAMPLING, temperature=0.0), 9, ()).seed is None


@pytest.mark.parametrize(("device", "cut", "split"), [("cpu", False, "0"), ("cuda", None, None)])
def test_on_a_cpu_no_prefill_is_cut_and_no_sequence_split(
    started_with: Settings, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, device: str, cut: bool, split: str
) -> None:
    """A seeded request fails in a prefill that is cut; a sequence that threads share rounds by what else is decoded."""
    monkeypatch.delenv("VLLM_CPU_ATTN_SPLIT_KV", raising=False)
    with pytest.raises(Seen):
        VllmEngine(tiny_model, RolloutConfig(), dtype="float32", device=device, threads=1, name="w", chat=True)
    assert started_with["enable_chunked_prefill"] is cut
    assert os.environ.get("VLLM_CPU_ATTN_SPLIT_KV") == split


def test_a_second_turn_goes_on_from_the_tokens_that_were_sampled(engine: Engine) -> None:
    (group,) = groups_of(pumped(talking(engine, 64), submit(*asked("abc", n=2))))
    first, second = engine.turns[0], engine.turns[-1]
    read = render(engine.tokenizer, (Message("user", "abc"),), chat=True)
    assert list(first.context) == read and list(second.context)[: len(read) + 1] == [*read, first.seed]
    shown = engine.tokenizer.decode(list(second.context)[len(read) + 1 :])
    assert "no" in shown and "abc" not in shown, shown
    assert [sample.texts for sample in group.trajectories] == [("a", "no", "a")] * 2
    assert all(sample.length == 2 and len(sample.segments) == 4 for sample in group.trajectories)


def test_a_conversation_that_grows_too_long_takes_its_group_along(engine: Engine) -> None:
    limit = len(render(engine.tokenizer, (Message("user", "abc"),), chat=True))
    (drop,) = [
        event for event in pumped(talking(engine, limit), submit(*asked("abc", n=3))) if isinstance(event, Unanswered)
    ]
    assert drop.drop.reason == "prompt_too_long" and "before a later turn" in drop.drop.detail
    assert engine.under_way == [], "its other samples end, too"


def test_a_conversation_is_cancelled_in_its_second_turn(engine: Engine) -> None:
    worker = talking(engine, 64)
    (request,) = asked("abc", n=1)
    worker.post(0, submit(request))
    worker.turn()
    assert [turn.key for turn in engine.under_way] == [f"{request.key}/0/1"]
    worker.post(1, Cancel((request.key,)))
    worker.turn()
    assert engine.under_way == [] and answered(worker.events(0)) == []
