"""The synchronous loop is exact: what a run comes to depends neither on an interruption nor on who samples.

Two real runs of one config. One is undisturbed and has one rollout worker. The other has three, is killed in the middle
of its last step and resumed from its first checkpoint; then one of its workers is killed while it samples, and two are
left. Their weights and metrics are equal bit for bit. The sizes are those of `configs/reverse.yaml`, the prompts are
long and share a system turn, and the cache of keys and values is so small that vLLM preempts requests. The optimizer of
the second one is asked what it took (`loop.witness`), which changes nothing either.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, Finished, Workplace, end, family, wait_until

from rlhf_dist.models.checkpoints import checkpoint_steps

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
STEPS, PROMPTS, KEPT = 3, 4, 1
"""Steps of each run, groups of each step, and the step of the checkpoint that the killed run is resumed from."""
GONE_LIMIT_S = 30.0
TIMES = ("time/", "goodput/", "rollout/group_s", "rollout/engine_", "faults/")

CONFIG = """
include: [{base}]
output: {output}
data: {{system: "{system}"}}
algo: {{group_size: 8}}
scoring: {{rewards: {{vowels: {{kind: function, function: "exact_rewards:vowels"}}}}}}
rollout: {{cpus: 1, max_prompt_tokens: 352, max_response_tokens: 64, kv_cache_gib: 0.012, max_concurrent: 64}}
learner: {{cpus: 1}}
loop: {{steps: {steps}, prompts_per_step: {prompts}, checkpoint_every: 1, keep_checkpoints: 9}}
eval: {{prompts: 2, every: 0, samples: 1}}
cluster: {{address: local, device: cpu}}
telemetry: {{wandb: "off", samples_every: 0}}
"""
SYSTEM = "you are a careful assistant and answer with one short word. " * 6
REWARDS = """
import time
from pathlib import Path

def vowels(prompts, responses, answers):
    while Path(__file__).with_name("hold").exists():
        time.sleep(0.02)
    return [sum(response.count(letter) for letter in "aeiou") / 10 for response in responses]
"""
"""The reward gives no score while there is a file `hold` beside it: a run does not get past the groups it has then."""
PLUGIN = """
from vllm.v1.core.sched.scheduler import Scheduler

def register():
    schedule = Scheduler.schedule

    def told(self, *args, **kwargs):
        found = schedule(self, *args, **kwargs)
        if found.preempted_req_ids:
            print(f"vLLM preempted {len(found.preempted_req_ids)} requests", flush=True)
        return found

    Scheduler.schedule = told
"""
"""A plugin of vLLM, installed in a folder of runs: it writes what the scheduler preempts into the worker's log."""

THREE_CPUS = """
from rlhf_dist.planning import placement

placement.local_machine = lambda: placement.Machine(cpus=3, gpus=0)
from rlhf_dist.__main__ import run

raise SystemExit(run())
"""
"""The command on a machine that says that it has three CPUs, so that there is a place for three workers."""


@dataclass(frozen=True)
class Runs:
    """What was run; tests change nothing in it."""

    folder: Path
    in_flight: int
    """Groups that were under way when the driver was killed."""
    left_behind: list[str]
    """Names of the driver's processes that were there long after it."""
    last: Finished
    """The end of the resumed run, whose worker was killed."""

    def path(self, name: str) -> Path:
        return self.folder / "runs" / name


def place_in(folder: Path) -> Workplace:
    """A folder for runs, with the config, its reward and the plugin. One for each run that is started side by side."""
    folder.mkdir()
    base, output = ROOT / "configs" / "reverse.yaml", folder.parent / "runs"
    config = CONFIG.format(base=base, output=output, system=SYSTEM[:320], steps=STEPS, prompts=PROMPTS)
    (folder / "run.yaml").write_text(config)
    (folder / "exact_rewards.py").write_text(REWARDS)
    (folder / "preemptions.py").write_text(PLUGIN)
    (folder / "three_cpus.py").write_text(THREE_CPUS)
    about = folder / "preemptions-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: preemptions\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\npreemptions = preemptions:register\n")
    return Workplace(folder)


def states(run: Path) -> list[tuple[str, int]]:
    """(state, groups' version) of every attempt in a ledger that is being written."""
    try:
        with sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
            return ledger.execute("SELECT state, version FROM groups").fetchall()
    except sqlite3.OperationalError:
        return []  # It is not there yet.


def of_step(run: Path, step: int) -> set[str]:
    """States of the groups of the step after `step`."""
    return {state for state, version in states(run) if version == step}


def in_the_middle(run: Path) -> bool:
    """Whether the last step has a group that is sampled and has no score, and the step before it is kept."""
    return (run / "checkpoints" / f"step-{STEPS - 1}").exists() and "finished" in of_step(run, STEPS - 1)


def begun(run: Path) -> bool:
    """Whether the groups of the step after the kept one have just been handed out."""
    return [state for state, version in states(run) if version == KEPT] == ["issued"] * PROMPTS


