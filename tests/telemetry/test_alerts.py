"""People are called once for a cause."""

from __future__ import annotations

from typing import get_args

from rlhf_dist.telemetry.alerts import EVERY_S, THE_END, TITLES, AlertKind, AlertLimit, title_of
from rlhf_dist.telemetry.run_telemetry import Telemetry
from rlhf_dist.telemetry.sinks import Sink


class Called(Sink):
    def __init__(self) -> None:
        self.alerts: list[tuple[str, str]] = []
        self.events: list[tuple[str, dict[str, object]]] = []

    def alert(self, kind: AlertKind, text: str, subject: str) -> None:
        self.alerts.append((kind, text))

    def event(self, kind: str, message: str, **facts: object) -> None:
        self.events.append((kind, facts))


def test_once_per_cause_and_again_after_an_hour() -> None:
    now = 0.0
    limit = AlertLimit(lambda: now)
    assert limit.lets("push", "rollout worker 0") and limit.lets("push", "rollout worker 1") and limit.lets("kl", "")
    now = EVERY_S - 1
    assert not limit.lets("push", "rollout worker 0")
    now = EVERY_S
    assert limit.lets("push", "rollout worker 0")


def test_a_warning_with_an_alert_is_all_three() -> None:
    shown: list[str] = []
    sink = Called()
    telemetry = Telemetry([sink], shown.append)
    for step in (1, 2):
        telemetry.warn(f"step {step}: rollout worker 0 is late", "push", "rollout worker 0", step=step)
    telemetry.warn("nothing to call anybody for")
    assert len(shown) == 3 and sink.alerts == [("push", "step 1: rollout worker 0 is late")]
    assert sink.events == [
        ("warning", {"step": 1, "alert": "push"}),
        ("warning", {"step": 2, "alert": "push"}),
        ("warning", {}),
    ]


def test_every_cause_has_a_title_of_its_own_that_wandb_takes() -> None:
    assert TITLES.keys() == set(get_args(AlertKind))
    subjects = ("", "rollout worker 10", "rollout worker 11", THE_END)
    titles = [title_of(kind, subject) for kind in TITLES for subject in subjects]
    assert len(set(titles)) == len(titles) and max(map(len, titles)) < 64
    assert title_of("push", "x" * 100).startswith("A worker missed a weight push: xxx")
    assert len(title_of("push", "x" * 100)) == 63
