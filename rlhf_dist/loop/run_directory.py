"""The directory of one run: its files, its lock, its checkpoints, and the rules of coming back to it.

OUTPUT/NAME/  config.yaml  metrics.jsonl  events.jsonl  summary.json  ledger.sqlite  curves.png  wandb_id  run.lock
              rollouts/  faults/  checkpoints/step-N/ + LATEST, BEST  logs/  wandb/
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_dist.errors import ConfigError, DataError, DiskError, ResourceError
from rlhf_dist.loop.best_checkpoints import Best, best_steps
from rlhf_dist.loop.run_lock import LOCK_FILE, looked_at, refuse_links, require_place, take_lock
from rlhf_dist.loop.saved_config import require_same_config
from rlhf_dist.models.checkpoints import (
    BEST,
    CHECKPOINT_PREFIX,
    LATEST,
    STATE_FILE,
    best_checkpoint,
    checkpoint_steps,
    latest_checkpoint,
    sealed,
    step_of,
)
from rlhf_dist.models.guarded_files import read_text
from rlhf_dist.telemetry.sinks import EVENTS_FILE, METRICS_FILE, ROLLOUTS_FOLDER

WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of a run and the safe ways to write them. Made by `open_run_directory`, which holds its lock."""

    path: Path
    lock: int
    """File descriptor whose flock keeps other processes out; it goes with the process, however that ends."""

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def events(self) -> Path:
        return self.path / EVENTS_FILE

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def wandb_id(self) -> Path:
        """Holds the id of the wandb run, so that a resume continues it."""
        return self.path / "wandb_id"

    @property
    def rollouts(self) -> Path:
        return self.path / ROLLOUTS_FOLDER

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def save_config(self, text: str) -> None:
        """Keep the resolved config. Raises DiskError."""
        write_text(self.config, text)

    def begin_checkpoint(self, step: int) -> Path:
        """An empty folder to fill; it counts for nothing until `commit_checkpoint`. Raises DiskError."""
        folder = self._unfinished(step)
        with _disk_errors(folder):
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        return folder

    def commit_checkpoint(
        self,
        step: int,
        keep: int,
        state: Mapping[str, Any],
        needed: Sequence[str] = (),
        best: Best | None = None,
        moved: Callable[[], object] = lambda: None,
    ) -> Path:
        """Make the folder of `begin_checkpoint` the newest checkpoint, then remove all but the newest `keep` and the
        `best`.

        `needed`: files that other processes had to write into it. `state` becomes its state.json, with a hash of every
        file. A crash at any moment leaves the earlier checkpoint or this one whole; so when LATEST names this very step
        already (a resume that had nothing left to do), the one that is there stays. `moved`: called as it goes on.
        Returns its path. Raises DiskError.
        """
        assert keep >= 1 and state["step"] == step, (keep, step)
        folder, final = self._unfinished(step), self.checkpoints / f"{CHECKPOINT_PREFIX}{step}"
        missing = [name for name in needed if not (folder / name).exists()]
        if missing:
            raise DiskError(
                f"{final}: {missing[0]} did not arrive: the learner's node does not share this directory; "
                "give an output= on a disk that all nodes share"
            )
        if self.latest_checkpoint() == final:
            with _disk_errors(folder):
                shutil.rmtree(folder)
            return final
        try:
            text = sealed(folder, state, moved)
        except DataError as error:
            raise DiskError(f"{final}: cannot be read back: {error}") from error
        write_text(folder / STATE_FILE, text)
        older = {other: place for other, place in self._finished().items() if other < step}
        with _disk_errors(final):
            _sync_tree(folder, moved)
        # Before it is there: a resume that finds the last step has nothing left to do.
        stay = self._name_best(older | {step: folder}, best)
        with _disk_errors(final):
            if final.exists():  # Written by a run that went back since; a resume sets it aside.
                _set_aside(final)
            os.rename(folder, final)
            _sync(self.checkpoints)
        write_text(self.checkpoints / LATEST, final.name + "\n")
        for other in [*sorted(older), step][:-keep]:
            if other not in stay:
                shutil.rmtree(older[other], ignore_errors=True)
        return final

    def _finished(self) -> dict[int, Path]:
        """Step -> folder."""
        return {step: self.checkpoints / f"{CHECKPOINT_PREFIX}{step}" for step in checkpoint_steps(self.checkpoints)}

    def _name_best(self, checkpoints: Mapping[int, Path], best: Best | None) -> list[int]:
        """Let BEST name the best of these, by step; those that stay. Raises DiskError."""
        stay = [] if best is None else best_steps(checkpoints, best)
        if stay and self.best_checkpoint() != (first := self.checkpoints / f"{CHECKPOINT_PREFIX}{stay[0]}"):
            write_text(self.checkpoints / BEST, first.name + "\n")
        elif not stay:
            self._name_no_best()
        return stay

    def _name_no_best(self) -> None:
        with _disk_errors(self.checkpoints / BEST):
            if os.path.lexists(self.checkpoints / BEST):
                (self.checkpoints / BEST).unlink()

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint that LATEST names; None before the first. Raises DataError, see `checkpoints`."""
        return latest_checkpoint(self.path)

    def best_checkpoint(self) -> Path | None:
        """The checkpoint that BEST names; None where it names none that is there."""
        return best_checkpoint(self.path)

    def go_back_to(self, checkpoint: Path) -> list[Path]:
        """Make `checkpoint` the newest: those of later steps are renamed, and count for nothing from then on.

        Returns their new paths. Raises DiskError.
        """
        if not (self.checkpoints / LATEST).is_file() or self.latest_checkpoint() != checkpoint:
            write_text(self.checkpoints / LATEST, checkpoint.name + "\n")
        later = [step for step in checkpoint_steps(self.checkpoints) if step > step_of(checkpoint)]
        best = self.best_checkpoint()
        if best is None or step_of(best) in later:
            self._name_no_best()  # until the next checkpoint
        with _disk_errors(self.checkpoints):
            return [_set_aside(self.checkpoints / f"{CHECKPOINT_PREFIX}{step}") for step in later]

    def read_wandb_id(self) -> tuple[str | None, str]:
        """The id in `wandb_id`, None when there is none that can be used; and why not, empty when all is well."""
        if not os.path.lexists(self.wandb_id):
            return None, ""
        try:
            found = read_text(self.wandb_id, 4096).strip()
        except DataError as error:
            return None, str(error)
        if not WANDB_ID.fullmatch(found):
            return None, f"{self.wandb_id}: {found[:60]!r} is not the id of a wandb run"
        return found, ""

    def rewind_metrics(self, step: int) -> int:
        """Before going on from `step`: lines of metrics.jsonl after it move to metrics.before-resume.jsonl.

        A half-written line moves too. Returns the number of lines moved. Raises DiskError.
        """
        if not self.metrics.exists():
            return 0
        with _disk_errors(self.metrics):
            lines = self.metrics.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _is_up_to(line, step)]
            moved = [line for line in lines if not _is_up_to(line, step)]
            if moved:
                with (self.path / "metrics.before-resume.jsonl").open("ab") as aside:
                    aside.writelines(line if line.endswith(b"\n") else line + b"\n" for line in moved)
                    aside.flush()
                    os.fsync(aside.fileno())
                # In place: the run's telemetry has the file open, and would go on writing to one that was replaced.
                with self.metrics.open("r+b") as file:
                    file.write(b"".join(kept))
                    file.truncate()
                    file.flush()
                    os.fsync(file.fileno())
        return len(moved)

    def close(self) -> None:
        """Let other processes in. Call once."""
        os.close(self.lock)

    def _unfinished(self, step: int) -> Path:
        return self.checkpoints / f".{CHECKPOINT_PREFIX}{step}.unfinished"


def open_run_directory(output: str, name: str, config_text: str, resume: bool) -> RunDirectory:
    """Make `output/name`, or with `resume` come back to it; lock it, and save the resolved config (YAML).

    Leftovers of interrupted writes are removed. Raises ConfigError when it exists (without `resume`), when there is
    nothing to resume, when the config changed in a way that makes it another run, when another process is using it,
    or when it has links in it; ResourceError when it cannot be made. A run without a checkpoint goes back to its start.
    """
    require_place(output, name)
    path = Path(output) / name
    return _come_back(path, config_text) if resume else _make(path, config_text)


def _make(path: Path, config_text: str) -> RunDirectory:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except FileExistsError:
        if not path.exists():
            raise ConfigError(f"output: {path.parent} is a file, not a directory; give another output=") from None
        if not never_began(path):
            if (path / LOCK_FILE).is_file():
                with looked_at(path):  # one that is under way cannot be continued
                    pass
            raise ConfigError(f"{path}: this run exists; continue it with --resume, or give another name=") from None
        refuse_links(path)
        return _fill(path, config_text)
    except OSError as error:
        raise ResourceError(f"{path}: the run directory cannot be made: {error.strerror}") from error
    try:
        return _fill(path, config_text)
    except (OSError, DiskError) as error:
        shutil.rmtree(path, ignore_errors=True)  # Just made and empty: it must not stand in the way of a second try.
        raise ResourceError(f"{path}: the run directory cannot be made: {error}") from error


def _fill(path: Path, config_text: str) -> RunDirectory:
    run = RunDirectory(path, take_lock(path))
    for folder in (run.checkpoints, run.logs):  # `rollouts` is made with its first file: only `train` has any
        folder.mkdir(exist_ok=True)
    for suffix in ("", "-wal", "-shm"):  # Of a start that failed before its first step.
        run.ledger.with_name(run.ledger.name + suffix).unlink(missing_ok=True)
    run.save_config(config_text)
    return run


def never_began(path: Path) -> bool:
    """A run that failed while its engines started: its directory holds nothing but logs, and may be taken again.

    So may an empty one, of a run that was killed before it had its lock.
    """
    if path.is_dir() and not any(path.iterdir()):
        return True
    metrics, folder = path / METRICS_FILE, path / "checkpoints"
    written = metrics.exists() and metrics.stat().st_size > 0
    return (path / LOCK_FILE).exists() and not written and not checkpoint_steps(folder)


def require_run(path: Path) -> None:
    """Raise ConfigError when `path` is not a run directory that could be resumed."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run to resume; leave out --resume to start it")
    not_begun = ConfigError(f"{path}: this run has not begun, so there is nothing to resume; leave out --resume")
    if not any(path.iterdir()):
        raise not_begun
    if not os.path.lexists(path / LOCK_FILE):
        raise ConfigError(
            f"{path}: not a run's directory, for it has no {LOCK_FILE}; leave out --resume and give another name=. "
            f"If it is a copy of one, make an empty {LOCK_FILE} in it"
        )
    refuse_links(path)
    if not os.path.lexists(path / "config.yaml") and never_began(path):
        raise not_begun