def wait_for_end(members: list[psutil.Process]) -> list[str]:
    """Names of the processes that are still there when the limit is over; they are killed.

    Ray's two agents, which hold nothing of a run, try to reach the dead node for a minute first: not waited for.
    """
    waited_for = [member for member in members if member.is_running() and not member.name().endswith("Agent")]
    deadline = time.monotonic() + GONE_LIMIT_S
    while (alive := [member for member in waited_for if is_alive(member)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    names = [member.name() for member in alive]
    for member in members:
        if is_alive(member):
            member.kill()
    return names


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("exact")
    alone, three = (place_in(folder / name) for name in ("alone", "three"))
    run, how = folder / "runs" / "killed", {"program": ["three_cpus.py"]}
    words = ["name=killed", "rollout.workers=3", "loop.witness=true"]
    with ExitStack() as stack:

        def start(place: Workplace, *words: str, **how: Any) -> subprocess.Popen[str]:
            process = place.start("train", *words, **how)
            stack.callback(end, process)
            return process

        # Two at a time: they start faster side by side.
        whole, killed = start(alone, "name=whole"), start(three, *words, **how)
        wait_until(lambda: "issued" in of_step(run, STEPS - 1), killed)
        hold = three.folder / "hold"
        hold.touch()
        wait_until(lambda: in_the_middle(run), killed)
        members = family(killed.pid)
        assert sum(member.name().startswith("ray::RolloutHost") for member in members) == 3
        killed.kill()
        killed.wait(30)
        left_behind = wait_for_end(members)
        hold.unlink()
        in_flight = sum(state in ("issued", "finished", "scored") for state, _ in states(run))
        assert checkpoint_steps(run / "checkpoints") == [KEPT, STEPS - 1]
        resumed = start(three, *words, "--resume-from", f"step-{KEPT}", **how)
        wait_until(lambda: begun(run), resumed)
        time.sleep(0.2)  # of the second or more that it takes to sample them
        os.kill(json.loads((run / "logs" / "rollout-worker-0.pid").read_text())["pid"], signal.SIGKILL)
        last = three.finish(resumed)
        undisturbed = alone.finish(whole)
        assert undisturbed.code == 0, undisturbed.stderr
    return Runs(folder, in_flight, left_behind, last)


def metrics(run: Path) -> list[dict[str, Any]]:
    """What was logged of every step, without times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [without_times(line) for line in found]


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith(TIMES)}


def files(run: Path, step: int | str) -> dict[str, bytes]:
    """The tensors of a checkpoint: weights and the optimizer's state."""
    folder = run / "checkpoints" / f"step-{step}"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_the_runs_are_the_kind_that_is_hard(runs: Runs) -> None:
    """Rewards differ, weights move, prompts are long, and requests are preempted with one worker and with two."""
    for line in metrics(runs.path("whole"))[1:]:
        assert line["reward/std"] > 0 and line["learner/grad_norm"] > 0 and line["sync/changed_share"] > 0
        assert line["learner/tokens"] / (PROMPTS * 8) > 300
    for name, worker in (("whole", 0), ("killed", 1), ("killed", 2)):
        assert "vLLM preempted" in (runs.path(name) / "logs" / f"rollout-worker-{worker}.log").read_text(), name


def test_metrics_and_weights_are_equal_bit_for_bit(runs: Runs) -> None:
    """The first step with three workers, the second with three and then two, the last with two."""
    assert runs.last.code == 0, runs.last.stderr
    whole, other = runs.path("whole"), runs.path("killed")
    expected = metrics(whole)
    assert [line["step"] for line in expected] == list(range(STEPS + 1))
    assert metrics(other) == expected
    for step in range(1, STEPS + 1):
        assert files(other, step) == files(whole, step), step
    assert files(whole, 1) != files(whole, STEPS)
    ends = [json.loads((run / "summary.json").read_text()) for run in (whole, other)]
    for table in ("before", "after"):  # the start of the run before it was killed
        assert without_times(ends[1][table]) == without_times(ends[0][table])


def test_what_was_set_aside_is_equal_too(runs: Runs) -> None:
    """The step after the kept checkpoint was made twice: with three workers, and with one that died."""
    assert files(runs.path("killed"), f"{KEPT + 1}.set-aside") == files(runs.path("whole"), KEPT + 1)


def test_a_killed_driver_leaves_no_process(runs: Runs) -> None:
    assert runs.left_behind == []


def test_a_resume_begins_the_groups_again_that_came_after_its_checkpoint(runs: Runs) -> None:
    """Those of a whole step, and those that were under way."""
    assert runs.in_flight > 0
    events = [json.loads(line) for line in (runs.path("killed") / "events.jsonl").read_text().splitlines()]
    (facts,) = [event["facts"] for event in events if event["kind"] == "resume"]
    assert (facts["step"], facts["prompts_reissued"]) == (KEPT, PROMPTS + runs.in_flight)


def test_what_a_killed_worker_had_begins_again_elsewhere(runs: Runs) -> None:
    events = [json.loads(line) for line in (runs.path("killed") / "events.jsonl").read_text().splitlines()]
    aside, lost_worker = [event["message"] for event in events if event["kind"] == "warning"]
    assert aside.startswith("later checkpoints are not used any more and are kept as step-2.set-aside")
    assert lost_worker.startswith("rollout worker 0 ") and "begin again" in lost_worker
    ledger = json.loads((runs.path("killed") / "summary.json").read_text())["ledger"]
    lost = sum(state == "dropped" for state, _ in states(runs.path("killed")))
    total = STEPS * PROMPTS
    assert lost > 0
    assert ledger.startswith(
        f"{total + lost} groups issued: {total} trained once, {lost} dropped ({lost} worker_lost), 0 in flight, "
        "0 lost, 0 used twice; "
    )
    witness = ledger.split("; ", 2)[2]
    assert witness.startswith(f"witness: {STEPS} of {STEPS} steps: the optimizer took ")
    assert witness.endswith(f"; this agrees with {total} groups in the ledger")
