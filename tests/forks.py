"""Scripts in processes of their own, without an import of torch and transformers for each.

`python forks.py` imports what takes longest, once, and then forks a process for each script that it is told to run,
which imports the script and forks one more for each of its jobs.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

LIMIT_S = 500.0


class ForkServer:
    """The process that forks. It ends with this one, whose end closes its input."""

    def __init__(self) -> None:
        here = Path(__file__)
        self._process = subprocess.Popen(
            [sys.executable, str(here)],
            env=os.environ | {"PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here.parent}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: Path, folder: Path, jobs: Mapping[str, Sequence[object]]) -> None:
        """Run `script WORDS...` for each job, side by side; `jobs`: name -> words. Output goes to FOLDER/NAME.log."""
        to, answers = self._process.stdin, self._process.stdout
        assert to is not None and answers is not None
        words = {name: [*map(str, given)] for name, given in jobs.items()}
        print(json.dumps([str(script), str(folder), words]), file=to, flush=True)
        limit = threading.Timer(LIMIT_S, self._kill)
        limit.start()
        code = answers.readline().strip()
        limit.cancel()
        logs = [f"{name}: {log.read_text()[-3000:]}" for name in jobs if (log := folder / f"{name}.log").exists()]
        assert code == "0", "\n".join([f"{script}: {code or 'no answer'}", *logs])

    def _kill(self) -> None:
        server = psutil.Process(self._process.pid)
        for process in [*server.children(recursive=True), server]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def close(self) -> None:
        self._process.communicate(timeout=30)


def serve() -> None:
    """Each line of the input is a script with its jobs; the answer to it is an exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is no answer.
    importlib.import_module("rlhf_dist.learner.model_engine")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os._exit(guarded(partial(run_jobs, *json.loads(line))))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        print(code, file=answers, flush=True)


def run_jobs(script: str, folder: str, jobs: Mapping[str, Sequence[str]]) -> int:
    """The first exit code that is not 0, at once: other jobs may be waiting for the one that failed."""
    sys.path.insert(0, str(Path(script).parent))
    module = importlib.import_module(Path(script).stem)
    for name, words in jobs.items():
        if os.fork() == 0:
            sys.argv = [script, *words]
            log = os.open(Path(folder) / f"{name}.log", os.O_WRONLY | os.O_CREAT, 0o644)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            os._exit(guarded(module.main))
    for _ in jobs:
        code = os.waitstatus_to_exitcode(os.wait()[1])
        if code:
            return code
    return 0


def guarded(call: Callable[[], Any]) -> int:
    """What the call returned, as an exit code; 1 if it raised."""
    try:
        code = call() or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
