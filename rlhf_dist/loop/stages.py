"""What to do with a stage of a pipeline: skip, resume, run, or run anew; decided from files alone.

OUTPUT/NAME/  STAGE/stage.json     left by a finished stage: what it was made from, and fingerprints of its model
              STAGE.begun.json     the same without the model, while a stage is under way or was cut
              STAGE.old-N/         a stage whose inputs changed, as it was
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from rlhf_dist.config.load import from_yaml, to_yaml
from rlhf_dist.config.methods import METHODS
from rlhf_dist.config.paths import expanded
from rlhf_dist.config.pipeline_checks import NAME, Stage
from rlhf_dist.config.prefer_keys import START
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ConfigError, DataError, DiskError, InputError
from rlhf_dist.loop.pipeline_files import content, digest, lacking, model_files
from rlhf_dist.loop.resume_point import resume_point
from rlhf_dist.loop.run_directory import never_began, write_json, write_text
from rlhf_dist.loop.run_end import read_summary
from rlhf_dist.loop.run_lock import LOCK_FILE, refuse_links, take_lock
from rlhf_dist.loop.saved_config import CHANGEABLE, config_changes, flat, key_changes, nested
from rlhf_dist.models.checkpoints import LATEST, latest_checkpoint
from rlhf_dist.models.guarded_files import read_json, read_text

T = TypeVar("T")

RECORD_FILE = "stage.json"

CUTS = ("learner.micro_batch_tokens", "learner.logprob_chunk_tokens")
READ = {
    "sft": ("seed", "model", "data", "sft", "eval.prompts", *CUTS),
    "reward": ("seed", "model", "data.task", "data.system", "data.chat", "preferences", "reward", *CUTS),
    "prefer": ("seed", "model", "data", "preferences", "prefer", *CUTS),
    "train": (
        *("seed", "model", "data", "rollout", "scoring", "algo", "learner", "critic", "reference", "ptx"),
        *("weights", "loop", "eval", "sft.wrong_share"),
    ),
}
"""Command -> the keys and sections that it reads; other keys may change without making its result another one."""
UNRECORDED = tuple(key for key in CHANGEABLE if key != "loop.steps")
"""Keys that are read and change nothing in the result but its rounding; so does every `timeout_s`."""
PATH_KEYS = ("path", "eval_path", "start", "reference")
"""Last parts of the keys that may name a file or directory whose content is an input."""
NO_PATHS = ("tiny", "policy", "shared", START)
SHOWN_CHANGES = 3


@dataclass(frozen=True, slots=True)
class Basis:
    """All that the result of a stage depends on."""

    command: str
    config: Mapping[str, Any]
    """Key -> value of what the command reads; <NAME> stands for an earlier stage."""
    inputs: Mapping[str, str]
    """What is read -> fingerprint of its content, as in {"the output of stage sft": "9c0f..."}."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What a finished stage says of itself."""

    basis: Basis
    checkpoint: str
    """Name of its newest checkpoint, as in step-150."""
    files: Mapping[str, str]
    """File in that checkpoint's hf/ -> xxh3-128 of its content."""
    seconds: float
    """Wall-clock time of its last start, or of its resume."""

    @property
    def output(self) -> str:
        """One fingerprint for the whole model."""
        return digest(self.files)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a stage."""

    kind: Literal["skip", "resume", "run", "rerun"]
    """run: there is nothing yet; rerun: what is there was made from something else, and is set aside first."""
    why: str
    """In words; empty for run."""

    def text(self, stage: Stage) -> str:
        """For the one line that is shown."""
        what = "run anew" if self.kind == "rerun" else self.kind
        return f"{what} {stage.path}" + (f": {self.why}" if self.why else "")


def decide(stage: Stage, basis: Basis) -> Decision:
    """Look at the stage's run directory and say what has to be done to have the result of `basis` there.

    Raises ConfigError when its output was changed by hand or when something else lies there, DataError when a file of
    it is corrupt.
    """
    path = stage.path
    if not path.exists() and not path.is_symlink():
        return Decision("run", "")
    if not (path / LOCK_FILE).exists() and has_begun(path):
        raise ConfigError(
            f"{path}: is in the way of stage {stage.name}, and no run's directory; move it away, or give another name="
        )
    refuse_links(path)
    finished = read_finished(path)
    if finished is not None:
        changes = differences(finished.basis, basis)
        if changes:
            return Decision("rerun", listed(changes))
        if not lacking(finished.files):  # Else it was left while files were away, and says nothing of a whole model.
            check_unchanged(stage, finished)
            return Decision("skip", f"complete ({finished.checkpoint}), inputs unchanged")
    if not has_begun(path):
        return Decision("run", "")
    return _decide_cut(stage, basis)


def _decide_cut(stage: Stage, basis: Basis) -> Decision:
    """Of a run that began and left no record of its end: cut, started by hand, or to be accepted as it is."""
    begun = read_begun(stage)
    changes = [] if begun is None else input_differences(begun, basis)
    changed = config_changes(stage.path / "config.yaml", to_yaml(resumable(stage)))
    if changed:
        moved = _moved(stage, known=begun is not None)
        changes += [change for change in changed if change not in moved]
    if changes:
        return Decision("rerun", listed(changes))
    try:
        checkpoint = resume_point(stage.path, stage.command, None)
    except DataError as error:
        raise DataError(f"{error}; or move {stage.path} away to rerun the stage") from None
    check_whole(stage)
    return Decision("resume", f"it goes on from {checkpoint.name}" if checkpoint else "it was cut before a checkpoint")


def has_begun(path: Path) -> bool:
    """False for a directory that holds nothing, or nothing but logs: its run failed while its engines started."""
    return not never_began(path)


def basis_of(stage: Stage, earlier: Mapping[str, Finished]) -> Basis:
    """What `stage` is made from, now; `earlier` are the finished stages by name. Raises DataError."""
    keys = _flat(stage.written)
    config = {key: value for key, value in keys.items() if _counts(key, stage)}
    inputs = {f"the output of stage {name}": earlier[name].output for name in stage.needs}
    for key, value in config.items():
        for path in _paths(key, value, stage):
            inputs[f"the content of {key}, {path}"] = content(path)
    return Basis(stage.command, config, inputs)


def _counts(key: str, stage: Stage) -> bool:
    if stage.command == "train" and _below(key, ("critic",)) and METHODS[stage.config.algo.name].baseline != "critic":
        return False
    return _below(key, READ[stage.command]) and not _below(key, UNRECORDED) and not key.endswith("timeout_s")


def _below(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def _paths(key: str, value: Any, stage: Stage) -> Iterator[Path]:
    """The files and directories that lie here and that `key` makes the stage read; not those of earlier stages."""
    if not isinstance(value, str) or not value or key in stage.wired:
        return
    last = key.rsplit(".", 1)[-1]
    if last in PATH_KEYS and value not in NO_PATHS:
        candidates = [expanded(value)]
    elif last == "function":
        module = Path(*value.partition(":")[0].split("."))
        candidates = [module.with_suffix(".py"), module / "__init__.py"]
    else:
        return
    yield from (path for path in candidates if path.exists())


def resumable(stage: Stage) -> Config:
    """The stage's config, with the cut run's values where its command does not read them: a resume compares all keys.

    Raises DataError or ConfigError when the run's own config.yaml cannot be read.
    """
    new, old = _flat(stage.config), _saved(stage)

    def keeps_new(key: str) -> bool:
        return _below(key, READ[stage.command]) or _below(key, CHANGEABLE) or key.endswith("timeout_s")

    keys = {key: value for key, value in old.items() if not keeps_new(key)}
    keys |= {key: value for key, value in new.items() if keeps_new(key)}
    return from_yaml(yaml.safe_dump(nested(keys), allow_unicode=True), str(stage.path / "config.yaml"))


def come_back(stage: Stage) -> Config:
    """The config to resume with. In a copied run, config.yaml gets the new places of the earlier stages first.

    Raises what `resumable` raises, and ConfigError when a process is using the run.
    """
    config, saved = resumable(stage), stage.path / "config.yaml"
    if config_changes(saved, to_yaml(config)):
        os.close(take_lock(stage.path))
        write_text(saved, to_yaml(config))
    return config


def _saved(stage: Stage) -> dict[str, Any]:
    """The run's own config.yaml."""
    saved = stage.path / "config.yaml"
    try:
        return _flat(from_yaml(read_text(saved), str(saved)))
    except InputError as error:
        raise DataError(f"{error}; move {stage.path} away to rerun the stage") from None


