"""A copy of the shared run goes on until a reward hangs."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, SharedRun, end, wait_until

from rlhf_dist.config.load import from_yaml
from rlhf_dist.data.stream import PromptStream
from rlhf_dist.models.checkpoints import checkpoint_steps

pytestmark = pytest.mark.timeout(1500)
PROMPTS, FIRST = 6, 4


@dataclass(frozen=True)
class History:
    """What happened to the run."""

    path: Path
    hung: Finished
    end: int
    """Step of the newest checkpoint when the hanging reward had ended the run."""


def newest(path: Path) -> int:
    return max(checkpoint_steps(path / "checkpoints"))


@pytest.fixture(scope="module")
def history(shared_run: SharedRun) -> History:
    place = shared_run.workplace
    path = place.output / "again"
    shutil.copytree(shared_run.path, path)
    words = ["train", "--resume", "name=again", f"model.path={place.output / 'sft'}", "loop.checkpoint_every=1"]
    process = place.start(*words, "loop.steps=1000", "eval.every=0", "cluster.start_timeout_s=200")
    try:
        wait_until(lambda: newest(path) > FIRST, process)
        (place.folder / "hang").touch()
        hung = place.finish(process)
    finally:
        end(process)
        (place.folder / "hang").unlink(missing_ok=True)
    return History(path, hung, newest(path))


def steps(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "reward/mean" in line]


def uses(path: Path) -> list[tuple[str, int]]:
    with sqlite3.connect(f"file:{path / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        return ledger.execute("SELECT uid, step FROM uses ORDER BY step, uid").fetchall()


def test_a_reward_that_hangs_ends_the_run_with_one_message(history: History) -> None:
    assert history.hung.code == 1
    message = history.hung.stderr.splitlines()[-1]
    assert message.startswith("rlhf-dist: the reward letters (run_rewards:letters) did not return within 5 s")
    assert "Traceback" not in history.hung.stderr + history.hung.stdout
    assert history.end > FIRST, "and what was saved is kept"


def test_steps_go_on_by_number_and_none_is_told_twice(history: History) -> None:
    assert [line["step"] for line in steps(history.path)] == list(range(1, history.end + 1))


def test_what_was_done_before_stays_as_it_was(history: History, shared_run: SharedRun) -> None:
    assert steps(history.path)[:FIRST] == steps(shared_run.path)
    assert uses(history.path)[: FIRST * PROMPTS] == uses(shared_run.path)


def test_no_prompt_is_skipped_or_used_twice(history: History) -> None:
    """Whatever was under way when the run ended: the prompts used are the stream's first ones, in its order."""
    found = uses(history.path)
    assert Counter(step for _, step in found) == dict.fromkeys(range(1, history.end + 1), PROMPTS)
    config = from_yaml((history.path / "config.yaml").read_text())
    stream = PromptStream(config.data, config.seed, config.eval.prompts)
    for step in range(1, history.end + 1):
        expected = {prompt.uid for prompt in stream.take(PROMPTS)}
        assert {uid for uid, used_at in found if used_at == step} == expected, step


def test_resumed_steps_are_on_policy_and_agree(history: History) -> None:
    for line in steps(history.path):
        assert line["rollout/policy_lag_max"] == 0 and line["rollout/logprob_diff_max"] <= 1e-4
    # Warm-up is over: a resume does not begin it anew.
    assert {line["learner/lr"] for line in steps(history.path)[FIRST:]} == {1e-3}


def test_the_last_checkpoint_is_the_last_step(history: History) -> None:
    assert newest(history.path) == history.end
    assert len(checkpoint_steps(history.path / "checkpoints")) == 2, "loop.keep_checkpoints"
    assert not list((history.path / "checkpoints").glob(".*unfinished"))


def test_the_resume_is_told(history: History) -> None:
    events = [json.loads(line) for line in (history.path / "events.jsonl").read_text().splitlines()]
    assert [event["facts"]["step"] for event in events if event["kind"] == "resume"] == [FIRST]
