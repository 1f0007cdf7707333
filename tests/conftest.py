"""What tests share: the environment, set before anything heavy is imported, and one real run that many tests read."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
from forks import ForkServer
from hypothesis import settings

from rlhf_dist.cluster import session
from rlhf_dist.config.schema import ClusterConfig, TinyConfig

ROOT = Path(__file__).resolve().parents[1]
COMMAND_LIMIT_S = 400.0
"""Far more than a run of the tests needs on two busy cores."""

STARTS_ENGINES = {"shared_run", "local_ray", "judged"}
"""Fixtures that start Ray, vLLM or DeepSpeed."""
SHARED = {
    "shared_run": r"\bshared_run: ",
    "local_ray": r"\blocal_ray: |cluster_stand_ins",
    "engine": r"\breal_engine\b",
    "forks": r"\bforks: ",
}
"""What several files share that is expensive to start -> what the text of those files has."""
STARTER = re.compile("|".join([r"mark\.engines", r"\bjudged: ", *SHARED.values()]))
"""What the text of each file has whose tests start engines."""
BREAKER = re.compile(r"mark\.faults")
"""The same of those that run with `launch/test.sh --faults` only."""
OF_A_STATE = re.compile(r"\.state/|\.lock$")
"""Files in shared memory that belong to a checkpoint on its way, or to a state that is kept."""

os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("WANDB_API_KEY", None)
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
session.prepare(ClusterConfig(address="local"))
gc.disable()  # until all tests are imported: what they import makes hundreds of thousands of objects that stay
# Speed is never asserted: hypothesis would by itself fail an example that took long on a busy machine.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

CONFIG = """
output: {output}
model: {{tiny: {{hidden_size: 64, intermediate_size: 128, layers: 2, heads: 2, kv_heads: 1, max_positions: 64}}}}
data: {{source: task, task: {{name: reverse, min_length: 2, max_length: 3, train_size: 200}}}}
sft: {{steps: 40, batch_size: 32, max_tokens: 64, eval_every: 0, optimizer: {{lr: 3e-3, warmup_steps: 5}}}}
algo: {{group_size: 4, clip_high: 0.28}}
rollout: {{workers: 2, cpus: 1, max_prompt_tokens: 40, max_response_tokens: 8, kv_cache_gib: 0.1, max_concurrent: 32}}
scoring:
  rewards:
    exact: {{kind: exact}}
    letters: {{kind: function, function: "run_rewards:letters", weight: 0.5, timeout_s: 5}}
learner:
  ranks: 2
  cpus: 1
  zero_stage: 2
  micro_batch_tokens: 200
  optimizer: {{lr: 1e-3, warmup_steps: 2}}
loop: {{steps: 4, prompts_per_step: 6, checkpoint_every: 2}}
eval: {{prompts: 12, every: 2, samples: 2}}
cluster: {{address: local, device: cpu}}
telemetry: {{wandb: offline, samples: 3, samples_every: 2}}
"""

REWARDS = """
import os, time

def letters(prompts, responses, answers):
    # The share of the answer's letters that are in the response: differs within almost every group.
    if os.path.exists(os.path.join(os.path.dirname(__file__), "hang")):
        time.sleep(600)
    return [len(set(a) & set(r)) / len(set(a)) - 0.02 * len(r) for r, a in zip(responses, answers)]
"""


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Workplace:
    """A folder with a config and a reward module, where commands are run."""

    folder: Path
    listening: set[tuple[str, str]] = field(default_factory=set)
    """(process, address) of every listening TCP socket seen during `run`."""

    weights: set[str] = field(default_factory=set)
    """Files of weights in shared memory that a process had open during `run`."""

    @property
    def output(self) -> Path:
        return self.folder / "runs"

    def start(self, *words: str, program: Sequence[str] = ("-m", "rlhf_dist")) -> subprocess.Popen[str]:
        """Start `rlhf-dist COMMAND run.yaml ...`; the n-th command's output goes to n.stdout and n.stderr."""
        command, *rest = words
        number = len(list(self.folder.glob("*.stdout")))
        with (
            open(self.folder / f"{number}.stdout", "w") as out,
            open(self.folder / f"{number}.stderr", "w") as err,
        ):
            return subprocess.Popen(
                [sys.executable, *program, command, "run.yaml", *rest],
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                text=True,
            )

    def finish(self, process: subprocess.Popen[str]) -> Finished:
        """Wait for a command, within a limit."""
        try:
            code = process.wait(COMMAND_LIMIT_S)
        finally:
            end(process)
        number = len(list(self.folder.glob("*.stdout"))) - 1
        return Finished(
            code, (self.folder / f"{number}.stdout").read_text(), (self.folder / f"{number}.stderr").read_text()
        )

    def run(self, *words: str) -> Finished:
        """Run a command to its end, noting what its processes listen on."""
        process = self.start(*words)
        done = threading.Event()
        watcher = threading.Thread(target=watch, args=(process.pid, done, self), daemon=True)
        watcher.start()
        try:
            return self.finish(process)
        finally:
            done.set()
            watcher.join(10)


