"""`python -m rlhf_dist` is the same as `rlhf-dist`."""

from __future__ import annotations

import os
import signal
import sys


def run() -> int:
    """The command. A Ctrl-C that comes before `main` handles it ends the process without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))
    from rlhf_dist.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
