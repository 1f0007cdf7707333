"""What is decided when a run is wired: actors' search path, where ranks meet, what a bad proof does."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rlhf_dist.cluster import build, learner_hosts, starts, wiring
from rlhf_dist.cluster.inbox import Inbox
from rlhf_dist.cluster.roster import Roster
from rlhf_dist.cluster.sources import require_rows, with_sources
from rlhf_dist.cluster.spec import ActorSpec, enter
from rlhf_dist.config.schema import (
    AlgoConfig,
    Config,
    FaultsConfig,
    KLConfig,
    RolloutConfig,
    TelemetryConfig,
    TinyConfig,
)
from rlhf_dist.errors import CommandHung, ModelError, RunError
from rlhf_dist.loop.healing import unwatched
from rlhf_dist.loop.rl_training import Outcome, Run
from rlhf_dist.planning.placement import Machine, place

LEASHED = AlgoConfig(name="ppo", kl=KLConfig(coef=0.1))
"""Has a critic and a reference."""


HANGS_S = 20.0
NONE: Any = None
PARTS = wiring.Parts(NONE, NONE, NONE, unwatched(), wiring.LearnerSide(NONE, NONE), Roster(NONE), NONE, Inbox())


def test_a_users_folder_hides_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    monkeypatch.chdir(tmp_path)
    enter(starts.spec(Config(), "scoring worker", "", "cpu", 1, tmp_path / "logs", 0))
    assert sys.path == [*before, str(tmp_path)]


def test_ranks_meet_on_loopback_unless_they_are_on_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.2")
    rank = object.__new__(learner_hosts.LearnerHost)
    for nodes, expected in ((1, "127.0.0.1"), (2, "127.0.0.2")):
        host, port = learner_hosts.LearnerHost.address(rank, nodes)
        assert host == expected and 0 < port < 2**16


def stood_in(monkeypatch: pytest.MonkeyPatch, output: Path, trains: Callable[[Run, Any], Outcome]) -> Config:
    """A config for `build.train`, which then starts nothing and trains so."""

    @contextmanager
    def session(*_: Any) -> Iterator[tuple[Machine, ...]]:
        yield (Machine(2, 0),)

    monkeypatch.setattr(build, "ray_session", session)
    monkeypatch.setattr(build, "start_fleets", lambda *_: PARTS)
    monkeypatch.setattr(build, "train_to_the_end", trains)
    tiny = TinyConfig(hidden_size=64, intermediate_size=64, layers=1, heads=2, kv_heads=1, max_positions=64)
    rollout = RolloutConfig(max_prompt_tokens=40, max_response_tokens=8, cpus=1)
    config = Config(name="run", output=str(output), rollout=rollout, telemetry=TelemetryConfig(wandb="off"))
    return replace(config, model=replace(config.model, tiny=tiny), cluster=replace(config.cluster, device="cpu"))


@pytest.mark.parametrize("leaves", ["in flight", "used twice", "nothing"])
def test_a_run_whose_ledger_does_not_add_up_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, leaves: str
) -> None:
    def trained(run: Run, state: Any) -> Outcome:
        run.telemetry.log(0, {"eval/greedy_accuracy": 0.0})
        run.ledger.issue([("0/0", 0)], 0)
        if leaves != "in flight":
            run.ledger.finish([("0/0", 0)], [5])
            run.ledger.score([("0/0", 0)])
            run.ledger.consume([("0/0", 0)], 1, [5])
        if leaves == "used twice":
            run.ledger._database.execute("INSERT INTO uses VALUES ('0/0', 2, 5)")
        return Outcome({}, {}, {})

    config = stood_in(monkeypatch, tmp_path, trained)
    if leaves == "nothing":
        build.train(config, resume=False)
    else:
        with pytest.raises(RunError, match=rf"ledger\.sqlite: 1 groups issued: .* 1 {leaves}.*does not add up"):
            build.train(config, resume=False)
    assert (tmp_path / "run" / "summary.json").exists(), "what the run found is kept"


def test_a_command_that_hangs_while_it_trains_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hangs(run: Run, state: Any) -> Outcome:
        time.sleep(HANGS_S)
        raise AssertionError("nobody ended it")

    config = stood_in(monkeypatch, tmp_path, hangs)
    with pytest.raises(CommandHung, match=r"^the command itself has hung for 0\.5 s \(faults\.step_s\)"):
        build.train(replace(config, faults=FaultsConfig(step_s=0.5)), resume=False)
    assert "in hangs\n" in (tmp_path / "run" / "faults" / "command.txt").read_text()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_on_gpus_nothing_starts_beside_an_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str) -> None:
    """What starts after it changes the free memory by which the engine sizes its cache."""
    calls: list[str] = []

    def start(_: Roster, host: type, specs: Sequence[ActorSpec], *__: Any, **___: Any) -> dict[str, Any]:
        calls.append(host.__name__)
        return {spec.name: SimpleNamespace(ready=SimpleNamespace(remote=int)) for spec in specs}

    def gather(calls_by_name: dict[str, Any], *_: Any) -> None:
        calls.append(" ".join(calls_by_name))
        if len(calls_by_name) > 2:
            raise RunError("all are ready")

    monkeypatch.setattr(build, "with_sources", lambda config, *_, **__: config)
    monkeypatch.setattr(starts, "reserve", lambda *_: nullcontext())
    monkeypatch.setattr(build, "join_ranks", lambda *_: None)
    monkeypatch.setattr(build, "gather", gather)
    monkeypatch.setattr(starts, "close_ranks", lambda *_: None)
    for name in ("start_all", "start_servers"):
        monkeypatch.setattr(Roster, name, start)
    config = Config(rollout=RolloutConfig(workers=2), algo=replace(LEASHED, name="grpo"))
    config = replace(config, cluster=replace(config.cluster, device=device))
    placement = place(config, Machine(cpus=8, gpus=4 if device == "cuda" else 0), "train")
    with ExitStack() as stack, pytest.raises(RunError, match="all are ready"):
        build.start_fleets(config, placement, "policy", tmp_path, None, stack)
    first = ["RolloutHost"] + (["rollout worker 0 rollout worker 1"] if device == "cuda" else [])
    assert calls[: len(first) + 1] == [*first, "ScoringHost"]
    assert calls[-1].startswith("rollout worker 0 rollout worker 1 scoring server 0")


def sources(
    tiny_model: Path,
    source: str,
    folder: Path | None,
    critic: str = "policy",
    reference: str = "",
    algo: AlgoConfig = LEASHED,
    learns: bool = True,
) -> tuple[str, str]:
    base = Config()
    config = replace(
        base,
        algo=algo,
        model=replace(base.model, path=str(tiny_model)),
        critic=replace(base.critic, start=critic),
        reference=replace(base.reference, path=reference),
    )
    found = with_sources(config, source, folder, learns)
    return found.critic.start, found.reference.path


def test_critic_and_reference_of_a_new_run_start_where_the_policy_does(tiny_model: Path, tmp_path: Path) -> None:
    policy, other = str(tiny_model), tmp_path / "other"
    shutil.copytree(tiny_model, other)
    assert sources(tiny_model, policy, None) == (policy, policy)
    assert sources(tiny_model, policy, None, critic="shared") == ("shared", policy)
    assert sources(tiny_model, policy, None, critic=str(other), reference=str(other)) == (str(other), str(other))


def test_a_resumed_run_goes_on_with_its_own_critic_and_the_reference_it_had(tiny_model: Path, tmp_path: Path) -> None:
    """The reference is the start of the *run*, not of the resume, unless it moved and is in the checkpoint."""
    source = str(tmp_path / "hf")
    critic = str(tmp_path / "critic" / "hf")
    assert sources(tiny_model, source, tmp_path) == (critic, str(tiny_model))
    assert sources(tiny_model, source, tmp_path, critic="shared") == ("shared", str(tiny_model))
    (tmp_path / "reference").mkdir()
    assert sources(tiny_model, source, tmp_path) == (critic, str(tmp_path / "reference"))


@pytest.mark.parametrize(("algo", "learns"), [(AlgoConfig(), True), (AlgoConfig(name="ppo"), False)])
def test_a_model_that_no_process_loads_is_not_looked_for(tiny_model: Path, algo: AlgoConfig, learns: bool) -> None:
    """An evaluation has no critic, nor has grpo; without KL there is no reference."""
    found = sources(tiny_model, str(tiny_model), None, critic="./no", reference="./no", algo=algo, learns=learns)
    assert found == ("./no", "./no")
    with pytest.raises(ModelError, match=r"critic\.start = './no': there is no such directory"):
        sources(tiny_model, str(tiny_model), None, critic="./no")
    with pytest.raises(ModelError, match=r"reference\.path = './no': there is no such directory"):
        sources(tiny_model, str(tiny_model), None, reference="./no")


def test_a_model_has_to_have_a_row_for_every_token_of_the_policy(tiny_model: Path, tmp_path: Path) -> None:
    """Embeddings may have more rows than the tokenizer has tokens; the policy can sample any of its own."""
    larger = with_rows(tiny_model, tmp_path / "larger", more=4)
    with pytest.raises(ModelError, match=r"^which: has rows for (\d+) tokens, the policy for (\d+); give a model with"):
        require_rows("which", str(tiny_model), str(larger))
    require_rows("which", str(larger), str(tiny_model))
    require_rows("which", str(tiny_model), str(tiny_model))


def with_rows(model: Path, target: Path, more: int) -> Path:
    """A copy whose config tells of `more` rows."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    config["vocab_size"] += more
    (target / "config.json").write_text(json.dumps(config))
    return target
