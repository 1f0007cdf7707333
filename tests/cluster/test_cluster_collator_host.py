"""The collator's process starts without torch."""

from __future__ import annotations

import subprocess
import sys


def test_the_collator_loads_no_torch() -> None:
    """It starts beside three processes that do, on the same cores."""
    words = "import sys, rlhf_dist.cluster.collator_host; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"
