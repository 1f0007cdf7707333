"""What is decided before anything starts: a resume with nothing to do, bad demonstrations, an evaluation's logs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ledgers import LedgerByUid

from rlhf_dist.cluster import build, trainer_ranks
from rlhf_dist.cluster.prefer_build import prefer
from rlhf_dist.cluster.resume import Start, find_start, nothing_left
from rlhf_dist.cluster.supervised_build import sft
from rlhf_dist.config.load import to_yaml
from rlhf_dist.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    LoopConfig,
    ModelConfig,
    PreferConfig,
    PreferencesConfig,
    PtxConfig,
    RolloutConfig,
    SftConfig,
    TelemetryConfig,
    TinyConfig,
)
from rlhf_dist.data.stream import PromptStream
from rlhf_dist.errors import ConfigError, DataError, ModelError, RunError
from rlhf_dist.loop import trainer
from rlhf_dist.loop.evaluation import Evaluation
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.run_directory import open_run_directory
from rlhf_dist.loop.train_state import read_state
from rlhf_dist.models.tiny import make_tiny
from rlhf_dist.planning.placement import Machine

TINY = TinyConfig(hidden_size=64, intermediate_size=64, layers=1, heads=2, kv_heads=1, max_positions=64)
RUNS = {"sft": sft, "train": build.train}
STATE = {"step": 3, "before": {}, "results": {}}


class StartedError(Exception):
    """The run went on to start Ray."""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A small one; whatever starts Ray raises `StartedError`."""

    @contextmanager
    def session(*_: Any) -> Iterator[tuple[Machine, ...]]:
        raise StartedError
        yield (Machine(2, 0),)

    for module in (build, trainer_ranks):
        monkeypatch.setattr(module, "ray_session", session)
    made = Config(
        name="run",
        output=str(tmp_path),
        model=ModelConfig(tiny=TINY),
        rollout=RolloutConfig(max_prompt_tokens=40, max_response_tokens=8, cpus=1),
        sft=SftConfig(steps=3, max_tokens=48),
        loop=LoopConfig(steps=3),
        telemetry=TelemetryConfig(wandb="off", progress="plain"),
    )
    return replace(made, cluster=replace(made.cluster, device="cpu"))


def add_model(config: Config, folder: Path) -> None:
    """What a resume looks at before it starts."""
    shutil.copytree(make_tiny(config.model.tiny, Path(config.output) / ".models"), folder / "hf")


def at_step_3(config: Config, command: str, summary: dict[str, Any] | None) -> Path:
    """A run directory with a checkpoint of step 3."""
    run = open_run_directory(config.output, config.name, to_yaml(config), resume=False)
    add_model(config, run.begin_checkpoint(3))
    state: dict[str, Any] = dict(STATE)
    if command == "train":
        ledger = Ledger(run.ledger)
        for step in (1, 2, 3):
            LedgerByUid(ledger).use([f"0/{step}"], step)
        stream = PromptStream(config.data, config.seed, config.eval.prompts)
        state |= {"steps": 3, "cursor": stream.cursor(), "ledger": asdict(ledger.totals(3))}
        ledger.close()
    run.commit_checkpoint(3, 1, state)
    if summary is not None:
        run.summary.write_text(json.dumps(summary))
    run.close()
    return run.path


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


COMMANDS = pytest.mark.parametrize(("command", "key"), [("train", "loop.steps"), ("sft", "sft.steps")])


@COMMANDS
def test_a_run_at_its_end_says_so_and_writes_nothing(
    config: Config, capsys: pytest.CaptureFixture[str], command: str, key: str
) -> None:
    path = at_step_3(config, command, {"command": command, "step": 3})
    before = contents(path)
    RUNS[command](config, resume=True)
    onward = {"train": "raise loop.steps to go on", "sft": f"go on in a new run with name=... model.path={path}"}
    assert capsys.readouterr().out == f"run is already at step 3 of 3; {onward[command]}\n"
    assert contents(path) == before


