"""A run directory's files with anything in them: what reads them tells of damage in one message, or takes none."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged_runs import make_run
from fuzzing import mutated, search
from hypothesis import strategies as st

from rlhf_dist.cluster.job_files import pack, unpack
from rlhf_dist.cluster.parent import last_step
from rlhf_dist.cluster.processes import ProcessName, process_id
from rlhf_dist.errors import InputError, RunError
from rlhf_dist.loop.ledger_report import report_of
from rlhf_dist.loop.pipeline_files import content
from rlhf_dist.loop.resume_point import other_point, require_command, resume_point
from rlhf_dist.loop.run_directory import open_run_directory, require_run
from rlhf_dist.loop.run_end import read_summary
from rlhf_dist.loop.run_lock import looked_at
from rlhf_dist.loop.saved_config import config_changes
from rlhf_dist.loop.stages import read_finished
from rlhf_dist.loop.train_state import read_state
from rlhf_dist.models.checkpoints import latest_checkpoint
from rlhf_dist.models.run_model import run_model
from rlhf_dist.telemetry.report import read_metrics

METRICS = '{"step": 1, "a": 0.5}\n{"step": 2, "a": NaN}\n{"step": 3, "a": 1e-3}\n'
SUMMARY = '{"outcome": "finished", "step": 4, "before": {"eval/x": 0.5}, "after": {}, "answers": {}}'
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.sampled_from([math.inf, math.nan, -1, 10**4000])
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["step", "format", "files", "hash", "ledger", "outcome", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


def readers(run: Path) -> dict[str, Callable[[], object]]:
    """Whatever reads a run directory and changes nothing."""
    step_4 = run / "checkpoints" / "step-4"
    return {
        "the newest checkpoint": lambda: latest_checkpoint(run),
        "the newest model": lambda: run_model(run, "model.path"),
        "the best model": lambda: run_model(run / "checkpoints" / "BEST", "model.path"),
        "the fingerprint": lambda: content(run),
        "where a resume goes on": lambda: resume_point(run, "train", None),
        "another place": lambda: other_point(run, "train"),
        "the command": lambda: require_command(step_4, "train"),
        "the state": lambda: read_state(step_4),
        "the ledger": lambda: report_of(run).facts(),
        "the metrics": lambda: read_metrics(run / "metrics.jsonl"),
        "the last step": lambda: last_step(run / "metrics.jsonl"),
        "the summary": lambda: read_summary(run),
        "the saved config": lambda: config_changes(run / "config.yaml", "name: run\n"),
        "the lock": lambda: looked_at(run).__enter__(),
        "the stage": lambda: read_finished(run),
        "what is there": lambda: require_run(run),
    }


@pytest.mark.parametrize("examples", [150, pytest.param(1500, marks=pytest.mark.faults)])
def test_damage_in_a_run_is_told_in_one_message(tmp_path: Path, examples: int) -> None:
    run = make_run(tmp_path)
    (run / "metrics.jsonl").write_text(METRICS)
    (run / "summary.json").write_text(SUMMARY)
    (run / "stage.json").write_text("{}")
    (run / "wandb_id").write_text("abc")
    (run / "checkpoints" / "BEST").write_text("step-4\n")
    names = ["checkpoints/LATEST", "checkpoints/step-4/state.json", "metrics.jsonl", "summary.json", "config.yaml"]
    names += ["checkpoints/BEST", "ledger.sqlite", "run.lock", "wandb_id", "stage.json"]
    whole = {name: (run / name).read_bytes() for name in names}

    def check(given: tuple[str, Any, Any]) -> None:
        name, how, what = given
        data = whole[name]
        if how == "instead":
            data = what
        else:
            place = how % (len(data) + 1)
            data = data[:place] + what + data[place + len(what) :]
        (run / name).write_bytes(data)
        try:
            for reader, read in readers(run).items():
                try:
                    read()
                except InputError as error:
                    assert str(run) in str(error) and len(str(error)) < 2000, (reader, error)
        finally:
            (run / name).write_bytes(whole[name])

    instead = st.tuples(
        st.sampled_from(names),
        st.just("instead"),
        VALUES.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30),
    )
    here_and_there = st.tuples(st.sampled_from(names), st.integers(0, 100_000), st.binary(max_size=6))
    search(examples, check, instead | here_and_there)


@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=pytest.mark.faults)])
def test_a_run_with_damaged_metrics_goes_on_with_whole_ones(tmp_path: Path, examples: int) -> None:
    whole = [json.loads(line) for line in METRICS.splitlines()]

    def check(given: tuple[str, int]) -> None:
        text, step = given
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        run = open_run_directory(str(output), "run", "name: run\n", resume=False)
        try:
            run.metrics.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
            lines = run.metrics.read_bytes().count(b"\n")
            moved = run.rewind_metrics(step)
            found = read_metrics(run.metrics)
            kept = run.metrics.read_bytes().count(b"\n")
        finally:
            run.close()
        assert all(steps[-1] <= step for steps, _ in found.values())
        assert kept + moved >= lines

    search(examples, check, st.tuples(mutated([METRICS, *map(json.dumps, whole)]), st.integers(0, 4)))


@pytest.mark.parametrize("examples", [150, pytest.param(1500, marks=pytest.mark.faults)])
def test_any_tail_of_metrics_has_a_last_step_or_none(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "metrics.jsonl"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = last_step(path)
        assert found is None or isinstance(found, int)

    lines = mutated([METRICS]).map(lambda text: text.encode("utf-8", "surrogatepass"))
    values = VALUES.map(lambda value: json.dumps({"step": value}).encode())
    search(examples, check, lines | values | st.binary(max_size=30))


@pytest.mark.parametrize("examples", [150, pytest.param(1500, marks=pytest.mark.faults)])
def test_any_pid_file_is_a_process_or_none(tmp_path: Path, examples: int) -> None:
    name = ProcessName.of("a worker", str(tmp_path / "worker.log"))

    def check(value: Any) -> None:
        (tmp_path / "worker.pid").write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        found = process_id(name)
        assert found is None or isinstance(found, int)

    signs = st.fixed_dictionaries({"pid": VALUES, "began": VALUES, "host": st.just(socket.gethostname()) | VALUES})
    search(examples, check, signs | VALUES | st.binary(max_size=20))


@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=pytest.mark.faults)])
def test_the_log_of_a_fetched_run_arrives_whole_or_is_told_of(tmp_path: Path, examples: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(METRICS)
    written: list[str] = []
    pack(run, 1 << 20, written.append)

    def check(text: str) -> None:
        target = tmp_path / f"target-{len(list(tmp_path.iterdir()))}"
        try:
            arrived = unpack(text, target)
        except RunError:
            assert not target.exists()
        else:
            assert (arrived.target / "metrics.jsonl").read_text() == METRICS

    search(examples, check, mutated(["".join(written)]))


@pytest.mark.parametrize("number", ["Infinity", "[" * 100_000, "1e400"])
def test_numbers_that_are_none_end_nothing(tmp_path: Path, number: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 7}}\n{{"step": {number}}}\n')
    assert last_step(tmp_path / "metrics.jsonl") == 7
    (tmp_path / "worker.pid").write_text(f'{{"pid": {number}, "began": 1, "host": "{socket.gethostname()}"}}')
    assert process_id(ProcessName.of("a worker", str(tmp_path / "worker.log"))) is None


def test_a_fetched_run_without_a_head_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    written: list[str] = []
    pack(tmp_path / "run", 0, written.append)
    for head in ("{}", "[]", '{"path": "x", "left": [["a", Infinity]]}'):
        with pytest.raises(RunError, match="cannot be written"):
            unpack(f"rlhf-dist-file {head}\n{''.join(written[1:])}", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
