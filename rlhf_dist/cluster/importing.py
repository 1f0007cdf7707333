"""Large imports, a seventh faster."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Around what imports transformers, vLLM or DeepSpeed; also a decorator.

    They make hundreds of thousands of objects that stay, and Python's garbage collector would look through them again
    and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
