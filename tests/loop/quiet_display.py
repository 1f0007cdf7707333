"""A display that nobody looks at."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


class Quiet:
    """A display that nobody looks at."""

    remembered: Mapping[str, float] = MappingProxyType({})

    def stage(self, message: str) -> None: ...

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None: ...

    def eval(self, step: int, results: Mapping[str, float]) -> None: ...

    def remember(self, results: Mapping[str, float]) -> None:
        self.remembered = dict(results)

    def warn(self, message: str) -> None: ...

    def note(self, message: str) -> None: ...

    def close(self, stopped: bool = False) -> None: ...
