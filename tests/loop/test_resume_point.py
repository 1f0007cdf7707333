"""A checkpoint is compared with what was written before a resume believes it: every file, and the step."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest
from damaged_runs import FILES, flip, make_run, refused, renamed, step_2, use

from rlhf_dist.errors import ConfigError, DataError, DiskError
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.resume_point import other_point, require_command, require_none_written, resume_point
from rlhf_dist.loop.run_directory import open_run_directory
from rlhf_dist.models.checkpoints import FORMAT, problems, read_sealed, sealed
from rlhf_dist.telemetry.sinks import EventLog


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(whole, tmp_path / "run")


def test_a_whole_run_is_resumed_from_where_it_is_asked_to(run: Path) -> None:
    last = run / "checkpoints" / "step-4"
    assert resume_point(run, "train", None) == resume_point(run, "train", 4) == last
    assert resume_point(run, "train", 2) == last.with_name("step-2")
    (last / "hf" / ".DS_Store").touch()
    assert resume_point(run, "train", None) == last, "hidden files are nobody's weights"
    assert read_sealed(last).files is not None and set(read_sealed(last).files or ()) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_in_any_file_is_found(run: Path, name: str) -> None:
    file = run / "checkpoints" / "step-4" / name
    flip(file, 17)
    assert refused(run) == f"{file}: was changed after it was written{step_2(run)}"
    assert resume_point(run, "train", 2) is not None


def test_a_changed_state_is_found_at_every_byte(run: Path) -> None:
    file = run / "checkpoints" / "step-4" / "state.json"
    content = file.read_bytes()
    for at in range(0, len(content), 41):
        flip(file, at)
        found = problems(file.parent)
        assert len(found) == 1 and found[0].startswith(f"{file}: "), (at, found)
        file.write_bytes(content)
    assert problems(file.parent) == []


def other_step(run: Path, name: str) -> None:
    shutil.copy(run / "checkpoints" / "step-2" / name, run / "checkpoints" / "step-4" / name)


def linked(path: Path) -> None:
    shutil.move(path, path.parents[3] / "elsewhere")
    path.symlink_to(path.parents[3] / "elsewhere")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda last: os.truncate(last / FILES[1], 1000), "model.safetensors: has 1,000 bytes, and had 2,000"),
    "empty": (lambda last: os.truncate(last / FILES[3], 0), "optimizer-0.safetensors: has 0 bytes, and had 2,000"),
    "missing": (lambda last: (last / FILES[4]).unlink(), "optimizer-1.safetensors: is missing"),
    "added": (
        lambda last: shutil.copy(last / FILES[4], last / "optimizer-2.safetensors"),
        "optimizer-2.safetensors: is not part of this checkpoint; move it away",
    ),
    "several": (
        lambda last: shutil.rmtree(last / "critic"),
        "critic/hf/model.safetensors: is missing (and 1 more)",
    ),
    "of another step": (
        lambda last: other_step(last.parents[1], FILES[4]),
        "optimizer-1.safetensors: was changed after it was written",
    ),
    "a state of another step": (
        lambda last: other_step(last.parents[1], "state.json"),
        "state.json: is of step 2, in a folder named step-4",
    ),
    "a link": (lambda last: linked(last / FILES[1]), "hf/model.safetensors: is a symbolic link, not a file"),
    "no state": (lambda last: (last / "state.json").unlink(), "state.json: is missing"),
    "an empty state": (lambda last: os.truncate(last / "state.json", 0), "state.json: is not valid JSON: it is empty"),
    "a state that is no text": (
        lambda last: (last / "state.json").write_bytes(b"\xff\xfe{}"),
        "state.json: is not UTF-8 text (byte 0)",
    ),
    "a deep state": (
        lambda last: (last / "state.json").write_text("[" * 100_000),
        "state.json: is not valid JSON: nested too deeply",
    ),
    "a huge number": (
        lambda last: (last / "state.json").write_text('{"step": ' + "9" * 5000 + "}"),
        "state.json: has a whole number of thousands of digits",
    ),
    "a list": (
        lambda last: (last / "state.json").write_text("[1]"),
        "state.json: is not a checkpoint's state: it holds [1], not a mapping",
    ),
    "a folder": (
        lambda last: ((last / "state.json").unlink(), (last / "state.json").mkdir()),
        "state.json: is a directory, not a file",
    ),
    "a newer format": (
        lambda last: (last / "state.json").write_text(json.dumps({"format": FORMAT + 1, "step": 4})),
        f"state.json: has format {FORMAT + 1}, of a newer version of rlhf-dist; this one reads up to {FORMAT}",
    ),
    "a format that is none": (
        lambda last: (last / "state.json").write_text('{"format": "x", "step": 4}'),
        "state.json: was changed after it was written: its own hash does not fit",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_names_its_file_and_the_command_that_resumes_before_it(run: Path, name: str) -> None:
    damage, said = DAMAGE[name]
    last = run / "checkpoints" / "step-4"
    damage(last)
    message = refused(run)
    assert message.startswith(f"{last}/") and said in message and message.endswith(step_2(run))


def test_a_renamed_folder_is_found(run: Path) -> None:
    renamed(run)
    assert f"step-6/state.json: is of step 4, in a folder named step-6{step_2(run)}" in refused(run)


def test_where_no_other_checkpoint_is_whole_the_message_says_what_else_can_be_done(run: Path) -> None:
    flip(run / "checkpoints" / "step-2" / FILES[4])
    flip(run / "checkpoints" / "step-4" / FILES[4])
    hf = run / "checkpoints" / "step-4" / "hf"
    other = f"or start a new run with another name=, with model.path={hf} for its weights"
    assert refused(run).endswith(f"(no other checkpoint can be resumed from), {other}")
    shutil.rmtree(run / "checkpoints" / "step-2")
    assert refused(run).endswith(f". Restore the file from a backup (train has kept this one only), {other}")
    flip(hf / "model.safetensors")
    assert refused(run).endswith("(train has kept this one only), or start a new run with another name=")


def test_a_later_checkpoint_is_offered_where_none_before_is_whole(run: Path) -> None:
    flip(run / "checkpoints" / "step-2" / FILES[4])
    assert refused(run, 2).endswith(f"Resume from step-4 with `rlhf-dist train {run}/config.yaml --resume-from step-4`")


def test_a_step_that_is_not_there_is_told_with_those_that_are(run: Path) -> None:
    assert refused(run, 3) == f"--resume-from step-3: is not there; {run}/checkpoints holds step-2, step-4"


# ---- LATEST ----------------------------------------------------------------------------------------------------------

WAY = "the folder holds step-2, step-4: resume with --resume-from step-4, or write one of those into LATEST"
LATEST: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: file.unlink(), "is missing, and "),
    "empty": (lambda file: file.write_text(""), "is empty; "),
    "blank": (lambda file: file.write_text(" \n\t\n"), "is empty; "),
    "garbage": (lambda file: file.write_bytes(b"\x00\x01\x02"), "holds '\\x00\\x01\\x02', which is not the name of a "),
    "not UTF-8": (lambda file: file.write_bytes(b"step-\xff"), "is not UTF-8 text (byte 5); "),
    "absolute": (lambda file: file.write_text("/etc"), "holds '/etc', which is not the name of a checkpoint; "),
    "outside": (lambda file: file.write_text("../checkpoints/step-4"), "holds '../checkpoints/step-4', which is not"),
    "two lines": (lambda file: file.write_text("step-2\nstep-4\n"), "holds 'step-2\\nstep-4', which is not the name"),
    "no step": (lambda file: file.write_text("hf"), "holds 'hf', which is not the name of a checkpoint; "),
    "a zero before": (lambda file: file.write_text("step-04"), "holds 'step-04', which is not the name of a "),
    "not there": (lambda file: file.write_text("step-9"), "names 'step-9', which is not there; "),
    "huge": (lambda file: file.write_text("step-4" * 1000), "is larger than 4,096 bytes; "),
    "a directory": (lambda file: (file.unlink(), file.mkdir()), "is a directory, not a file; "),
    "a link": (lambda file: (file.unlink(), file.symlink_to("/etc/hostname")), "is a symbolic link, not a file; "),
    "a pipe": (lambda file: (file.unlink(), os.mkfifo(file)), "is a named pipe, not a file; "),
}


@pytest.mark.parametrize("name", LATEST)
def test_a_latest_that_does_not_name_a_checkpoint(run: Path, name: str) -> None:
    damage, said = LATEST[name]
    file = run / "checkpoints" / "LATEST"
    damage(file)
    message = refused(run)
    assert message.startswith(f"{file}: {said}") and message.endswith(WAY)
    assert resume_point(run, "train", 4) == run / "checkpoints" / "step-4", "and the way out works"


@pytest.mark.parametrize("text", ["step-4", "step-4\n", " step-4\r\n"])
def test_space_around_the_name_does_not_matter(run: Path, text: str) -> None:
    (run / "checkpoints" / "LATEST").write_text(text)
    assert resume_point(run, "train", None) == run / "checkpoints" / "step-4"


def test_a_run_without_a_checkpoint_begins_again(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert resume_point(run, "train", None) is None
    require_none_written(run)
    (run / "ledger.sqlite").write_text("no database")
    assert refused(run).endswith(
        "is damaged: file is not a database. The run has no checkpoint, so nothing is lost: "
        "start it again with another name="
    )


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_a_crash_before_the_checkpoint_is_whole_leaves_the_one_before(
    whole: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the last thing was that got done: the run resumes, from the older checkpoint or from the new one."""

    class CrashError(Exception):
        pass

    for crash_at in range(1, 30):
        shutil.rmtree(run)
        shutil.copytree(whole, run)
        directory = open_run_directory(str(run.parent), "run", "name: run\n", resume=True)
        ledger = Ledger(directory.ledger)
        use(ledger, 6)
        (directory.begin_checkpoint(6) / "weights").write_text("w")
        done = 0

        def crash(real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **named: object) -> object:
                nonlocal done
                done += 1
                if done == crash_at:  # noqa: B023
                    raise CrashError
                return real(*args, **named)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "fsync"):
                patch.setattr(os, name, crash(getattr(os, name)))
            try:
                directory.commit_checkpoint(6, 2, {"step": 6, "ledger": asdict(ledger.totals(6))})
                finished = True
            except CrashError:
                finished = False
        ledger.close()
        directory.close()
        found = resume_point(run, "train", None)
        assert found is not None and found.name in ("step-4", "step-6")
        if finished:
            assert found.name == "step-6"
            return
    raise AssertionError("it never got to its end")


