"""The directory of one run: its files, its lock, its checkpoints, and the rules of coming back to it.

OUTPUT/NAME/  config.yaml  metrics.jsonl  events.jsonl  summary.json  ledger.sqlite  curves.png  wandb_id  run.lock
              rollouts/  checkpoints/step-N/ + LATEST  logs/  wandb/
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_dist.errors import ConfigError, DataError, DiskError, ResourceError
from rlhf_dist.telemetry.sinks import EVENTS_FILE, METRICS_FILE, ROLLOUTS_FOLDER

CHANGEABLE = (
    "name",
    "output",
    "telemetry",
    "cluster",
    "loop.steps",
    "loop.checkpoint_every",
    "loop.keep_checkpoints",
    "eval.every",
    "scoring.non_finite",
)
"""Keys and sections that a resume may change, besides `ENDINGS`; anything else would make it another run."""
ENDINGS = (".timeout_s", ".retries")
"""How long something may take, and how often it is tried."""
CHECKPOINT_PREFIX = "step-"


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

    def commit_checkpoint(self, step: int, keep: int, needed: Sequence[str] = ()) -> Path:
        """Make the folder of `begin_checkpoint` the newest checkpoint, then remove all but the newest `keep`.

        `needed`: files that other processes had to write into it. A crash at any moment leaves the earlier checkpoint
        or this one whole; so when LATEST names this very step already (a resume that had nothing left to do), the one
        that is there stays. Returns its path. Raises DiskError.
        """
        assert keep >= 1, keep
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
        with _disk_errors(final):
            _sync_tree(folder)
            if final.exists():  # Written before a resume from an earlier step.
                shutil.rmtree(final)
            os.rename(folder, final)
            _sync(self.checkpoints)
        write_text(self.checkpoints / "LATEST", final.name + "\n")
        older = sorted(other for other in checkpoint_steps(self.checkpoints) if other <= step)
        for other in older[:-keep]:
            shutil.rmtree(self.checkpoints / f"{CHECKPOINT_PREFIX}{other}", ignore_errors=True)
        return final

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint that LATEST names; None before the first."""
        return latest_checkpoint(self.path)

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
    nothing to resume, when the config changed in a way that makes it another run, or when another process is using
    it; ResourceError when it cannot be made. A run without a checkpoint goes back to its start.
    """
    path = Path(output) / name
    if not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"name: {name!r} is not a name for a directory inside {output}; use for example name=my-run")
    return _come_back(path, config_text) if resume else _make(path, config_text)


def _make(path: Path, config_text: str) -> RunDirectory:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except FileExistsError:
        if not path.exists():
            raise ConfigError(f"output: {path.parent} is a file, not a directory; give another output=") from None
        if not _never_began(path):
            raise ConfigError(f"{path}: this run exists; continue it with --resume, or give another name=") from None
        return _fill(path, config_text)
    except OSError as error:
        raise ResourceError(f"{path}: the run directory cannot be made: {error.strerror}") from error
    try:
        return _fill(path, config_text)
    except (OSError, DiskError) as error:
        shutil.rmtree(path, ignore_errors=True)  # Just made and empty: it must not stand in the way of a second try.
        raise ResourceError(f"{path}: the run directory cannot be made: {error}") from error


def _fill(path: Path, config_text: str) -> RunDirectory:
    run = RunDirectory(path, _take_lock(path))
    for folder in (run.checkpoints, run.logs):  # `rollouts` is made with its first file: only `train` has any
        folder.mkdir(exist_ok=True)
    run.save_config(config_text)
    return run


def _never_began(path: Path) -> bool:
    """A run that failed while its engines started: its directory holds nothing but logs, and may be taken again."""
    metrics = path / METRICS_FILE
    written = metrics.exists() and metrics.stat().st_size > 0
    return (path / "run.lock").exists() and not written and not checkpoint_steps(path / "checkpoints")


def _come_back(path: Path, config_text: str) -> RunDirectory:
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run to resume; leave out --resume to start it")
    if not (path / "run.lock").exists():
        raise ConfigError(f"{path}: not a run's directory; leave out --resume and give another name=")
    run = RunDirectory(path, _take_lock(path))
    try:
        changes = config_changes(run.config, config_text)
        if changes:
            raise ConfigError(
                f"{run.config}: a resume cannot change {'; '.join(changes)}. "
                "Give the saved values, or start a new run with another name="
            )
        for folder in run.checkpoints.glob(f".{CHECKPOINT_PREFIX}*.unfinished"):
            shutil.rmtree(folder)
        for file in [*path.glob("*.tmp"), *run.checkpoints.glob("*.tmp"), *run.rollouts.glob("*.tmp")]:
            file.unlink()
        run.save_config(config_text)
    except OSError as error:
        run.close()
        raise DiskError(f"{path}: cannot be written: {error.strerror}") from error
    except BaseException:
        run.close()
        raise
    return run


def _take_lock(path: Path) -> int:
    """Raises ConfigError naming the process that holds the lock."""
    descriptor = os.open(path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode("ascii", errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise ConfigError(f"{path}: process {holder} is using this run; wait for it, or give another name=") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
    return descriptor


def config_changes(saved: Path, config_text: str) -> list[str]:
    """`KEY from OLD to NEW` for every key that differs and that a resume must not change, in order.

    Raises DataError when the saved config is missing or no YAML.
    """
    try:
        old = _flat(yaml.safe_load(saved.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise DataError(f"{saved}: cannot be read: {' '.join(str(error).split())}") from error
    new = _flat(yaml.safe_load(config_text))
    fixed = [key for key in sorted(old.keys() | new.keys()) if not _is_changeable(key)]
    absent = "(absent)"
    pairs = [(key, old.get(key, absent), new.get(key, absent)) for key in fixed]
    return [f"{key} from {before} to {after}" for key, before, after in pairs if before != after]


def _is_changeable(key: str) -> bool:
    listed = any(key == allowed or key.startswith(allowed + ".") for allowed in CHANGEABLE)
    return listed or key.endswith(ENDINGS)


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> `section.key` names; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint that `run/checkpoints/LATEST` names; None when there is none. Needs no lock.

    Raises DataError when LATEST names a folder that is not there.
    """
    pointer = run / "checkpoints" / "LATEST"
    if not pointer.is_file():
        return None
    found = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if found == pointer.parent or not found.is_dir():
        steps = ", ".join(f"{CHECKPOINT_PREFIX}{step}" for step in checkpoint_steps(pointer.parent))
        way = "write one of those into LATEST" if steps else "start a new run with another name="
        raise DataError(
            f"{pointer}: names {found.name!r}, which is not there; the folder holds {steps or 'nothing'}: {way}"
        )
    return found


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in `folder`, ascending."""
    names = [entry.name.removeprefix(CHECKPOINT_PREFIX) for entry in folder.glob(f"{CHECKPOINT_PREFIX}*")]
    return sorted(int(name) for name in names if name.isdecimal())


def step_of(checkpoint: Path) -> int:
    """The step that a finished checkpoint was written after."""
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` as a whole: after a crash it holds the old or the new text. Raises DiskError."""
    unfinished = path.with_name(path.name + ".tmp")
    with _disk_errors(path):
        with unfinished.open("w", encoding="utf-8") as file:
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
    try:
        return line.endswith(b"\n") and int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for entry in [*folder.rglob("*"), folder]:
        _sync(entry)
