"""What the commands that take a config have in common: their arguments, loading with checks, the dry run."""

from __future__ import annotations

import argparse
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from rlhf_dist.errors import InputError

if TYPE_CHECKING:
    from rlhf_dist.config.schema import Config
    from rlhf_dist.planning.placement import Machine

Command = Literal["train", "sft", "reward", "prefer", "eval"]

NOT_YET_CHECKED = {
    "train": "that the models load, that reward functions and servers answer, what the data files hold",
    "sft": "that the model loads, what the data files hold",
    "reward": "that the model loads, what the data files hold",
    "prefer": "that the models load, what the data files hold",
    "eval": "that the models load, that reward functions and servers answer, what the data files hold",
}
"""Command -> what a dry run leaves to the start."""


SILENT_S = 2.0
"""A command that loads libraries for longer says so."""
PAGES = {
    "train": "docs/configuration.md",
    "sft": "docs/configuration.md",
    "reward": "docs/configuration.md, docs/preferences.md, docs/reward-models.md",
    "prefer": "docs/configuration.md, docs/preferences.md, docs/offline.md",
    "pipeline": "docs/configuration.md, docs/pipeline.md",
    "eval": "docs/configuration.md",
}
"""Command with a dry run -> the pages that explain its keys."""


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is an `InputError` as any other wrong input."""

    closing = ""
    """The last line of the help; argparse's own epilog may be broken within `--dry-run`."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}\n{self.format_usage().strip()}")

    def format_help(self) -> str:
        """The help as argparse makes it, with the closing line."""
        return super().format_help() + (f"\n{self.closing}\n" if self.closing else "")


class Once(argparse.Action):
    """An option with a value that is rejected when it is given twice; argparse's own takes the last."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        """See `argparse.Action`."""
        given: set[str] = vars(namespace).setdefault("given", set())
        if self.dest in given:
            raise argparse.ArgumentError(self, "it is given twice; give it once")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def config_parser(name: str, description: str) -> Parser:
    """`rlhf-dist NAME CONFIG.yaml [key=value ...]`, options in any place."""
    usage = f"rlhf-dist {name} CONFIG.yaml [key=value ...] [options]"
    parser = Parser(prog=f"rlhf-dist {name}", usage=usage, description=description, allow_abbrev=False)
    if name in PAGES:
        parser.closing = f"Keys: {PAGES[name]}; rlhf-dist {name} CONFIG.yaml --dry-run shows them resolved"
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml, key=value", help="config, then keys to set over it")
    return parser


def add_dry_run(parser: Parser) -> None:
    """The `--dry-run` option."""
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan, start nothing")


def add_resume(parser: Parser) -> None:
    """The options `--resume` and `--resume-from`."""
    parser.add_argument("--resume", action="store_true", help="continue from the run directory's newest checkpoint")
    parser.add_argument(
        "--resume-from",
        type=_step,
        metavar="step-N",
        help="continue from this checkpoint; later ones are kept under another name and are not used any more",
    )


def resumes(args: argparse.Namespace) -> bool:
    """Whether one of them was given."""
    return args.resume or args.resume_from is not None


def _step(text: str) -> int:
    found = re.fullmatch(r"(?:step-)?([0-9]{1,9})", text, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a checkpoint's name, as in step-100")
    return int(found[1])


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Options and words in any order."""
    return parser.parse_intermixed_args(list(argv))


@contextmanager
def loading() -> Iterator[None]:
    """Around a command's large imports, which take seconds, and many where the files are not in memory yet."""
    from rlhf_dist.cluster.importing import importing

    line = "loading torch, Ray and other libraries ..."
    told = threading.Timer(SILENT_S, print, [line], {"file": sys.stderr, "flush": True})
    told.daemon = True
    told.start()
    try:
        with importing():
            yield
    finally:
        told.cancel()


def is_override(word: str) -> bool:
    """Whether `word` is a key=value where a config file should be."""
    from rlhf_dist.config.paths import is_missing, lookup_problem

    return "=" in word and (is_missing(word) or bool(lookup_problem(word)))


def load_checked(words: Sequence[str], name: str, command: Command, files: bool = True) -> Config:
    """The config that `words` (file, overrides) give, after all checks, with `files` also of those that it reads.

    Raises `InputError`.
    """
    from rlhf_dist.config.checks import check
    from rlhf_dist.config.load import load

    if not words or is_override(words[0]):
        shipped = sorted(str(path) for path in Path("configs").glob("*.yaml"))
        folders = sorted({str(path.parent) for path in Path("configs").glob("*/*.yaml")})
        there = f"; there is {', '.join(shipped)}" if shipped else ""
        there += f", and more in {', '.join(folders)}" if shipped and folders else ""
        raise InputError(f"{name} needs a config file first: rlhf-dist {name} CONFIG.yaml [key=value ...]{there}")
    config = load(Path(words[0]), words[1:])
    check(config, command, files)
    return config


def plan_lines(config: Config, machine: Machine, command: Command) -> list[str]:
    """The plan of `command` on `machine`, for a reader. Raises `ResourceError` where it does not fit."""
    from rlhf_dist.planning.placement import place
    from rlhf_dist.planning.plan_lines import describe

    machine_line = f"machine: {machine.cpus} CPUs, {machine.gpus} GPUs"
    return [machine_line, *describe(place(config, machine, command), config, command)]


def print_dry_run(config: Config, command: Command) -> int:
    """Print the resolved config as YAML and the plan on this machine as comments below it; returns the exit code.

    Raises `ResourceError` where it does not fit this machine, after the config.
    """
    from rlhf_dist.config.load import to_yaml
    from rlhf_dist.config.reward_words import reward_lines
    from rlhf_dist.planning.placement import local_machine

    print(to_yaml(config), end="")
    lines = plan_lines(config, local_machine(), command)
    lines += reward_lines(config) if command in ("train", "eval") else []
    lines.append(f"checked only at the start: {NOT_YET_CHECKED[command]}")
    print("\n".join(f"# {line}" for line in lines))
    return 0