def test_a_file_that_vanished_before_it_was_hashed_is_a_failed_checkpoint(run: Path) -> None:
    directory = open_run_directory(str(run.parent), "run", "name: run\n", resume=True)
    folder = directory.begin_checkpoint(6)
    (folder / "weights").symlink_to("nowhere")
    (folder / "more").write_text("x")
    text = sealed(folder, {"step": 6})
    assert re.search(r'"more": \{\s*"bytes": 1,', text) and "weights" not in text
    with pytest.raises(DiskError, match=r"step-6: weights did not arrive"):
        directory.commit_checkpoint(6, 2, {"step": 6}, ["weights"])
    directory.close()


def test_the_command_for_a_run_that_was_moved_names_its_new_place(run: Path, tmp_path: Path) -> None:
    (run / "config.yaml").write_text(f"output: {run.parent}\nname: {run.name}\n")
    moved = tmp_path / "elsewhere" / "other"
    shutil.copytree(run, moved)
    for place in (run, moved):
        flip(place / "checkpoints/step-4/optimizer-0.safetensors")
    assert refused(run).endswith(step_2(run))
    words = f"{moved}/config.yaml output={moved.parent} name=other --resume-from step-2"
    assert refused(moved).endswith(f"`rlhf-dist train {words}`")


def test_the_point_that_a_supervisor_goes_on_from(run: Path) -> None:
    assert other_point(run, "train") == ("", None), "nothing is wrong with the newest"
    folder = run / "checkpoints"
    (folder / "LATEST").write_text("nothing\n")
    reason, other = other_point(run, "train")
    assert "LATEST: holds 'nothing'" in reason and other == folder / "step-4", "the newest that is sound"
    flip(folder / "step-4" / "hf" / "model.safetensors")
    assert other_point(run, "train")[1] == folder / "step-2"
    (folder / "LATEST").write_text("step-4\n")
    reason, other = other_point(run, "train")
    assert "step-4/hf/model.safetensors" in reason and other == folder / "step-2"
    flip(folder / "step-2" / "hf" / "model.safetensors")
    reason, other = other_point(run, "train")
    assert reason and other is None