def watch(pid: int, done: threading.Event, place: Workplace) -> None:
    """Note the TCP addresses that processes below `pid` listen on and the weights that they write, twice a second."""
    while not done.wait(0.5):
        for process in family(pid):
            try:
                place.weights.update(
                    file.path
                    for file in process.open_files()
                    if file.path.startswith("/dev/shm/rlhf_dist-") and not OF_A_STATE.search(file.path)
                )
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        place.listening.add((process.name(), str(connection.laddr.ip)))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue


def family(pid: int) -> list[psutil.Process]:
    """The process and all below it."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end(process: subprocess.Popen[str]) -> None:
    """Kill a command that is still there, with everything below it."""
    if process.poll() is None:
        for member in family(process.pid):
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait(30)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait while the command runs, within a limit."""
    deadline = time.monotonic() + COMMAND_LIMIT_S
    while not condition():
        assert process.poll() is None, f"the command ended with {process.returncode}"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def make_workplace(folder: Path) -> Workplace:
    """A folder with the tests' config and rewards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(CONFIG.format(output=folder / "runs"))
    (folder / "run_rewards.py").write_text(REWARDS)
    return Workplace(folder)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m engines` or `-m faults` only their files are read: to import all takes longer than many a test."""
    wanted = {"engines": STARTER, "faults": BREAKER}.get(config.getoption("markexpr"))
    if wanted is not None and collection_path.match("test_*.py"):
        return not wanted.search(collection_path.read_text()) or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what starts real engines by the fixtures that start them; other tests carry the mark themselves.

    The tests of this process's Ray session come last and together, so that it is there for no other test. Those marked
    `faults` are left out where nobody asks for them.
    """
    if "faults" not in config.getoption("markexpr"):
        long = [item for item in items if item.get_closest_marker("faults")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)
    items.sort(key=lambda item: uses(item, "local_ray"))
    for item in items:
        if any(uses(item, fixture) for fixture in STARTS_ENGINES):
            item.add_marker("engines")
    paths = {item.path for item in items if item.get_closest_marker("engines")}
    unseen = [str(path) for path in paths if not STARTER.search(path.read_text())]
    assert not unseen, f"start engines, and `-m engines` would not find them (STARTER in {__file__}): {unseen}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` the tests of all files that share something expensive stay in one process."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(self.config.rootpath / super()._split_scope(nodeid))

    return Together(config, log) if config.getoption("dist") == "loadfile" else None


@cache
def group_of(file: Path) -> str:
    """The file, or what it shares with others."""
    text = file.read_text()
    return next((name for name, mark in SHARED.items() if re.search(mark, text)), str(file))


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()


def uses(item: pytest.Item, fixture: str) -> bool:
    """Whether the test asks for the fixture, itself or through others."""
    return fixture in getattr(item, "fixturenames", ())


@pytest.fixture(autouse=True)
def wandb_reads_its_settings_anew() -> None:
    """wandb reads variables and files once in a process, and would remember the key of another test."""
    if found := sys.modules.get("wandb.sdk.wandb_setup"):
        found._singleton = None  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray session in this process, one for all tests that want one. Its books say four GPUs, which are not there."""
    machine = replace(session.local_machine(), gpus=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "local_machine", lambda: machine)
        with session.ray_session(ClusterConfig(address="local"), tmp_path_factory.mktemp("ray"), print):
            yield


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """What runs the scripts of learner ranks."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Where the shared run lives."""
    return make_workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers with head_dim 32, a Hugging Face directory."""
    from rlhf_dist.models.tiny import make_tiny

    shape = TinyConfig(hidden_size=64, intermediate_size=128, layers=2, heads=2, kv_heads=1, max_positions=128)
    return make_tiny(shape, tmp_path_factory.mktemp("models"))


@dataclass(frozen=True)
class SharedRun:
    """A real run that ended: Ray, vLLM and DeepSpeed. Tests read it and change nothing in it."""

    workplace: Workplace
    sft: Finished
    train: Finished

    @property
    def path(self) -> Path:
        return self.workplace.output / "grpo"


@pytest.fixture(scope="session")
def shared_run(workplace: Workplace) -> SharedRun:
    """Supervised start, then four GRPO steps: 2 vLLM workers and 2 DeepSpeed ranks with ZeRO-2."""
    sft = workplace.run("sft", "name=sft", "learner.ranks=1", "learner.zero_stage=0")
    assert sft.code == 0, sft.stderr
    train = workplace.run("train", "name=grpo", f"model.path={workplace.output / 'sft'}", "loop.witness=true")
    assert train.code == 0, train.stderr
    return SharedRun(workplace, sft, train)
