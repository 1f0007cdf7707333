"""A real run whose halves work at once: generation with one core, the learner with the other, one version apart.

Its task has two turns, so pushes come within conversations too.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import SharedRun

pytestmark = pytest.mark.timeout(600)
LAG, STEPS, PROMPTS = 1, 6, 6


@dataclass(frozen=True)
class Lagging:
    path: Path
    stdout: str

    @property
    def steps(self) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [line for line in found if "reward/mean" in line]


@pytest.fixture(scope="module")
def lagging(shared_run: SharedRun) -> Lagging:
    place = shared_run.workplace
    words = ["rollout.workers=1", "learner.ranks=1", "learner.zero_stage=0", "cluster.colocate=false"]
    words += [f"loop.max_policy_lag={LAG}", "algo.ratio_to=behaviour", f"loop.steps={STEPS}", "eval.every=3"]
    words += ["rollout.max_concurrent=8"]  # two groups at a time: pushes come while others run
    words += ["rollout.kv_after_push=keep"]
    words += ["data.task.name=guess", "data.task.max_length=2", "rollout.max_prompt_tokens=56"]
    run = place.run("train", "name=lagging", f"model.path={place.output / 'sft'}", *words)
    assert run.code == 0, run.stderr
    return Lagging(place.output / "lagging", run.stdout)


def test_generation_runs_ahead_and_no_further_than_allowed(lagging: Lagging) -> None:
    found = [line["rollout/policy_lag_max"] for line in lagging.steps]
    assert len(found) == STEPS and found[0] == 0 and max(found) == LAG


def test_tokens_of_the_learners_own_weights_agree_and_older_ones_are_told_apart(lagging: Lagging) -> None:
    """The learner moves by much more than 1e-4 a step, so a token with a wrong version would show.

    So would one that its own weights sampled from kept keys and values of older ones.
    """
    fresh = [line["rollout/logprob_diff_max"] for line in lagging.steps if "rollout/logprob_diff_max" in line]
    stale = [line["rollout/logprob_diff/lag_1"] for line in lagging.steps if "rollout/logprob_diff/lag_1" in line]
    # A step may have so few such tokens, where the learner was slow, that they agree to the last bit.
    assert all(value <= 1e-4 for value in fresh) and max(fresh) > 0, fresh
    assert stale and max(stale) > 1e-3, stale


def test_nothing_is_lost_or_used_twice_and_every_token_is_accounted_for(lagging: Lagging) -> None:
    sentence = (
        f"{STEPS * PROMPTS} groups issued: {STEPS * PROMPTS} trained once, 0 dropped, 0 in flight, 0 lost, 0 used twice"
    )
    ledger = json.loads((lagging.path / "summary.json").read_text())["ledger"]
    assert ledger.startswith(sentence) and all(line in lagging.stdout for line in ledger.split("; "))
    tokens = int(sum(line["rollout/response_tokens"] for line in lagging.steps))
    assert ledger.endswith(f"{tokens} tokens sampled: {tokens} trained on, 0 dropped, 0 lost")


def test_groups_are_issued_before_the_version_that_learns_from_them(lagging: Lagging) -> None:
    with sqlite3.connect(f"file:{lagging.path / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        behind = ledger.execute("SELECT step - 1 - version, COUNT(*) FROM groups GROUP BY 1").fetchall()
    found = dict(behind)
    assert found.keys() <= {0, LAG} and found[LAG] > PROMPTS


def test_open_groups_are_in_the_checkpoints_of_the_middle(lagging: Lagging) -> None:
    newest = sorted((lagging.path / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    counts = {path.name: len(json.loads((path / "state.json").read_text())["open"]) for path in newest}
    assert counts[f"step-{STEPS}"] == 0 and counts[f"step-{STEPS - 2}"] > 0


def test_conversations_of_two_turns_are_trained_on_whole(lagging: Lagging) -> None:
    """A response is at most 8 tokens long, what is trained on in one conversation is longer."""
    assert max(line["rollout/response_length_max"] for line in lagging.steps) > 8
