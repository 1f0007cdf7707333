"""The stages of a pipeline: each one's whole config, and what is wrong with any of them, before the first starts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rlhf_dist.config.checks import problems
from rlhf_dist.config.load import load
from rlhf_dist.config.schema import Config, PipelineConfig
from rlhf_dist.errors import ConfigError, RlhfError

StageCommand = Literal["sft", "reward", "prefer", "train"]

NAME = r"[A-Za-z][A-Za-z0-9_-]*"
REFERENCE = re.compile(r"(?<!\$)\{(" + NAME + r")\}")
"""`{NAME}`; `${...}` is an interpolation, `{2}` and `{a: b}` are a pattern's and YAML's own."""
OF_ONE_STAGE = re.compile("(" + NAME + "):([^=]*=.*)", re.DOTALL)
"""`NAME:key=value` on the command line; no key has a colon."""
RESERVED = ("name", "output", "pipeline")
"""Keys and sections that are the pipeline's own, for all its stages."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage, ready to be run."""

    name: str
    command: StageCommand
    config: Config
    """What it runs with; its run directory is `config.output/config.name`."""
    written: Config
    """The same with <NAME> for the run directory of the stage NAME: it does not change when the whole is moved."""
    wired: Mapping[str, tuple[str, ...]]
    """Key -> the earlier stages that its value names, as in {"model.path": ("sft",)}."""

    @property
    def path(self) -> Path:
        """Its run directory."""
        return Path(self.config.output) / self.config.name

    @property
    def needs(self) -> tuple[str, ...]:
        """The earlier stages that it reads, each once, by name."""
        return tuple(sorted({name for names in self.wired.values() for name in names}))


