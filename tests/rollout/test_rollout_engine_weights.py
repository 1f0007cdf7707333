"""The state machine of what an engine holds, over a stand-in engine of one or two processes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from rlhf_dist.errors import EngineBroken, WeightSyncError
from rlhf_dist.rollout.vllm_engine import VllmEngine
from rlhf_dist.rollout.weight_receiver import UNPUBLISHED, EngineWeights, Loaded
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.receipts import Announcement, MeetingPoint, Round, receipt_problem

PLAN = make_plan([("norm", (4,), "float32"), ("qkv", (6, 2), "float32")], 1)
ANNOUNCEMENT = Announcement(1, "unused", 0, PLAN, ("hash 0", "hash 1"))
WHOLE = Loaded({"norm": 4, "qkv": 12}, (), ())


@dataclass
class Engine:
    """Answers as its processes would."""

    loaded: tuple[Loaded, ...] = (WHOLE,)
    refusal: str = ""
    mask_refusal: str = ""
    error: Exception | None = None
    """In the middle of a load, in each process."""
    gone: bool = False
    """Whether a process ends in the middle of a load."""
    caches: str = ""
    """What is wrong with them after a load."""
    hashes: tuple[str, ...] = ()
    """Of the version that was taken."""
    asked: list[str] = field(default_factory=list)

    def collective_rpc(self, method: str, args: Any = ()) -> list[Any]:
        self.asked.append(f"{method}, spare" if args == (True,) else method)
        if method == "take_weights":
            self.hashes = args[0].hashes
            return ["" for _ in self.loaded[1:]] + [self.refusal]
        if method == "load_taken_weights":
            if self.gone:
                raise RuntimeError("a process of the engine ended")
            if self.error is not None:
                return [Loaded({}, (), (), f"{type(self.error).__name__}: {self.error}") for _ in self.loaded]
            return [replace(one, hashes=self.hashes) for one in self.loaded]
        return [self.mask_refusal if method == "follow_mask" else ""]

    def renew_caches(self) -> str:
        self.asked.append("caches")
        return self.caches

    def set_weight_version(self, version: str) -> None:
        self.asked.append(f"version {version}")


def held_by(engine: Engine) -> EngineWeights:
    return EngineWeights("w", engine, engine.renew_caches)


def test_a_load_hashes_loads_forgets_and_takes_the_version() -> None:
    engine = Engine()
    weights = held_by(engine)
    assert weights.version == UNPUBLISHED and engine.asked == ["version -1"]
    assert receipt_problem(ANNOUNCEMENT, weights.load(ANNOUNCEMENT)) is None
    assert engine.asked[1:] == [
        "take_weights",
        "load_taken_weights",
        "release_weights",
        "caches",
        "follow_mask",
        "version 1",
    ]
    assert weights.version == 1


def test_weights_that_are_held_get_a_number_and_the_mask_its_turn() -> None:
    engine = Engine()
    weights = held_by(engine)
    first = weights.load(ANNOUNCEMENT)
    engine.asked.clear()
    assert weights.load(replace(ANNOUNCEMENT, version=2, offset=4096)) == replace(first, version=2)
    assert engine.asked == ["follow_mask", "version 2"] and weights.version == 2
    other = make_plan([("norm", (4,), "float32"), ("qkv", (2, 6), "float32")], 1)
    weights.load(replace(ANNOUNCEMENT, version=3, plan=other))
    assert "take_weights" in engine.asked, "the same bytes under another layout are other weights"


def test_no_two_loads_share_cached_keys_and_values_though_the_version_is_the_same() -> None:
    """As after a loss of the learner, which goes back."""
    engine = object.__new__(VllmEngine)
    engine._loads, engine._salt, engine._turns = 0, "", {}
    salts = [engine._salt]
    for _ in range(3):
        assert engine._begin_again() == ""
        salts.append(engine._salt)
    assert len(set(salts)) == 4


def test_an_engine_takes_part_in_a_transfer_whatever_it_holds() -> None:
    """The others wait for it."""
    engine = Engine()
    weights = held_by(engine)
    weights.load(ANNOUNCEMENT)
    engine.asked.clear()
    meeting = MeetingPoint(("127.0.0.1", 1), "broadcast", 1.0)
    sent = replace(ANNOUNCEMENT, version=2, meeting=meeting, round=Round(1, 1, 2, meeting, ("w",)))
    assert receipt_problem(sent, weights.load(sent)) is None
    assert engine.asked[:2] == ["take_weights", "load_taken_weights"]


def test_a_refusal_in_one_of_the_processes_stops_all_and_changes_nothing() -> None:
    engine = Engine(loaded=(WHOLE, WHOLE), refusal="version 1: bucket 0 arrived as x")
    weights = held_by(engine)
    with pytest.raises(WeightSyncError, match="bucket 0 arrived as x") as caught:
        weights.load(ANNOUNCEMENT)
    assert not isinstance(caught.value, EngineBroken)
    assert engine.asked[1:] == ["take_weights", "release_weights"] and weights.version == UNPUBLISHED
    engine.refusal = ""
    assert receipt_problem(ANNOUNCEMENT, weights.load(ANNOUNCEMENT)) is None


def test_a_version_that_was_prepared_only_has_to_be_exchanged() -> None:
    engine = Engine()
    weights = held_by(engine)
    weights.prepare(ANNOUNCEMENT)
    assert engine.asked[1:] == ["take_weights", "load_taken_weights, spare", "release_weights"]
    assert weights.version == UNPUBLISHED, "it is not in use yet"
    engine.asked.clear()
    assert receipt_problem(ANNOUNCEMENT, weights.load(ANNOUNCEMENT)) is None
    assert engine.asked == ["exchange_weights", "caches", "follow_mask", "version 1"]
    engine.asked.clear()
    weights.prepare(replace(ANNOUNCEMENT, version=2))
    assert engine.asked == [], "the engine holds these weights"


def test_another_version_than_the_prepared_one_is_loaded_as_without() -> None:
    engine = Engine()
    weights = held_by(engine)
    other = replace(ANNOUNCEMENT, version=2, hashes=("hash 2", "hash 3"))
    weights.prepare(ANNOUNCEMENT)
    engine.asked.clear()
    assert weights.load(other).hashes == other.hashes
    assert engine.asked[:2] == ["take_weights", "load_taken_weights"]
    weights.load(ANNOUNCEMENT)
    assert "exchange_weights" not in engine.asked, "the spare model's turn is over with the load after it"


def test_what_goes_wrong_in_a_preparation_has_the_consequences_of_a_load() -> None:
    engine = Engine(refusal="version 1: bucket 0 arrived as x")
    weights = held_by(engine)
    with pytest.raises(WeightSyncError, match="bucket 0 arrived as x"):
        weights.prepare(ANNOUNCEMENT)
    weights.require_clean()
    engine.refusal, engine.error = "", RuntimeError("half")
    with pytest.raises(EngineBroken, match=r"the load of version 1 failed \(RuntimeError: half\)"):
        weights.prepare(ANNOUNCEMENT)
    with pytest.raises(EngineBroken):
        weights.require_clean()


def test_a_mask_that_is_missing_is_refused_and_the_weights_are_whole() -> None:
    engine = Engine(mask_refusal="version 1 goes with the mask of version 0, which did not arrive")
    weights = held_by(engine)
    with pytest.raises(WeightSyncError, match="which did not arrive"):
        weights.load(ANNOUNCEMENT)
    weights.require_clean()
    assert weights.version == 1, "what is sampled next is sampled with the new weights"
    engine.mask_refusal = ""
    assert weights.load(replace(ANNOUNCEMENT, version=20)).version == 20


def test_an_engine_that_lost_a_process_is_broken() -> None:
    weights = held_by(Engine(gone=True))
    with pytest.raises(EngineBroken, match=r"version 1 failed \(RuntimeError: a process of the engine ended"):
        weights.load(ANNOUNCEMENT)
    with pytest.raises(EngineBroken):
        weights.require_clean()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Engine(error=RuntimeError("half")), r"the load of version 1 failed \(RuntimeError: half\)"),
        (Engine(error=RuntimeError("half"), loaded=(WHOLE, WHOLE)), r"failed \(RuntimeError: half\)"),
        (Engine(caches="vLLM said no"), "^the load of version 1 is done, but vLLM said no$"),
    ],
)
def test_what_goes_wrong_later_breaks_the_engine(engine: Engine, message: str) -> None:
    weights = held_by(engine)
    with pytest.raises(EngineBroken, match=message):
        weights.load(ANNOUNCEMENT)
    assert "release_weights" in engine.asked, "the learner may use the buffer again"
    with pytest.raises(EngineBroken):
        weights.require_clean()
    with pytest.raises(EngineBroken, match="is not to be used any more"):
        weights.load(replace(ANNOUNCEMENT, version=2))


@pytest.mark.parametrize(
    ("loaded", "problem"),
    [
        # Two processes: each has its half of a sharded tensor, and a copy of one that is not cut.
        ((Loaded({"norm": 4, "qkv": 6}, (), ()), Loaded({"norm": 4, "qkv": 6}, (), ())), None),
        ((Loaded({"norm": 4, "qkv": 6}, (), ()), Loaded({"norm": 4, "qkv": 2}, (), ())), "8 of 12 elements of qkv"),
        (
            (WHOLE, Loaded({"norm": 0, "qkv": 6}, ("norm.weight",), ())),
            "1 parameters as not loaded whole, first norm.weight",
        ),
    ],
)
def test_shards_of_all_processes_are_added_up(loaded: tuple[Loaded, ...], problem: str | None) -> None:
    weights = held_by(Engine(loaded=loaded))
    found = receipt_problem(ANNOUNCEMENT, weights.load(ANNOUNCEMENT))
    assert (found is None) == (problem is None)
    if problem is not None:
        assert found is not None and problem in found.text and found.broken
        with pytest.raises(EngineBroken):
            weights.require_clean()
