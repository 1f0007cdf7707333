"""`rlhf-dist COMMAND ...`: finds the command, turns errors into one message and an exit code.

0 done, 1 a run failed, 2 bad input, 130 stopped from the keyboard, 143 by SIGTERM, 129 by SIGHUP. Nothing heavy is
imported before a config has parsed.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from rlhf_dist import __version__
from rlhf_dist.cluster import signals
from rlhf_dist.cluster.processes import lost_ray
from rlhf_dist.errors import (
    SIGNALLED,
    ActorLost,
    ActorTimeout,
    DiskError,
    InputError,
    RayLost,
    RlhfError,
    WeightSyncError,
)
from rlhf_dist.loop.restarts import SUPERVISED, without_resume
from rlhf_dist.telemetry.streams import print_any_text

COMMANDS = {
    "train": ("train", "reinforcement learning: generate, score, update, push the weights, repeat"),
    "sft": ("sft", "supervised start: train on demonstrations or on plain text"),
    "reward": ("reward", "train a reward model on human judgements"),
    "prefer": ("prefer", "train a policy on human judgements themselves: DPO, IPO, KTO, ORPO, SimPO"),
    "pipeline": ("pipeline", "the whole of RLHF: stages in order, each skipped, resumed or run as it needs"),
    "eval": ("evaluate", "greedy accuracy and pass@k of a model on held-out prompts"),
    "compare": ("compare", "policies head to head on held-out prompts: win rates, Elo, examples"),
    "serve-reward": ("serve_reward", "serve the config's rewards over HTTP"),
    "submit": ("submit", "run train, sft, reward, prefer, pipeline or eval as a job on a Ray cluster"),
    "plan": ("plan", "show who would get which CPUs and GPUs, and the arithmetic of the batches"),
    "ledger": ("show_ledger", "what became of every group and token of a run"),
    "report": ("write_report", "write the HTML report of a run or a pipeline again"),
    "replay": ("replay", "compute the losses of a step whose numbers went wrong again, row by row"),
    "dashboard": ("dashboard", "save a wandb workspace for a run's project"),
    "label": ("label", "a page on which people judge responses; what they said as preference data"),
    "bench": ("bench", "run one of the benchmarks of a checkout"),
}
"""Command -> its module in this folder, and what it does."""
FAULTS = (ActorLost, ActorTimeout, DiskError, RayLost, WeightSyncError)
"""What may not come again, so that the same command goes on; other errors name their own way out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; an unexpected exception keeps its traceback."""
    words = [_utf8(word) for word in (sys.argv[1:] if argv is None else argv)]
    print_any_text(sys.stdout, sys.stderr)
    with signals.ending_in_order():
        code = _run(words)
        if argv is None and (code > SIGNALLED or lost_ray() is not None):
            _end_at_once(code)
    return code


def _end_at_once(code: int) -> NoReturn:
    """End without the interpreter's own end, which crashes in Ray's library when Ray's processes have died.

    And what libraries do there (wandb waits for a process of its own) takes seconds, for which somebody may be waiting.
    """
    for thing in gc.get_objects():
        if type(thing) is TemporaryDirectory:  # removed by the interpreter's end otherwise
            thing.cleanup()
    with suppress(OSError):  # whoever read the output may have gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _run(words: list[str]) -> int:
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output (`| head`) has seen enough; without this the interpreter would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        how, code = signals.how_stopped()
        return _fail(how + _how_to_go_on(words), code)
    except InputError as error:
        return _fail(str(error), 2)
    except RlhfError as error:
        again = isinstance(error, FAULTS) and "--resume" not in str(error)
        return _fail(str(error) + (_how_to_go_on(words) if again else ""), 1)


def _utf8(word: str) -> str:
    """A word of the command line as UTF-8, whatever the locale: in C, Python hides its bytes in half characters."""
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        return word


def _dispatch(words: list[str]) -> int:
    first = words[0] if words else ""
    if first in ("-h", "--help"):
        print(_help())
        return 0
    if first == "--version":
        print(f"rlhf-dist {__version__}")
        return 0
    if not first:
        raise InputError(f"name a command\n\n{_help()}")
    if first not in COMMANDS:
        close = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"the commands are {', '.join(COMMANDS)}"
        raise InputError(f"`{first}` is no command; {hint}")
    module = importlib.import_module(f"rlhf_dist.cli.{COMMANDS[first][0]}")
    signals.require_none()
    return module.run(words[1:])


def _help() -> str:
    lines = [f"  {name:<14}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rlhf-dist COMMAND CONFIG.yaml [key=value ...]",
            "       rlhf-dist COMMAND --help | --version | --help",
            "",
            *lines,
            "",
            "key=value sets one key of the config over what the file says, as in loop.steps=20.",
        ]
    )


def _how_to_go_on(words: Sequence[str]) -> str:
    if SUPERVISED in os.environ:
        return ""
    if words and words[0] in ("train", "sft", "reward", "prefer"):
        plain = without_resume(words)
        if not _may_have_begun([word for word in plain[1:] if not word.startswith("--")]):
            return f"; nothing of the run was written yet: start it again with `{shlex.join(['rlhf-dist', *plain])}`"
        again = shlex.join(["rlhf-dist", *plain, "--resume"])
        return f"; go on from the newest checkpoint, or from the beginning if there is none yet, with `{again}`"
    if words[:1] == ["pipeline"]:
        again = shlex.join(["rlhf-dist", *words])
        return (
            "; finished stages are kept, and one under way goes on from its newest "
            f"checkpoint, if there is one yet, with `{again}`"
        )
    return ""


def _may_have_begun(words: Sequence[str]) -> bool:
    """Whether the run directory of the config in `words` (file, overrides) is there, or the config cannot be read."""
    from rlhf_dist.config.load import load

    try:
        config = load(Path(words[0]), words[1:])
    except (InputError, IndexError):
        return True
    return (Path(config.output) / config.name).is_dir()


def _fail(message: str, code: int) -> int:
    print(f"rlhf-dist: {message}", file=sys.stderr)
    return code
