"""docs/metrics.md has every metric that the source names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from rlhf_dist.algo.losses import clipped_policy_loss, clipped_value_loss
from rlhf_dist.learner.token_sums import EstimateSums
from rlhf_dist.loop.devices import EngineLoads
from rlhf_dist.telemetry.goodput import RECOVER, ActorSide, Goodput
from rlhf_dist.telemetry.timeline import Stopwatch
from rlhf_dist.types import Beat

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
NAME = re.compile(
    r"(reward|policy|rollout|learner|sync|time|goodput|data|eval|kl|critic|watch|sft|reward_model|ptx|faults)/\w+"
)
ROOMS = ("telemetry", "loop", "learner")
PHASES = ("generate", "value", "train", "sync")
PATTERNS = {"data/dropped_": "data/dropped_REASON", "eval/pass_at_": "eval/pass_at_K"}
"""Beginnings of names that end with something of the run."""


def listed() -> set[str]:
    """The names in the first column of the page's tables."""
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def texts(room: str) -> Iterator[str]:
    """Every text in the source of a room."""
    for file in sorted((ROOT / "rlhf_dist" / room).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def goodput_names() -> set[str]:
    """Of a run with a critic that lost a rank."""
    now = iter(range(100))
    goodput = Goodput(lambda: ActorSide(1, 1, 1, 1), lambda: float(next(now)))
    for phase in (*PHASES, RECOVER, ""):
        goodput.phase(phase)
    return set(goodput.lap())


def test_every_name_in_the_source_is_on_the_page() -> None:
    found = {text for room in ROOMS for text in texts(room) if NAME.fullmatch(text)}
    found -= {text for text in found if text.endswith("_") and text not in PATTERNS}  # put together: the next test
    assert len(found) > 60, "the search finds what it looks for"
    assert {PATTERNS.get(name, name) for name in found} - listed() == set()


def test_names_that_are_put_together_are_on_the_page() -> None:
    one = torch.ones(1)
    _, policy = clipped_policy_loss(one, one, one, clip_low=0.2, clip_high=0.2)
    _, critic = clipped_value_loss(one, one, one, clip=0.2)
    watch = Stopwatch()
    for phase in PHASES:
        with watch.phase(phase):
            pass
    names = {f"policy/{name}" for name in policy} | {f"critic/{name}" for name in critic} | set(watch.lap())
    names |= goodput_names() | set(EngineLoads().metrics({"a": Beat("a", 1)}))
    assert (names | set(EstimateSums(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0).metrics())) - listed() == set()


def test_the_page_lists_nothing_that_is_not_there() -> None:
    everything = "\n".join(text for room in (*ROOMS, "algo") for text in texts(room))
    made = {f"time/{name}" for name in PHASES} | goodput_names() | set(EngineLoads().metrics({"a": Beat("a", 1)}))
    for name in listed() - made:
        bare = re.sub(r"(REASON|NAME|K)$", "", name)
        assert bare in everything or name.split("/")[1] in everything, name
