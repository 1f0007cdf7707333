"""Whether this machine has bubblewrap, which rewards with `sandbox: true` need."""

from __future__ import annotations

import shutil

BWRAP = "bwrap"
MISSING = f"bubblewrap ({BWRAP}) is not installed here: install the package bubblewrap (apt-get, dnf, apk or pacman)"


def bubblewrap_problem() -> str:
    """That it is missing, and how to install it; empty: it is there."""
    return "" if shutil.which(BWRAP) else MISSING