def _moved(stage: Stage, known: bool) -> set[str]:
    """Those of `config_changes` that are none: the same earlier stage, copied or moved together with this one.

    Unless its fingerprint is `known`, a directory that is still at the old place has to hold the same as the new one.
    """
    old, new, written = _saved(stage), _flat(stage.config), _flat(stage.written)
    root = Path(old["output"]) / Path(old["name"]).parent
    moved = set()
    for key, text in written.items():
        if not isinstance(text, str) or text == new[key]:
            continue
        then = re.sub(f"<({NAME})>", lambda found: str(root / found[1]), text)
        before, now = Path(then), Path(new[key])
        same = known or not (before.is_dir() and now.is_dir()) or content(before) == content(now)
        if old.get(key) == then and same:
            moved.add(f"{key} from {then} to {new[key]}")
    return moved


def _flat(config: Config) -> dict[str, Any]:
    return flat(asdict(config))


# ---- what changed ----------------------------------------------------------------------------------------------------


def differences(old: Basis, new: Basis) -> list[str]:
    """What makes the result of `new` another one than that of `old`: keys, then contents. Empty: the same."""
    if old.command != new.command:
        return [f"the command from {old.command} to {new.command}"]
    return [*key_changes(old.config, new.config).values(), *input_differences(old, new)]


def input_differences(old: Basis, new: Basis) -> list[str]:
    """The contents that differ."""
    names = sorted(old.inputs.keys() | new.inputs.keys())
    return [name for name in names if old.inputs.get(name) != new.inputs.get(name)]


