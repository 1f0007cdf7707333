"""Counts what a loader really copies out of given tensors, whatever it reports."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Watched(NamedTuple):
    """Where a tensor lies."""

    start: int
    end: int
    name: str
    memory: StorageWeakRef


class ReadTally(TorchDispatchMode):
    """While it is active, counts the elements that operations read from watched tensors, views of them included.

    A view reads nothing, and neither does an operation with a tensor on the meta device, with which vLLM tries its
    loaders before it uses them. What counts is a copy into other memory: that of a parameter, or of a tensor made on
    the way.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[str, int] = {}
        self._watched: list[Watched] = []
        self._starts: list[int] = []
        self._read: Counter[str] = Counter()

    def watch(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """These too, from now on. They do not overlap; those whose memory is free again are forgotten."""
        found = [one for one in self._watched if not one.memory.expired()]
        for name, tensor in tensors:
            self._sizes[name] = tensor.numel()
            if tensor.nbytes:
                start = tensor.data_ptr()
                found.append(Watched(start, start + tensor.nbytes, name, StorageWeakRef(tensor.untyped_storage())))
        self._watched = sorted(found, key=lambda one: one.start)
        self._starts = [one.start for one in self._watched]

    def counts(self) -> dict[str, int]:
        """Name -> elements read, at most as many as the tensor has."""
        return {name: min(self._read[name], size) for name, size in self._sizes.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*tensors_in(args), *tensors_in((kwargs or {}).values())]
        if not is_view(func) and not any(tensor.is_meta for tensor in given):
            for tensor in given:
                self._note(tensor)
        return func(*args, **(kwargs or {}))

    def _note(self, tensor: Tensor) -> None:
        if not tensor.numel():
            return
        index = bisect_right(self._starts, tensor.data_ptr()) - 1
        if index < 0:
            return
        found = self._watched[index]
        # The address may be another tensor's by now.
        if tensor.data_ptr() < found.end and not found.memory.expired():
            self._read[found.name] += tensor.numel()


def is_view(func: Any) -> bool:
    """Whether an operation's result shares the memory of an argument that it does not write to."""
    results = func._schema.returns
    return any(result.alias_info is not None and not result.alias_info.is_write for result in results)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, those in lists included."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [part for part in value if isinstance(part, torch.Tensor)]
    return found
