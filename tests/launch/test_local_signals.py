"""launch/local.sh passes signals on to the run, seen through stand-ins for the set-up and the command."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 60

WAITS = f"""#!{sys.executable}
import pathlib, signal, sys, time
def end(number, _):
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, end)
pathlib.Path("waits").touch()
time.sleep({LIMIT_S})
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_local_passes_signals_on_to_the_run(tmp_path: Path, number: signal.Signals) -> None:
    """The script alone is told, as by a service manager; from a terminal Ctrl-C reaches both."""
    for path, text in (("launch/setup.sh", "#!/bin/sh\n"), (".venv/bin/rlhf-dist", WAITS)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    shutil.copy(ROOT / "launch" / "local.sh", tmp_path / "launch")
    process = subprocess.Popen(
        [str(tmp_path / "launch" / "local.sh")],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Started in the background from a script, the tests themselves may ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "waits").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + number
    assert "done" not in out