@pytest.mark.parametrize("ended", [True, False])
@COMMANDS
def test_a_changed_key_is_named_before_what_follows_from_it(
    config: Config, command: str, key: str, ended: bool
) -> None:
    """Also at the end of a run; and before the data, which another seed puts in another order."""
    path = at_step_3(config, command, {"command": command, "step": 3} if ended else None)
    before = contents(path)
    with pytest.raises(ConfigError, match=r"config\.yaml: a resume cannot change seed from 0 to 7\."):
        RUNS[command](replace(config, seed=7), resume=True)
    assert contents(path) == before


@COMMANDS
def test_a_run_cut_before_its_summary_or_with_an_older_one_goes_on(
    config: Config, capsys: pytest.CaptureFixture[str], command: str, key: str
) -> None:
    path = at_step_3(config, command, None)
    for summary in (None, {"command": command, "step": 2}, {"command": command, "step": None}):
        if summary is not None:
            (path / "summary.json").write_text(json.dumps(summary))
        with pytest.raises(StartedError):
            RUNS[command](config, resume=True)
        captured = capsys.readouterr()
        assert captured.out == "" and "resumed from step 3\n" in captured.err
        assert "  starting Ray: stopped after " in captured.err


@COMMANDS
def test_a_target_below_the_checkpoint_is_refused(config: Config, command: str, key: str) -> None:
    path = at_step_3(config, command, {"command": command, "step": 3})
    before = contents(path)
    less = replace(config, loop=replace(config.loop, steps=2), sft=replace(config.sft, steps=2))
    with pytest.raises(ConfigError, match=rf"{key} is 2, but .*step-3 is at step 3 already; give at least 3"):
        RUNS[command](less, resume=True)
    assert contents(path) == before


def test_more_steps_go_on_and_a_run_that_is_not_there_is_left_to_the_run_directory(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"run: no such run to resume; leave out --resume to start it"):
        find_start(config, "train", True, None, read_state)
    assert find_start(config, "train", False, None, read_state) == Start()
    at_step_3(config, "sft", {"step": 3})
    assert not nothing_left(config, "sft.steps", 4, find_start(config, "sft", True, None, trainer.read_state))


def test_a_state_of_another_command_is_told_with_what_to_do(config: Config) -> None:
    path = at_step_3(config, "sft", {"step": 3})
    with pytest.raises(DataError, match=r"ledger\.sqlite: is missing"):
        find_start(config, "train", True, None, read_state)
    (path / "checkpoints" / "step-3" / "state.json").write_text('{"step": 3, "before": [], "results": {}}')
    with pytest.raises(
        DataError, match=r"state\.json: .* `before` is \[\].*; restore it from a backup, or start a new"
    ):
        find_start(config, "sft", True, 3, trainer.read_state)


@COMMANDS
def test_a_flipped_byte_is_told_before_anything_starts(
    config: Config, capsys: pytest.CaptureFixture[str], command: str, key: str
) -> None:
    """Also of a run that is at its end: it must not say that all is well."""
    path = at_step_3(config, command, {"step": 3})
    state = path / "checkpoints" / "step-3" / "state.json"
    state.write_bytes(state.read_bytes().replace(b'"before": {}', b'"before": []'))
    before = contents(path)
    with pytest.raises(DataError, match=r"state\.json: was changed after it was written"):
        RUNS[command](config, resume=True)
    assert contents(path) == before and capsys.readouterr() == ("", "")


def test_a_resume_from_an_earlier_step_sets_the_later_ones_aside(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run_directory(config.output, config.name, to_yaml(config), resume=False)
    for step in (1, 2):
        add_model(config, run.begin_checkpoint(step))
        run.commit_checkpoint(step, 2, STATE | {"step": step})
    run.wandb_id.write_text("../../elsewhere")
    run.close()
    with pytest.raises(StartedError):
        sft(config, resume=True, resume_from=1)
    said = capsys.readouterr().err
    assert "resumed from step 1\n" in said and "kept as step-2.set-aside; delete them" in said
    assert "wandb_id: '../../elsewhere' is not the id of a wandb run; a new wandb run is begun" in said
    assert run.latest_checkpoint() == run.checkpoints / "step-1"


def test_a_resume_before_the_first_checkpoint_says_that_it_begins_again(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    open_run_directory(config.output, config.name, to_yaml(config), resume=False).close()
    with pytest.raises(StartedError):
        sft(config, resume=True)
    assert "no checkpoint yet: beginning again from step 0\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sft", "train"])
