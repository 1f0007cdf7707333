"""A run on three nodes in network namespaces of their own: one is cut off for a while, another is cut off, killed, and
comes back. The learner is on the first, a rollout worker on each of the others."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from matrix_runs import RESULTS, at, lines

sys.path.insert(0, str(ROOT / "tests" / "launch"))
from test_netns_cluster import LOCAL_ONLY, SCRIPT, needs_namespaces

pytestmark = [pytest.mark.engines, pytest.mark.faults, pytest.mark.timeout(600), needs_namespaces]
BIN = Path(sys.executable).parent
LIMIT_S = 150.0
"""For each wait."""
STEPS, PROMPTS = 250, 4
CONFIG = """
include: [{base}]
output: {output}
name: nodes
data: {{task: {{max_length: 3}}}}
algo: {{group_size: 4}}
rollout: {{cpus: 1, workers: 2, max_prompt_tokens: 40, max_response_tokens: 8, kv_cache_gib: 0.05}}
learner: {{cpus: 1}}
scoring: {{rewards: {{vowels: {{kind: function, function: "node_rewards:vowels"}}}}}}
weights: {{timeout_s: 20}}
loop: {{steps: {steps}, prompts_per_step: {prompts}, checkpoint_every: 0}}
eval: {{prompts: 4, every: 0, samples: 0}}
faults: {{heartbeat_s: 5}}
telemetry: {{wandb: "off", samples_every: 0}}
cluster: {{device: cpu, colocate: false}}
"""
REWARDS = """
import os, time

def vowels(prompts, responses, answers):
    if not os.path.exists(os.path.join(os.path.dirname(__file__), "hurry")):
        time.sleep(0.25)  # so that there are steps left when the nodes are back
    return [sum(response.count(letter) for letter in "aeiou") / 10 for response in responses]
"""
START = """
mount -t tmpfs -o size=2g tmpfs /dev/shm && mount -t tmpfs tmpfs {temp}
exec {ray} start --block --address={net}.1:6379 --node-ip-address={net}.{number} --num-cpus=1 --num-gpus=0 \
  --disable-usage-stats --object-store-memory=200000000
"""


@dataclass
class Nodes:
    """Three nodes, and the run on them."""

    process: subprocess.Popen[bytes]
    run: Path
    token: str
    seconds: dict[str, float] = field(default_factory=dict)
    """What was seen -> seconds after what was done."""
    back: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def link(self, number: int, state: str) -> None:
        """Of a node, `up` or `down`, at the bridge."""
        subprocess.run(["ip", "link", "set", f"rv{self.process.pid}-{number}", state], check=True)

    def pids(self, number: int) -> list[int]:
        words = ["ip", "netns", "pids", self.space(number)]
        return [int(pid) for pid in subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()]

    def space(self, number: int) -> str:
        return f"rlhf-{self.process.pid}-{number}"

    def kill(self, number: int) -> None:
        for pid in self.pids(number):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start(self, number: int) -> None:
        """The node again, as `launch/netns_cluster.sh` starts it."""
        command = b" ".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.pids(1))
        (temp,) = set(re.findall(rb"/tmp/rlhf-netns-\w{6}\b", command))
        net = f"10.77.{self.process.pid % 250}"
        script = START.format(temp=temp.decode(), ray=BIN / "ray", net=net, number=number)
        words = ["ip", "netns", "exec", self.space(number), "unshare", "--mount", "--propagation", "private"]
        environment = clean() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "PYTHONPATH": str(ROOT)}
        started = subprocess.Popen([*words, "bash", "-ec", script], env=environment, stdout=subprocess.DEVNULL)
        self.back.append(started)

    def events(self) -> list[dict[str, Any]]:
        return lines(self.run / "events.jsonl")

    def step(self) -> int:
        return max((line["step"] for line in lines(self.run / "metrics.jsonl")), default=0)

    def until(self, name: str, come: Callable[[], bool]) -> None:
        """Wait while the run goes on."""
        begun = time.monotonic()
        while not come():
            assert self.process.poll() is None, f"the run ended while it was waited for: {name}"
            assert time.monotonic() - begun < LIMIT_S, f"did not come: {name}: {self.events()[-3:]}"
            time.sleep(0.1)
        self.seconds[name] = round(time.monotonic() - begun, 1)

    def steps(self, name: str, count: int) -> None:
        last = self.step() + count
        self.until(name, lambda: self.step() >= last)

    def told(self, text: str, since: float) -> Callable[[], bool]:
        """Whether this is reported of a rollout worker; its node's weight relay has reports of its own."""
        told = re.compile(rf"rollout worker \d {text}")
        return lambda: any(told.match(event["message"]) and at(event) > since for event in self.events())


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in LOCAL_ONLY}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    base = ROOT / "configs" / "reverse.yaml"
    (folder / "run.yaml").write_text(CONFIG.format(base=base, output=folder / "runs", steps=STEPS, prompts=PROMPTS))
    (folder / "node_rewards.py").write_text(REWARDS)
    token = secrets.token_hex(32)
    words = [str(SCRIPT), "--nodes", "3", "--cpus", "1", str(BIN / "rlhf-dist"), "train", "run.yaml"]
    with (folder / "out.txt").open("wb") as out:
        process = subprocess.Popen(
            words, cwd=folder, env=clean() | {"RAY_AUTH_TOKEN": token, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=out
        )
    found = Nodes(process, folder / "runs" / "nodes", token)
    try:
        yield found
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        for one in found.back:
            one.kill()
        print((folder / "out.txt").read_text()[-3000:])


def test_a_node_is_cut_off_and_back_and_another_is_killed_and_comes_back(nodes: Nodes) -> None:
    nodes.until("first steps", lambda: nodes.step() >= 2)
    began = time.time()
    nodes.link(2, "down")
    nodes.until("cut off: noticed", nodes.told("waits for node", began))
    nodes.steps("cut off: two steps without it", 2)
    began = time.time()
    nodes.link(2, "up")
    nodes.until("link up: its worker is ready", nodes.told("is ready again", began))
    nodes.steps("link up: two more steps", 2)
    began = time.time()
    nodes.link(3, "down")
    nodes.until("cut off and killed: noticed", nodes.told("waits for node", began))
    nodes.kill(3)
    nodes.steps("cut off and killed: five steps without it", 5)
    began = time.time()
    nodes.link(3, "up")
    nodes.start(3)
    nodes.until("started again: its worker is ready", nodes.told("is ready again", began))
    nodes.steps("started again: two more steps", 2)
    (nodes.run.parents[1] / "hurry").touch()
    assert nodes.process.wait(LIMIT_S) == 0
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "faults-nodes.json").write_text(json.dumps(nodes.seconds, indent=1))


def test_its_ledger_is_exact_and_both_workers_serve_at_the_end(nodes: Nodes) -> None:
    ledger = json.loads((nodes.run / "summary.json").read_text())["ledger"]
    assert "0 in flight, 0 lost, 0 used twice" in ledger and f"{STEPS * PROMPTS} trained once" in ledger
    waits = [event["message"] for event in nodes.events() if "waits for node" in event["message"]]
    workers = [message for message in waits if message.startswith("rollout worker")]
    assert len(workers) == 2 and all("; the run goes on without it" in message for message in workers)
    last = lines(nodes.run / "metrics.jsonl")[-1]
    assert last["rollout/engine_tokens_per_s_min"] > 0, "both have work"