def test_checkpoints_that_were_written_and_are_gone_are_missed(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with closing(EventLog(run / "events.jsonl")) as log:
        log.event("warning", "no checkpoint yet")
        require_none_written(run)
        for step in (2, 4):
            log.event("checkpoint", f"wrote step-{step}", step=step)
    with pytest.raises(DataError, match=r"run/checkpoints: holds no checkpoint, and by events\.jsonl 2 were written"):
        require_none_written(run)


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ({"cursor": {}, "before": {"eval/greedy_accuracy": 0.0}}, "train"),
        ({"before": {"sft/held_out_loss": 1.0}}, "sft"),
        ({"before": {"reward_model/held_out_loss": 1.0}}, "reward"),
        ({"before": {"prefer/held_out_loss": 1.0}}, "prefer"),
    ],
)
def test_the_run_of_another_command_is_named(run: Path, state: dict[str, object], kind: str) -> None:
    folder = run / "checkpoints" / "step-4"
    (folder / "state.json").write_text(sealed(folder, {"step": 4} | state))
    for command in ("train", "sft", "reward", "prefer"):
        if command == kind:
            require_command(folder, command)
            continue
        with pytest.raises(ConfigError, match=f"run: is a run of `{kind}`, and this is `{command}`: resume it with"):
            require_command(folder, command)
