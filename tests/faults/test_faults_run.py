"""A real run that loses a process of each kind that is started again, the learner's rank among them, and comes to the
same as one that loses none."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Finished, Workplace, end, wait_until

from rlhf_dist.scoring.sandbox import sandbox_problem
from rlhf_dist.weights.shared_memory import STATE, STATE_LOCK

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
STEPS = 10
CONFIG = """
include: [{base}]
output: {output}
rollout: {{cpus: 1, max_response_tokens: 24}}
learner: {{cpus: 1, keep_state_every: 1}}
reference: {{replicas: 1}}
algo: {{kl: {{coef: 0.05}}}}
scoring: {{rewards: {{vowels: {{kind: function, function: "fault_rewards:vowels"}}}}}}
loop: {{steps: {steps}, prompts_per_step: 4, checkpoint_every: 0}}
eval: {{prompts: 4, every: 0, samples: 1}}
faults: {{heartbeat_s: 5}}
cluster: {{address: local, device: cpu}}
telemetry: {{wandb: "off", samples_every: 0}}
"""
REWARDS = """
import socket
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent

def vowels(prompts, responses, answers):
    with suppress(OSError):
        HERE.joinpath("written").touch()
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", int(HERE.joinpath("port").read_text())), timeout=5).close()
    return [sum(response.count(letter) for letter in "aeiou") / 10 for response in responses]