def test_a_bad_demonstration_is_refused_before_a_run_directory_is_made(config: Config, command: str) -> None:
    bad = Path(config.output) / "bad.jsonl"
    bad.write_text('{"prompt": "2+2?", "response": "4"}\n{"prompt": "3+3?", "answer": "6"}\n' * 2)
    if command == "sft":
        config = replace(config, data=DataConfig(source="jsonl", path=str(bad)), eval=EvalConfig(prompts=1))
    else:
        config = replace(config, ptx=PtxConfig(coef=0.1, source="jsonl", path=str(bad)))
    with pytest.raises(DataError, match=r"bad\.jsonl:2: lacks 'response'.*data\.response_key"):
        RUNS[command](config, resume=False)
    assert not (Path(config.output) / "run").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_the_logs_of_an_evaluation_go_unless_it_fails(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    fails: bool,
) -> None:
    @contextmanager
    def session(*_: Any) -> Iterator[tuple[Machine, ...]]:
        yield (Machine(2, 0),)

    def start(config: Config, placement: Any, source: str, logs: Path, *_: Any) -> build.Parts:
        (logs / "rollout-worker-0.log").write_text("started")
        if fails:
            raise RunError("it died")
        arrivals = SimpleNamespace(listen=lambda _: None, now=lambda: 0.0)
        return build.Parts(SimpleNamespace(reference=None, arrivals=arrivals), *[None] * 7)  # type: ignore[arg-type]

    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    for module in (build, trainer_ranks):
        monkeypatch.setattr(module, "ray_session", session)
    monkeypatch.setattr(build, "start_fleets", start)
    one: Any = SimpleNamespace(scores=SimpleNamespace(total=np.ones(1, np.float32)))
    monkeypatch.setattr(
        build, "run_evaluation", lambda *_, **__: Evaluation({"eval/pass_at_4": 0.5}, (), (), (), 0, [one])
    )
    if fails:
        with pytest.raises(RunError, match="it died"):
            build.evaluate(config)
    else:
        build.evaluate(config)
    captured = capsys.readouterr()
    kept = list(tmp_path.glob("rlhf-dist-eval-*"))
    if fails:
        assert [file.name for folder in kept for file in folder.iterdir()] == ["rollout-worker-0.log"]
        assert f"logs are kept in {kept[0]}\n" in captured.err and "stopped after" in captured.err
    else:
        assert kept == [] and "stopped after" not in captured.err
        assert captured.out.split() == ["pass@4", "0.500"]


def test_an_evaluation_of_a_model_that_is_not_there_makes_no_folder(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(Exception, match="there is no such directory"):
        build.evaluate(replace(config, model=ModelConfig(path="./nowhere", tiny=TINY)))
    assert list(tmp_path.glob("rlhf-dist-eval-*")) == []


def test_a_resume_on_preferences_needs_no_reference_model(config: Config) -> None:
    """The checkpoint has its logprobs; only a run that has no checkpoint yet has to read it."""
    config = replace(
        config,
        data=replace(config.data, task=replace(config.data.task, name="describe")),
        preferences=PreferencesConfig(train_size=8, held_out=4, max_tokens=64),
        prefer=PreferConfig(steps=5, batch_size=4, reference=str(Path(config.output) / "gone")),
    )
    with pytest.raises(ModelError, match="gone"):
        prefer(config, resume=False)
    path = at_step_3(config, "prefer", None)
    with pytest.raises(StartedError):
        prefer(config, resume=True)
    shutil.rmtree(path / "checkpoints")
    with pytest.raises(ModelError, match="gone"):
        prefer(config, resume=True)
