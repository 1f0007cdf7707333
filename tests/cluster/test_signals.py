"""Signals that end a command, on real processes that do nothing but wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COMMAND = """
import signal, sys, time
from rlhf_dist.cli import main, sft
from rlhf_dist.cluster import signals

def run(words):
    try:
        for word in words:
            if word == "ray":  # what ray.init does
                with signals.kept():
                    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
                    print("starts", flush=True)
                    time.sleep({inside})
        print("works", flush=True)
        time.sleep(60)
    finally:
        print("closes", flush=True)
        time.sleep({closing})
        print("closed", flush=True)

sft.run = run
sys.exit(main.main(["sft", *sys.argv[1:]]))
"""


def start(*words: str, inside: float = 0, closing: float = 0, ignores: int | None = None) -> subprocess.Popen[str]:
    def calm() -> None:
        # Started in the background from a script, the tests themselves may ignore SIGINT.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if ignores is not None:
            signal.signal(ignores, signal.SIG_IGN)

    return subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(inside=inside, closing=closing), *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=calm,
    )


def says(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == line + "\n"


@pytest.mark.parametrize(
    ("number", "code", "how"),
    [
        (signal.SIGINT, 130, "stopped from the keyboard; "),
        (signal.SIGTERM, 143, "stopped by SIGTERM; "),
        (signal.SIGHUP, 129, "stopped by SIGHUP; "),
    ],
)
@pytest.mark.parametrize("started", ["before", "while"])
def test_one_signal_ends_in_order_with_one_sentence_and_the_way_on(
    number: signal.Signals, code: int, how: str, started: str
) -> None:
    """Also where it comes while Ray starts, and after Ray has put handlers of its own."""
    process = start("ray", inside=60 if started == "while" else 0)
    says(process, "starts")
    if started == "before":
        says(process, "works")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert out == "closes\nclosed\n"
    assert process.returncode == code
    assert err.startswith(f"rlhf-dist: {how}") and "with `rlhf-dist sft ray --resume`" in err
    assert len(err.splitlines()) == 1


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    """`timeout` and a terminal send it to the process and to its group."""
    process = start(closing=0.3)
    says(process, "works")
    process.send_signal(signal.SIGTERM)
    says(process, "closes")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == ("closed\n", 143) and len(err.splitlines()) == 1


def test_a_second_signal_ends_at_once() -> None:
    process = start(closing=60)
    says(process, "works")
    process.send_signal(signal.SIGTERM)
    says(process, "closes")
    time.sleep(1.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == ("", 130)
    assert err == "rlhf-dist: a second signal: ended at once, without closing what was open\n"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_is_ignored_stays_ignored(number: signal.Signals) -> None:
    """`nohup`; and a command in the background of a script, which Ctrl-C does not reach."""
    process = start(ignores=number)
    says(process, "works")
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "closes\nclosed\n" and process.returncode == 143


def test_outside_of_a_command_nothing_is_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_dist.cli import main, plan

    def run(_: object) -> int:
        seen.append(signal.getsignal(signal.SIGTERM))
        return 0

    seen: list[Callable[..., object] | int | signal.Handlers | None] = []
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(plan, "run", run)
    assert main.main(["plan"]) == 0
    assert seen != [before] and signal.getsignal(signal.SIGTERM) == before


EARLY = """
import os, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "rlhf_dist.cli.main":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
from rlhf_dist.__main__ import run
sys.exit(run())
"""
LOST = """
import os, signal, sys
from rlhf_dist.cli import main

def imported(name):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        pass
    import rlhf_dist.cli.plan as plan
    plan.run = lambda words: print("goes on") or 0
    return plan

signal.signal(signal.SIGINT, signal.default_int_handler)
main.importlib.import_module = imported
sys.exit(main.main(["plan"]))
"""


@pytest.mark.parametrize(("code", "told"), [(EARLY, ""), (LOST, "rlhf-dist: stopped from the keyboard\n")])
def test_an_interrupt_among_imports_ends_the_command(code: str, told: str) -> None:
    """Before the command handles signals, and where Python drops the exception, as in a callback of an import."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", told)


STOPPED = """
import atexit, os, signal, sys, tempfile
from rlhf_dist.cli import main
atexit.register(print, "a library waits")
kept = tempfile.TemporaryDirectory(dir=sys.argv[1])
def dispatch(words):
    os.kill(os.getpid(), signal.SIGTERM)
main._dispatch = dispatch
sys.exit(main.main())
"""


def test_a_stopped_command_does_not_wait_for_what_libraries_do_at_the_end(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (143, "") and done.stderr == "rlhf-dist: stopped by SIGTERM\n"
    assert list(tmp_path.iterdir()) == [], "temporary folders are removed"
