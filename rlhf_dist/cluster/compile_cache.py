"""Where compiled kernels are kept between runs.

PyTorch keeps them in the folder for temporary files, which for a run's workers goes with the run. To compile them again
takes longer than starting an engine. They are code that is loaded: nobody else may be able to write there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""PyTorch's own name for the folder."""


def compile_cache(environment: Mapping[str, str]) -> Path | None:
    """The folder for compiled kernels, made if it is not there.

    The one that the environment names, else one in the user's cache. None where that cannot be used: kernels are then
    compiled anew in every run.
    """
    if environment.get(VARIABLE):
        return Path(environment[VARIABLE])
    home = environment.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(home):  # a user without a home, as in a container: there is none to expand `~` to
        return None
    folder = Path(home) / "rlhf_dist" / "torchinductor"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if private and os.access(folder, os.W_OK) else None
