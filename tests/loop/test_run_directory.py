import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_dist.errors import ConfigError, DataError, DiskError, ResourceError
from rlhf_dist.learner.checkpoint_files import checkpoint_files
from rlhf_dist.loop import run_directory
from rlhf_dist.loop.run_directory import RunDirectory, open_run_directory
from rlhf_dist.loop.saved_config import config_changes
from rlhf_dist.models.checkpoints import checkpoint_steps
from rlhf_dist.telemetry.sinks import JsonlSink

CONFIG = """
name: run
seed: 0
loop: {steps: 10, prompts_per_step: 4}
rollout: {timeout_s: 600.0, stop: []}
scoring: {rewards: {exact: {weight: 1.0, retries: 3}}}
telemetry: {wandb: auto}
"""


def make(tmp_path: Path, resume: bool = False, config: str = CONFIG) -> RunDirectory:
    return open_run_directory(str(tmp_path / "runs"), "my/run", config, resume)


def checkpoint(run: RunDirectory, step: int, keep: int = 2) -> Path:
    folder = run.begin_checkpoint(step)
    (folder / "hf").mkdir()
    (folder / "hf" / "weights").write_text(str(step))
    return run.commit_checkpoint(step, keep, {"step": step})


def test_a_new_run_has_its_folders_and_its_config(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert run.path == tmp_path / "runs" / "my" / "run"
    assert run.config.read_text() == CONFIG
    assert run.checkpoints.is_dir() and run.logs.is_dir()
    assert not run.rollouts.exists(), "made with its first file"
    run.close()
    assert not make(tmp_path, resume=True).rollouts.exists()
    assert run.latest_checkpoint() is None


def test_an_existing_run_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.metrics.write_text('{"step": 0}\n')
    run.close()
    with pytest.raises(ConfigError, match=r"runs/my/run: this run exists; continue it with --resume, or .*name="):
        make(tmp_path)


def test_a_run_that_is_under_way_is_not_said_to_be_continued(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.metrics.write_text('{"step": 0}\n')
    with pytest.raises(
        ConfigError, match=rf"runs/my/run: process {os.getpid()} is using this run; wait for it, or give"
    ):
        make(tmp_path)


def test_a_directory_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "my" / "run"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="this run exists"):
        make(tmp_path)


def test_a_run_that_was_killed_before_it_had_its_lock_is_started_and_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "runs" / "my" / "run").mkdir(parents=True)
    with pytest.raises(ConfigError, match="this run has not begun, so there is nothing to resume; leave out --resume"):
        make(tmp_path, resume=True)
    assert make(tmp_path).config.read_text() == CONFIG, "the way out works"


def test_a_run_that_never_began_may_be_started_again_under_its_name(tmp_path: Path) -> None:
    run = make(tmp_path)
    (run.logs / "rollout-worker-0.log").write_text("it did not start")
    with pytest.raises(ConfigError, match="is using this run"):
        make(tmp_path)
    run.close()
    again = make(tmp_path)
    assert (again.logs / "rollout-worker-0.log").exists(), "what explains the failure is kept"


def test_a_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such run to resume; leave out --resume"):
        make(tmp_path, resume=True)
    folder = tmp_path / "runs" / "my" / "run"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.raises(ConfigError, match=r"runs/my/run: not a run's directory, for it has no run\.lock; leave"):
        make(tmp_path, resume=True)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"], "and nothing is put into it"