def listed(changes: Sequence[str]) -> str:
    """`changed: A; B; C and 2 more`."""
    more = f" and {len(changes) - SHOWN_CHANGES} more" if len(changes) > SHOWN_CHANGES else ""
    return f"changed: {'; '.join(changes[:SHOWN_CHANGES])}{more}"


def check_unchanged(stage: Stage, finished: Finished) -> None:
    """Raise ConfigError, naming the file, when the stage's output is not what it left."""
    changed = _changed_file(stage.path, finished)
    if changed:
        raise ConfigError(
            f"{changed} after stage {stage.name} had finished. Put it back, or move {stage.path} away to rerun it"
        )


def check_whole(stage: Stage) -> None:
    """Raise ConfigError when a file that later stages read is missing from the stage's newest model, if it has one."""
    checkpoint = latest_checkpoint(stage.path)
    missing = checkpoint and lacking([file.name for file in checkpoint.glob("hf/*")], checkpoint / "hf")
    if checkpoint and missing:
        raise ConfigError(
            f"{checkpoint / 'hf' / missing}: is not there, and a model is not whole without it. Put it back, or move "
            f"{stage.path} away to run stage {stage.name} anew"
        )


def _changed_file(path: Path, finished: Finished) -> str | None:
    summary = path / "summary.json"
    if read_summary(path) is None:
        return f"{summary}: was {'changed' if summary.is_file() else 'removed'}"
    latest = path / "checkpoints" / LATEST
    now = latest_checkpoint(path) if os.path.lexists(latest) else None
    then = path / "checkpoints" / finished.checkpoint
    if now is None or now.name != finished.checkpoint:
        return f"{latest}: was {'removed' if now is None else f'set from {finished.checkpoint} to {now.name}'}"
    files = model_files(now)
    for name in sorted(finished.files.keys() | files.keys()):
        if finished.files.get(name) != files.get(name):
            verb = "was removed" if name not in files else "was added" if name not in finished.files else "was changed"
            return f"{then / 'hf' / name}: {verb}"
    return None


# ---- files -----------------------------------------------------------------------------------------------------------


def begun_file(stage: Stage) -> Path:
    """Beside the run directory, which is not there yet when the stage begins."""
    return stage.path.with_name(f"{stage.name}.begun.json")


def write_begun(stage: Stage, basis: Basis) -> None:
    """Say what the stage is made from, before it starts. Raises DiskError."""
    write_json(begun_file(stage), asdict(basis))


def write_finished(stage: Stage, basis: Basis, seconds: float) -> Finished:
    """Say that the stage is complete, with its model's fingerprints. Raises DiskError, DataError."""
    checkpoint = latest_checkpoint(stage.path)
    if checkpoint is None:
        raise DataError(f"{stage.path}: the stage ended and left no checkpoint")
    check_whole(stage)
    if read_summary(stage.path) is None:
        raise DataError(
            f"{stage.path / 'summary.json'}: the stage ended without it; move {stage.path} away to run anew"
        )
    finished = Finished(basis, checkpoint.name, model_files(checkpoint), round(seconds, 1))
    write_json(stage.path / RECORD_FILE, asdict(finished))
    begun_file(stage).unlink(missing_ok=True)
    return finished


def read_finished(path: Path) -> Finished | None:
    """The record in a run directory; None when there is none. Raises DataError when it is corrupt."""
    return _record(path / RECORD_FILE, _finished)


def read_begun(stage: Stage) -> Basis | None:
    """What a stage that is under way is made from; None when there is no record of it. Raises DataError."""
    return _record(begun_file(stage), _basis)


def _finished(raw: Any) -> Finished:
    found = Finished(_basis(raw["basis"]), raw["checkpoint"], raw["files"], float(raw["seconds"]))
    if not isinstance(found.checkpoint, str) or not isinstance(found.files, dict):
        raise TypeError("checkpoint is text and files a mapping")
    return found


def _basis(raw: Any) -> Basis:
    found = Basis(raw["command"], raw["config"], raw["inputs"])
    if not isinstance(found.config, dict) or not isinstance(found.inputs, dict):
        raise TypeError("config and inputs are mappings")
    return found


def _record(file: Path, make: Callable[[Any], T]) -> T | None:
    if not os.path.lexists(file):
        return None
    try:
        return make(read_json(file))
    except (DataError, TypeError, ValueError, KeyError, OverflowError) as error:
        why = str(error).removeprefix(f"{file}: ") if isinstance(error, DataError) else repr(error)
        raise DataError(
            f"{file}: is not the record of a stage ({why}). Delete it to take the run as it is, or move "
            f"{file.parent if file.name == RECORD_FILE else file} away to rerun the stage"
        ) from None


def aside(path: Path) -> Path:
    """The first free PATH.old-N."""
    number = 1
    while (target := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return target


def set_aside(path: Path) -> Path:
    """Rename a run directory that nobody uses to the first free PATH.old-N. Returns the new path.

    Raises ConfigError naming the process that uses it, DiskError.
    """
    lock = take_lock(path)
    try:
        target = aside(path)
        path.rename(target)
    except OSError as error:
        raise DiskError(f"{path}: cannot be renamed: {error.strerror}") from error
    finally:
        os.close(lock)
    return target