def _come_back(path: Path, config_text: str) -> RunDirectory:
    require_run(path)
    run = RunDirectory(path, take_lock(path))
    try:
        require_same_config(run.config, config_text)
        for folder in run.checkpoints.glob(f".{CHECKPOINT_PREFIX}*.unfinished"):
            shutil.rmtree(folder)
        for file in [*path.glob("*.tmp"), *run.checkpoints.glob("*.tmp"), *run.rollouts.glob("*.tmp")]:
            file.unlink()
        for folder in (run.checkpoints, run.logs):
            folder.mkdir(exist_ok=True)
        run.save_config(config_text)
    except OSError as error:
        run.close()
        raise DiskError(f"{path}: cannot be written: {error.strerror}") from error
    except BaseException:
        run.close()
        raise
    return run


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` as a whole: after a crash it holds the old or the new text. Raises DiskError."""
    unfinished = path.with_name(path.name + ".tmp")
    with _disk_errors(path):
        # A leftover, or a link that somebody put there: what it points to must not be overwritten.
        unfinished.unlink(missing_ok=True)
        with unfinished.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON. Raises DiskError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def require_free_disk(path: Path, bytes_needed: int) -> None:
    """Raises ResourceError with both numbers when the disk that holds (or would hold) `path` has less space left."""
    existing = next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        raise ResourceError(
            f"{path}: {bytes_needed / 2**20:,.0f} MiB of disk are needed and {free / 2**20:,.0f} MiB are free; "
            "free some, or give another output="
        )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: cannot be written: {error.strerror}") from error


def _is_up_to(line: bytes, step: int) -> bool:
    """Whether it is a whole line of a step until then; a damaged one is not."""
    try:
        found = json.loads(line)
        _ = [float(value) for value in found.values()]  # as the curves at the end of the run will read it
        return line.endswith(b"\n") and type(found["step"]) is int and found["step"] <= step
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return False


def _set_aside(checkpoint: Path) -> Path:
    """Rename `step-6` to `step-6.set-aside`, or to the first of `.set-aside-2`, `-3` ... that is free."""
    number, target = 1, checkpoint.with_name(f"{checkpoint.name}.set-aside")
    while os.path.lexists(target):
        number += 1
        target = checkpoint.with_name(f"{checkpoint.name}.set-aside-{number}")
    checkpoint.rename(target)
    return target


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path, moved: Callable[[], object]) -> None:
    for entry in [*folder.rglob("*"), folder]:
        _sync(entry)
        moved()
