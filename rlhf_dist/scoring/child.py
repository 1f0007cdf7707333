"""A process that runs what is not ours, a function, a pattern or math-verify, and that can be ended when it hangs.

A thread could not be: Python cannot stop one, and one that holds the interpreter's lock (`re` does) stops all others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from rlhf_dist.errors import SIGNALLED, ConfigError
from rlhf_dist.scoring import child_main
from rlhf_dist.scoring.sandbox import Sandbox

ANSWER_BYTES = 16 << 20
"""What comes from the process is not ours: more is no answer."""
START_LIMIT_S = 60.0
"""For the system to start a process, which takes milliseconds."""
END_LIMIT_S = 5.0
"""For a killed process to be gone."""


class ChildLate(Exception):
    """The process did not answer in time and was killed."""


class ChildEnded(Exception):
    """The process ended by itself; the message says how, as in `signal SIGSEGV`."""


class Child:
    """One process with one task. Not for several threads at once."""

    def __init__(self, task: dict[str, str], sandbox: Sandbox | None = None) -> None:
        """`task`: {"function": "module:name"}, {"pattern": text}, {"verifier": library} or
        {"library": setting}. The process starts here.

        `sandbox`: what it is enclosed in, which is for this process alone. Raises OSError, and ConfigError as it does.
        """
        self._sandbox = sandbox
        self._channel, theirs = socket.socketpair()
        self._started = threading.Event()
        self._failed: OSError | ConfigError | None = None
        # The system ends the process with the thread that started it, so this thread lives as long as the process.
        self._keeper = threading.Thread(target=self._keep, args=(theirs,), daemon=True, name="keeper of a child")
        self._keeper.start()
        if not self._started.wait(START_LIMIT_S):
            self._failed = TimeoutError(f"{sys.executable} did not start in {START_LIMIT_S:g} s")
        if self._failed is not None:
            self._channel.close()
            raise self._failed
        # In a sandbox it has another parent, and process ids of its own.
        about = {"parent": os.getpid()} if sandbox is None else {"limits": sandbox.limits()}
        child_main.send(self._channel, {**task, "path": sys.path, **about})

    def ask(self, request: Any, deadline: float) -> Any:
        """Its answer. Raises ChildLate after `deadline` (monotonic), ChildEnded; either way the process is gone."""
        return self._within(deadline, request)

    def first_word(self, deadline: float) -> Any:
        """What it says before any request. Raises as `ask`."""
        return self._within(deadline)

    def close(self) -> None:
        """End the process and everything that it started. May be called twice."""
        self._channel.close()
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._keeper.join(END_LIMIT_S)

    def _within(self, deadline: float, *requests: Any) -> Any:
        try:
            for request in requests:
                self._wait_until(deadline)
                child_main.send(self._channel, request)
            answer = child_main.receive(self._channel, lambda: self._wait_until(deadline), ANSWER_BYTES)
        except TimeoutError:
            self.close()
            raise ChildLate from None
        except (ValueError, RecursionError):
            self.close()
            raise ChildEnded("it wrote something else than an answer to the run, and was killed") from None
        except OSError:  # a broken pipe
            answer = None
        if answer is None:
            self._keeper.join(END_LIMIT_S)
            code = self._process.poll()
            self.close()
            raise ChildEnded(self._how(code))
        return answer

    def _wait_until(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._channel.settimeout(left)

    def _keep(self, theirs: socket.socket) -> None:
        command = [sys.executable, "-P", child_main.__file__, str(theirs.fileno())]
        try:
            # A session of its own: Ctrl-C is for us, and what the user's code starts ends with it.
            if self._sandbox is not None:
                self._process = self._sandbox.start(command, theirs.fileno())
            else:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), start_new_session=True
                )
        except (OSError, ConfigError) as error:
            self._failed = error
        finally:
            theirs.close()
            self._started.set()
        if self._failed is None:
            self._process.wait()

    def _how(self, code: int | None) -> str:
        if self._sandbox is None:
            return _how(code)
        # Bubblewrap says by which signal the process inside has ended as a shell does.
        return self._sandbox.broken or _how(SIGNALLED - code if code is not None and code > SIGNALLED else code)


def _how(code: int | None) -> str:
    if code is None:
        return "it closed its end and still runs"
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"