def test_a_run_that_was_killed_before_it_had_its_config_is_started_and_not_resumed(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.close()
    run.config.unlink()
    with pytest.raises(ConfigError, match="this run has not begun, so there is nothing to resume; leave out --resume"):
        make(tmp_path, resume=True)
    assert make(tmp_path).config.read_text() == CONFIG, "the way out works"


def test_a_run_that_was_killed_before_it_named_its_first_checkpoint_has_it(tmp_path: Path) -> None:
    run = make(tmp_path)
    first = checkpoint(run, 2)
    (run.checkpoints / "LATEST").unlink()
    assert run.latest_checkpoint() == first
    assert run.go_back_to(first) == [] and (run.checkpoints / "LATEST").read_text() == "step-2\n"
    checkpoint(run, 4)
    (run.checkpoints / "LATEST").unlink()
    with pytest.raises(DataError, match="LATEST: is missing, and the folder holds step-2, step-4"):
        run.latest_checkpoint()


def test_a_run_without_a_checkpoint_is_resumed_from_its_start(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.metrics.write_text('{"step": 0}\n{"step": 1}\n')
    run.begin_checkpoint(2)
    run.close()
    again = make(tmp_path, resume=True)
    assert again.latest_checkpoint() is None and list(again.checkpoints.iterdir()) == []
    assert again.rewind_metrics(-1) == 2 and again.metrics.read_text() == ""


def test_a_checkpoint_that_lacks_a_file_is_never_the_newest(tmp_path: Path) -> None:
    run = make(tmp_path)
    before = checkpoint(run, 1)
    folder = run.begin_checkpoint(2)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").touch()
    (folder / "optimizer-0.safetensors").touch()
    needed = checkpoint_files(ranks=2)
    with pytest.raises(DiskError, match=r"step-2: optimizer-1\.safetensors did not arrive: .* does not share"):
        run.commit_checkpoint(2, 1, {"step": 2}, needed)
    assert run.latest_checkpoint() == before and before.is_dir()
    (folder / "optimizer-1.safetensors").touch()
    assert run.commit_checkpoint(2, 1, {"step": 2}, needed) == run.latest_checkpoint() == run.checkpoints / "step-2"


@pytest.mark.parametrize("name", ["", "/tmp/x", "../x"])
def test_a_name_stays_inside_the_output(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^name: .* is not a name for a directory inside"):
        open_run_directory(str(tmp_path), name, CONFIG, False)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises((ConfigError, ResourceError), match=r"runs"):
        make(tmp_path)


def test_a_run_that_could_not_be_made_does_not_stand_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise DiskError(f"{path}: cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "write_text", full)
        with pytest.raises(ResourceError, match=r"cannot be made: .*No space left on device"):
            make(tmp_path)
    make(tmp_path)


def test_a_resume_may_change_the_length_of_a_run_but_not_what_it_is(tmp_path: Path) -> None:
    run = make(tmp_path)
    checkpoint(run, 5)
    run.close()
    longer = CONFIG.replace("steps: 10", "steps: 20").replace("600.0", "60.0").replace("wandb: auto", "wandb: off")
    longer = longer.replace("retries: 3", "retries: 9")
    make(tmp_path, resume=True, config=longer).close()
    assert "steps: 20" in run.config.read_text()
    other = longer.replace("seed: 0", "seed: 1").replace("stop: []", "stop: [x]").replace("weight: 1.0", "weight: 2.0")
    with pytest.raises(ConfigError) as raised:
        make(tmp_path, resume=True, config=other)
    assert "rollout.stop from [] to ['x']; scoring.rewards.exact.weight from 1.0 to 2.0; seed from 0 to 1." in str(
        raised.value
    )
    assert run.config.read_text() == longer
    make(tmp_path, resume=True, config=longer)


def test_a_resume_may_take_the_way_out_of_a_reward_that_is_not_finite(tmp_path: Path) -> None:
    """Also of a run whose saved config does not know the key."""
    for number, saved in enumerate(("scoring: {non_finite: fail}", "scoring: {}")):
        (tmp_path / f"{number}.yaml").write_text(saved)
        assert config_changes(tmp_path / f"{number}.yaml", "scoring: {non_finite: mask}") == []


def test_two_processes_never_share_a_run(tmp_path: Path) -> None:
    run = make(tmp_path)
    checkpoint(run, 1)
    code = (
        "import sys; from rlhf_dist.loop.run_directory import open_run_directory\n"
        "try: open_run_directory(sys.argv[1], 'my/run', sys.argv[2], True)\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "runs"), CONFIG]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert f"my/run: process {os.getpid()} is using this run" in done.stdout
    run.close()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""


def test_checkpoints_are_pruned_but_never_the_newest(tmp_path: Path) -> None:
    run = make(tmp_path)
    for step in (2, 4, 10):
        final = checkpoint(run, step)
        assert run.latest_checkpoint() == final and final.name == f"step-{step}"
    assert checkpoint_steps(run.checkpoints) == [4, 10]
    checkpoint(run, 12, keep=1)
    assert checkpoint_steps(run.checkpoints) == [12]
    assert (run.checkpoints / "step-12" / "hf" / "weights").read_text() == "12"


def test_a_run_that_went_back_keeps_its_later_checkpoints_under_another_name(tmp_path: Path) -> None:
    run = make(tmp_path)
    for step in (2, 8):
        checkpoint(run, step)
    assert run.go_back_to(run.checkpoints / "step-2") == [run.checkpoints / "step-8.set-aside"]
    assert run.latest_checkpoint() == run.checkpoints / "step-2"
    checkpoint(run, 8)
    assert checkpoint_steps(run.checkpoints) == [2, 8]
    assert run.go_back_to(run.checkpoints / "step-8") == []
    assert run.go_back_to(run.checkpoints / "step-2") == [run.checkpoints / "step-8.set-aside-2"]
    checkpoint(run, 9, keep=1)
    assert sorted(os.listdir(run.checkpoints)) == ["LATEST", "step-8.set-aside", "step-8.set-aside-2", "step-9"]


def test_a_checkpoint_that_was_written_already_stays(tmp_path: Path) -> None:
    run = make(tmp_path)
    first = checkpoint(run, 8).stat().st_ino
    assert checkpoint(run, 8).stat().st_ino == first and sorted(os.listdir(run.checkpoints)) == ["LATEST", "step-8"]


def test_a_checkpoint_that_latest_does_not_name_is_never_overwritten(tmp_path: Path) -> None:
    """As when the command was killed between the two, or somebody wrote an older step into LATEST."""
    run = make(tmp_path)
    for step in (2, 8):
        checkpoint(run, step)
    run_directory.write_text(run.checkpoints / "LATEST", "step-2\n")
    checkpoint(run, 8)
    assert sorted(os.listdir(run.checkpoints)) == ["LATEST", "step-2", "step-8", "step-8.set-aside"]


def test_an_interrupted_checkpoint_counts_for_nothing_and_is_removed_at_resume(tmp_path: Path) -> None:
    run = make(tmp_path)
    checkpoint(run, 1)
    (run.begin_checkpoint(2) / "half").write_text("x")
    (run.path / "summary.json.tmp").write_text("{")
    assert run.latest_checkpoint() == run.checkpoints / "step-1"
    assert list(run.begin_checkpoint(2).iterdir()) == []
    run.close()
    make(tmp_path, resume=True)
    assert sorted(os.listdir(run.checkpoints)) == ["LATEST", "step-1"]
    assert not (run.path / "summary.json.tmp").exists()


def test_a_latest_that_names_nothing_is_told(tmp_path: Path) -> None:
    run = make(tmp_path)
    shutil.rmtree(checkpoint(run, 3))
    with pytest.raises(
        DataError, match=r"names 'step-3', which is not there; the folder holds nothing: .*another name="
    ):
        run.latest_checkpoint()
    (run.checkpoints / "step-1").mkdir()
    (run.checkpoints / "step-2").mkdir()
    with pytest.raises(DataError, match=r"holds step-1, step-2: .*--resume-from step-2, or write one of"):
        run.latest_checkpoint()


def test_metrics_after_the_checkpoint_are_set_aside_not_lost(tmp_path: Path) -> None:
    run = make(tmp_path)
    assert run.rewind_metrics(0) == 0
    lines = [json.dumps({"step": step, "x": 1.0}) + "\n" for step in range(5)]
    run.metrics.write_text("".join(lines) + '{"step": 5, "x"')
    assert run.rewind_metrics(2) == 3
    assert run.metrics.read_text() == "".join(lines[:3])
    aside = run.path / "metrics.before-resume.jsonl"
    assert aside.read_text() == "".join(lines[3:]) + '{"step": 5, "x"\n'
    assert run.rewind_metrics(2) == 0
    assert run.rewind_metrics(1) == 1 and aside.read_text().endswith(lines[2])


def test_whoever_has_the_metrics_open_goes_on_writing_to_them(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.metrics.write_text('{"step": 0}\n{"step": 1}\n{"step": 2')
    sink = JsonlSink(run.metrics)
    assert run.rewind_metrics(0) == 2
    sink.log(1, {"x": 2.0})
    sink.close()
    assert run.metrics.read_text() == '{"step": 0}\n{"step": 1, "x": 2.0}\n'


def test_writes_replace_whole_files_and_fail_with_the_name(tmp_path: Path) -> None:
    run_directory.write_json(tmp_path / "summary.json", {"a": [1]})
    run_directory.write_json(tmp_path / "summary.json", {"a": [2]})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": [2]}
    assert os.listdir(tmp_path) == ["summary.json"]
    with pytest.raises(DiskError, match=r"no/summary\.json: cannot be written: No such file"):
        run_directory.write_json(tmp_path / "no" / "summary.json", {})


def test_too_little_disk_is_told_with_both_numbers(tmp_path: Path) -> None:
    run_directory.require_free_disk(tmp_path / "runs" / "new", 1)
    with pytest.raises(ResourceError, match=r"runs: 1,073,741,824 MiB of disk are needed and [\d,]+ MiB are free"):
        run_directory.require_free_disk(tmp_path / "runs", 2**50)