def load_stages(path: Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of the config file `path`, in order, every one of them checked.

    Layers of a stage, later wins: the file's own (with its includes), the stage's `set`, the command line's
    `overrides`, those of them that are for this stage alone (`NAME:key=value`), those of `set` that name an earlier
    stage. Raises one ConfigError with the problems of all stages.
    """
    own = [found for found in map(OF_ONE_STAGE.fullmatch, overrides) if found]
    overrides = [entry for entry in overrides if not OF_ONE_STAGE.fullmatch(entry)]
    base = load(path, overrides)
    found = [
        *pipeline_problems(base),
        *_misspelt_stages(path, base, overrides),
        *(problem for word in own for problem in _word_problems(word[1], word[2], base)),
    ]
    if found:
        raise ConfigError(_joined(found))
    stages: list[Stage] = []
    of: dict[str, list[str]] = {}
    for name in base.pipeline.stages:
        try:
            stages.append(_load_stage(path, base, name, [*overrides, *(word[2] for word in own if word[1] == name)]))
        except ConfigError as error:
            of.setdefault(str(error), []).append(name)
    for stage in stages:
        for problem in problems(stage.config, stage.command):
            of.setdefault(problem, []).append(stage.name)
    if of:
        lines = [f"stage{'s' * (len(who) > 1)} {', '.join(who)}: {text}" for text, who in of.items()]
        some = [who[0] for who in of.values() if len(who) < len(stages)]
        asked = overrides and some and len(stages) == len(base.pipeline.stages)
        raise ConfigError(_joined(lines) + (_for_one_stage(path, some[0]) if asked else ""))
    return stages


def _for_one_stage(path: Path, name: str) -> str:
    return (
        f"\nA key for stage {name} alone: {name}:KEY=VALUE on the command line, or KEY=VALUE in "
        f"pipeline.stages.{name}.set of {path}"
    )


def _misspelt_stages(path: Path, base: Config, overrides: Sequence[str]) -> Iterator[str]:
    """A stage that only the command line names, and so much like one of the file that it is taken for a slip."""
    if not any(entry.startswith("pipeline") for entry in overrides):
        return
    in_file = load(path, [entry for entry in overrides if not entry.startswith("pipeline")]).pipeline.stages
    for name in base.pipeline.stages:
        close = [] if name in in_file else difflib.get_close_matches(name, in_file, n=1)
        if close:
            yield (
                f"pipeline.stages.{name}: {path} has no stage {name!r}; did you mean {close[0]}? "
                "A new stage of such a name has to stand in the file"
            )


def _word_problems(name: str, entry: str, config: Config) -> Iterator[str]:
    """What is wrong with `name:entry` on the command line, before the stage is loaded with it."""
    stages, key = config.pipeline.stages, entry.partition("=")[0]
    if name not in stages:
        close = difflib.get_close_matches(name, stages, n=1)
        hint = f"did you mean {close[0]}:{entry}?" if close else f"the stages are: {', '.join(stages)}"
        yield f"{name}:{entry}: there is no stage {name!r}; {hint}"
    elif key.split(".")[0] in RESERVED:
        yield f"{name}:{entry}: {key} is set for the whole pipeline: write {entry}"


def pipeline_problems(config: Config) -> Iterator[str]:
    """What is wrong with the section `pipeline` itself: no stages, names, what `set` may not set, {NAME}."""
    stages = config.pipeline.stages
    if not stages:
        yield (
            "pipeline.stages is empty; name at least one, as in pipeline: {stages: {sft: {command: sft}, "
            'grpo: {command: train, set: ["model.path={sft}"]}}}'
        )
    earlier: list[str] = []
    for name, stage in stages.items():
        key = f"pipeline.stages.{name}"
        if not re.fullmatch(NAME, name):
            yield f"{key}: the name {name!r} must begin with a letter and consist of letters, digits, '_' and '-'"
        for entry in stage.set:
            target = entry.partition("=")[0]
            if target.split(".")[0] in RESERVED:
                yield f"{key}.set has {entry!r}; {target} is set for the whole pipeline: take it out"
            for other in REFERENCE.findall(entry):
                yield from _reference(key, entry, other, name, earlier, config)
        earlier.append(name)


def _reference(key: str, entry: str, other: str, name: str, earlier: Sequence[str], config: Config) -> Iterator[str]:
    stages = config.pipeline.stages
    where = f"{key}.set has {entry!r}"
    if other == name:
        yield f"{where}: a stage cannot take its own output; name an earlier stage"
    elif other not in stages:
        close = difflib.get_close_matches(other, stages, n=1)
        known = ", ".join(earlier) or "none"
        hint = f"did you mean {{{close[0]}}}?" if close else f"the earlier stages are: {known}"
        yield f"{where}: there is no stage {other!r}; {hint}"
    elif other not in earlier:
        yield f"{where}: the stage {other!r} comes later; put it before {name!r}"
    else:
        yield from _kind(where, entry.partition("=")[0], other, stages[other].command)


def _kind(where: str, target: str, other: str, command: StageCommand) -> Iterator[str]:
    """A policy cannot start from a reward model, nor can a language model score."""
    if command == "reward" and target in ("model.path", "reference.path", "prefer.reference"):
        yield f"{where}: the stage {other!r} makes a reward model; {target} needs the output of sft, prefer or train"
    if command != "reward" and re.fullmatch(r"scoring\.rewards\.[\w-]+\.path", target):
        yield f"{where}: the stage {other!r} runs {command}; {target} needs the output of a stage with command reward"


def held_back(stages: Sequence[Stage], overrides: Sequence[str]) -> list[str]:
    """A sentence for each override that some stages do not take, because their `set` wires that key."""
    lines = []
    for override in overrides:
        alone = OF_ONE_STAGE.fullmatch(override)
        key = (alone[2] if alone else override).partition("=")[0]
        keeps = [
            f"{stage.name} ({target} from {', '.join(sources)})"
            for stage in stages
            for target, sources in stage.wired.items()
            if (not alone or alone[1] == stage.name) and (target == key or target.startswith(key + "."))
        ]
        if keeps:
            lines.append(f"{override} does not reach {', '.join(keeps)}: what comes from an earlier stage stays so")
    return lines


@contextmanager
def named(stage: Stage) -> Iterator[None]:
    """Put the stage's name before the message of an error."""
    try:
        yield
    except RlhfError as error:
        raise type(error)(f"stage {stage.name}: {error}") from error


def _load_stage(path: Path, base: Config, name: str, overrides: Sequence[str]) -> Stage:
    given = base.pipeline.stages[name]
    plain = [entry for entry in given.set if not REFERENCE.search(entry)]
    wired = [entry for entry in given.set if REFERENCE.search(entry)]
    # The pipeline itself is no part of a stage: adding a stage must not make another run of the others.
    run = Path(base.output) / base.name
    own = [*plain, *overrides, f"name={base.name}/{name}"]
    config = load(path, own + [REFERENCE.sub(lambda found: str(run / found[1]), entry) for entry in wired])
    written = load(path, own + [REFERENCE.sub(r"<\1>", entry) for entry in wired])
    return Stage(
        name=name,
        command=given.command,
        config=replace(config, pipeline=PipelineConfig()),
        written=replace(written, pipeline=PipelineConfig()),
        wired={entry.partition("=")[0]: tuple(REFERENCE.findall(entry)) for entry in wired},
    )


def _joined(found: Sequence[str]) -> str:
    if len(found) == 1:
        return found[0]
    return "\n  - ".join([f"the pipeline has {len(found)} problems:", *found])
