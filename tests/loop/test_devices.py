"""What devices did: of engines the mean beside the largest and the smallest, and what the members do now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from sample_groups import request_of
from stand_ins import FakeRollouts, lines, prompts
from test_loop_rl_training import CONFIG, close, warnings, whole, wired

from rlhf_dist.loop.devices import EngineLoads
from rlhf_dist.loop.events import MemberKind
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.open_groups import OpenRequest
from rlhf_dist.loop.rl_training import train, who
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.alerts import AlertKind
from rlhf_dist.telemetry.goodput import ActorSide
from rlhf_dist.telemetry.histograms import Histogram
from rlhf_dist.telemetry.run_telemetry import Telemetry
from rlhf_dist.telemetry.sinks import NONE, EventLog, Sink
from rlhf_dist.types import Beat, EngineWork
from rlhf_dist.weights.receipts import Announcement


def test_one_sick_engine_shows() -> None:
    loads = EngineLoads()
    first = {"a": Beat("a", 10, EngineWork(100, 1.0, 2.0)), "b": Beat("b", 10, EngineWork(100, 1.0, 2.0))}
    assert loads.metrics(first)["rollout/engine_tokens_per_s_min"] == 100.0
    second = {"a": Beat("a", 20, EngineWork(300, 2.0, 7.0)), "b": Beat("b", 20, EngineWork(120, 3.0, 3.0))}
    assert loads.metrics(second) == pytest.approx(
        {
            "rollout/engine_tokens_per_s_mean": 105.0,
            "rollout/engine_tokens_per_s_max": 200.0,
            "rollout/engine_tokens_per_s_min": 10.0,
            "rollout/engine_running_mean": 11.0,
            "rollout/engine_running_max": 20.0,
            "rollout/engine_running_min": 2.0,
            "rollout/engine_kv_use_mean": 0.3,
            "rollout/engine_kv_use_max": 0.5,
            "rollout/engine_kv_use_min": 0.1,
        }
    )
    third = loads.metrics(second | {"a": Beat("a", 5, EngineWork(50, 1.0, 1.0))})
    assert third["rollout/engine_tokens_per_s_max"] == 50.0, "another process of the same name counts from 0"
    assert third["rollout/engine_tokens_per_s_min"] == 0.0, "one that does nothing"
    assert EngineLoads().metrics({}) == {}


def test_what_members_do_now() -> None:
    members = Members(
        ["a", "b"],
        ["s"],
        ["r"],
        capacity=8,
        limits_s={"rollout": 5.0, "scoring": 5.0, "reference": 5.0, "collator": 5.0},
        beat_s=1.0,
    )
    assert members.side == ActorSide(0, 2, 0, 2) and members.beats == {}
    members.beat(Beat("a", 3, EngineWork(7)), 1.0)
    assert members.beats["a"].work.tokens == 7
    members.serve(["b"])
    request = request_of(prompts(1)[0], 4)
    members.wait((OpenRequest(request, 0, 0.0, False),))
    members.dispatch(0.0)
    server = members.server("reference", "train/0/1", 0.0)
    assert members.side == ActorSide(1, 1, 1, 1)
    members.done("reference", server, "train/0/1", 1.0)
    members.done("reference", server, "train/0/1", 1.0)
    assert members.side == ActorSide(1, 1, 0, 2), "an answer that comes twice counts once"
    members.cancelled("b", request.key)
    members.cancelled("b", request.key)
    assert members.side == ActorSide(0, 2, 0, 2)
    members.wait((OpenRequest(request, 1, 2.0, False),))
    members.dispatch(2.0)
    members.lose("b")
    members.lose("b")
    assert members.side == ActorSide(0, 1, 0, 2)


def test_whom_a_sentence_is_about() -> None:
    assert who("rollout worker 12 did not load version 3 in 5 s") == "rollout worker 12"
    assert who("2 requests of rollout worker 1 begin again") == "rollout worker 1"
    assert who("nobody") == ""


def test_a_run_books_its_time_and_says_what_logging_took(tmp_path: Path) -> None:
    run = whole(tmp_path)
    rows = [line for line in lines(run.directory.metrics) if "time/step" in line]
    assert len(rows) == 4 and warnings(run.directory) == []
    for row in rows:
        for side in ("rollout", "learner", "scoring"):
            assert sum(value for name, value in row.items() if name.startswith(f"goodput/{side}_")) == pytest.approx(
                1.0
            )
        assert row["time/log"] > 0.0


class Late(FakeRollouts):
    """Its worker misses the push of two versions."""

    def load_weights(self, announcement: Announcement) -> list[str]:
        super().load_weights(announcement)
        late = announcement.version in (2, 3)
        return ["rollout worker 0 did not load version 2 in 5 s (weights.timeout_s)"] if late else []


def test_a_missed_push_calls_people_once_with_whom_and_the_event_log_has_both(tmp_path: Path) -> None:
    run = wired(tmp_path, rollouts=Late())
    called: list[tuple[str, str]] = []
    drawn: list[dict[str, float]] = []

    class Called(Sink):
        def alert(self, kind: AlertKind, text: str, subject: str) -> None:
            called.append((kind, text))

        def log(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram] = NONE) -> None:
            drawn.append({name: sum(found.counts) for name, found in histograms.items()})

    telemetry = Telemetry([EventLog(run.directory.events), Called()], lambda _: None)
    train(replace(run, telemetry=telemetry), None)
    close(run)
    assert called == [("push", "step 2: rollout worker 0 did not load version 2 in 5 s (weights.timeout_s)")]
    responses = 3.0 * CONFIG.algo.group_size
    spread = {names.REWARDS: responses, names.LENGTHS: responses, names.LAGS: 3.0}
    assert drawn == [{}, *[spread] * 4], "an evaluation before, and four steps of three groups"
    events = [event for event in lines(run.directory.events) if event["kind"] == "warning"]
    assert [event["facts"] for event in events] == [{"alert": "push"}] * 2


def test_a_server_of_scores_and_logprobs_is_one_device() -> None:
    limits: dict[MemberKind, float] = {"rollout": 5.0, "scoring": 5.0, "reference": 5.0, "collator": 5.0}
    members = Members(["a"], ["s"], ["s"], capacity=8, limits_s=limits, beat_s=1.0)
    members.server("scoring", "train/0/0", 0.0)
    members.server("reference", "train/0/0", 0.0)
    assert members.side == ActorSide(0, 1, 1, 0)
    members.done("scoring", "s", "train/0/0", 1.0)
    assert members.side == ActorSide(0, 1, 1, 0)
    members.done("reference", "s", "train/0/0", 1.0)
    assert members.side == ActorSide(0, 1, 0, 1)