"""
"""Tries to write a file and to connect to a port; the run that loses processes has it in a sandbox."""
FAULTS = [
    ("rollout worker 0", signal.SIGKILL, "killed by SIGKILL"),
    ("scoring server 0", signal.SIGSTOP, "gave no sign of life for 5 s (faults.heartbeat_s): it is stopped (state T)"),
    ("reference server 0", signal.SIGKILL, "killed by SIGKILL"),
    ("learner rank 0", signal.SIGKILL, "killed by SIGKILL"),
]
"""(whom, how, what is said of it), one after the other."""
RANKS = ("learner rank 0",)
TIMES = ("time/", "goodput/", "rollout/group_s", "rollout/engine_", "faults/")


@dataclass(frozen=True)
class Faulty:
    """What was run; tests change nothing in it."""

    folder: Path
    end: Finished
    reached: dict[str, tuple[bool, bool]]
    """By run: whether its reward wrote the file, and connected to the port."""

    def path(self, name: str) -> Path:
        return self.folder / "runs" / name

    def lines(self, name: str, file: str) -> list[dict[str, Any]]:
        return lines(self.path(name) / file)


def lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file that may be being written."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    except FileNotFoundError:
        return []


def returned(run: Path) -> int:
    return sum(event["kind"] in ("returned", "rebuilt") for event in lines(run / "events.jsonl"))


def last_step(run: Path) -> int:
    return max((line["step"] for line in lines(run / "metrics.jsonl")), default=0)


def hit(run: Path, process: subprocess.Popen[str], number: int) -> None:
    """The next fault, in the middle of a step; returns once the process is back, and a step has been made with it."""
    name, how, _ = FAULTS[number]
    pid = json.loads((run / "logs" / f"{name.replace(' ', '-')}.pid").read_text())["pid"]
    os.kill(pid, how)
    wait_until(lambda: returned(run) == number + 1, process)
    step = last_step(run)
    wait_until(lambda: last_step(run) > step, process)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("faulty")
    place = Workplace(folder)
    base = ROOT / "configs" / "reverse.yaml"
    (folder / "run.yaml").write_text(CONFIG.format(base=base, output=folder / "runs", steps=STEPS))
    (folder / "fault_rewards.py").write_text(REWARDS)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as port:
        (folder / "port").write_text(str(port.getsockname()[1]))
        whole = place.finish(place.start("train", "name=whole"))
        assert whole.code == 0, whole.stderr
        reached = {"whole": what_was_reached(folder, port)}
        sandbox = f"scoring.rewards.vowels.sandbox={'false' if sandbox_problem() else 'true'}"
        process, run = place.start("train", "name=faulty", sandbox), folder / "runs" / "faulty"
        try:
            wait_until(lambda: last_step(run) > 1, process)  # the state after the first is kept
            for number in range(len(FAULTS)):
                hit(run, process, number)
            finished = place.finish(process)
        finally:
            end(process)
        yield Faulty(folder, finished, reached | {"faulty": what_was_reached(folder, port)})


def what_was_reached(folder: Path, port: socket.socket) -> tuple[bool, bool]:
    """By a reward, since it was asked last: the file, and the port."""
    wrote, came = (folder / "written").exists(), False
    (folder / "written").unlink(missing_ok=True)
    port.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            port.accept()[0].close()
            came = True
    return wrote, came


def test_a_sandbox_keeps_the_reward_from_files_and_ports(faulty: Faulty) -> None:
    """And changes none of its scores, as the next test shows."""
    if problem := sandbox_problem():
        pytest.skip(f"no sandbox on this machine: {problem}")
    assert faulty.reached == {"whole": (True, True), "faulty": (False, False)}


def test_it_comes_to_the_same_bit_for_bit(faulty: Faulty) -> None:
    assert faulty.end.code == 0, faulty.end.stderr
    found, whole = (faulty.lines(name, "metrics.jsonl") for name in ("faulty", "whole"))
    assert len(found) == STEPS + 1
    for one, other in zip(found, whole, strict=True):
        assert {key: one[key] for key in one if not key.startswith(TIMES)} == {
            key: other[key] for key in other if not key.startswith(TIMES)
        }
    model = Path("checkpoints") / f"step-{STEPS}" / "hf" / "model.safetensors"
    assert (faulty.path("faulty") / model).read_bytes() == (faulty.path("whole") / model).read_bytes()
    assert sum(line["learner/grad_norm"] > 0 for line in found[1:]) == STEPS, "there was something to learn"


def test_each_loss_is_told_with_its_cause_and_the_return(faulty: Faulty) -> None:
    events = faulty.lines("faulty", "events.jsonl")
    told = [event["message"] for event in events if event["facts"].get("alert") == "fault"]
    assert len(told) == len(FAULTS)
    for message, (name, _, why) in zip(told, FAULTS, strict=True):
        end = "all ranks are started again, from step" if name in RANKS else f"{name} is started again"
        assert message.startswith(name) and why in message and end in message.split("; ")[-1]
    back = [event["message"] for event in events if event["kind"] == "returned"]
    assert back == [f"{name} is ready again" for name, _, _ in FAULTS if name not in RANKS]


def test_of_each_that_was_stopped_it_is_written_where_it_was_and_how_far_all_were(faulty: Faulty) -> None:
    late = [event for event in faulty.lines("faulty", "events.jsonl") if event["kind"] == "late"]
    stopped = [name for name, how, _ in FAULTS if how == signal.SIGSTOP]
    assert [event["facts"]["silent"] for event in late] == [[name] for name in stopped]
    texts: list[str] = []
    for event, name in zip(late, stopped, strict=True):
        members = event["facts"]["members"]
        assert set(members) == {name for name, _, _ in FAULTS} | {"collator"}
        assert members[name]["without_sign_s"] >= 5 > members["collator"]["without_sign_s"]
        counts = {kind: value for facts in members.values() for kind, value in facts["counts"].items()}
        assert counts["tokens"] > counts["steps"] > 0 and counts["optimizer_steps"] > 0 and counts["groups"] > 0
        text = Path(event["facts"]["stacks"]).read_text()
        assert text.startswith(event["message"]) and f"==== {name} ====" in text
        texts.append(text)
    assert any("pulse (rlhf_dist/cluster/roster.py" in text for text in texts), "the thread that was to answer"
    told = [event["message"] for event in faulty.lines("faulty", "events.jsonl") if event["kind"] == "warning"]
    assert all(any(event["facts"]["stacks"] in line for line in told) for event in late)


def test_a_lost_rank_costs_one_step_at_most(faulty: Faulty) -> None:
    """Each resume goes on from the state of the last step that was whole: no more than its groups are issued again."""
    events = faulty.lines("faulty", "events.jsonl")
    rebuilt = [event["facts"] for event in events if event["kind"] == "rebuilt"]
    resumed = [event["facts"] for event in events if event["kind"] == "resume"]
    assert len(rebuilt) == len(resumed) == sum(name in RANKS for name, _, _ in FAULTS)
    for built, again in zip(rebuilt, resumed, strict=True):
        assert built["kept"] and built["step"] == again["step"] > 0
        assert again["metrics_moved"] <= 1 and again["prompts_reissued"] <= 2 * 4
    assert not left_in_memory(), "its memory is given back"


def left_in_memory() -> list[Path]:
    """Folders of states whose run has ended; other tests run beside this one."""
    found: list[Path] = []
    for folder in Path("/dev/shm").glob(f"rlhf_dist-{os.getuid()}-*{STATE}"):
        with suppress(FileNotFoundError), folder.with_suffix(STATE_LOCK).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
        found.append(folder)
    return [folder for folder in found if folder.exists()]


def test_nothing_is_lost_or_used_twice(faulty: Faulty) -> None:
    ledger = json.loads((faulty.path("faulty") / "summary.json").read_text())["ledger"]
    assert "0 in flight, 0 lost, 0 used twice" in ledger
    assert f"{STEPS * 4} trained once" in ledger


def test_each_is_counted(faulty: Faulty) -> None:
    summary = json.loads((faulty.path("faulty") / "summary.json").read_text())["faults"]
    last = faulty.lines("faulty", "metrics.jsonl")[-1]
    ranks = sum(name in RANKS for name, _, _ in FAULTS)
    assert (last["faults/losses"], last["faults/rebuilds"]) == (summary["losses"], summary["rebuilds"])
    assert (summary["losses"], summary["rebuilds"]) == (len(FAULTS), ranks)
    assert summary["respawns"] == len(FAULTS) - ranks and summary["recover_s"] > 0
    assert f"faults: {len(FAULTS)}; started again: " in faulty.end.stdout
    assert "faults" not in json.loads((faulty.path("whole") / "summary.json").read_text())
