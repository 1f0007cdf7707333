"""Counts what a loader really copies out of given tensors, whatever it reports."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class ReadTally(TorchDispatchMode):
    """While it is active, counts the elements that operations read from the tensors, views of them included.

    A view reads nothing, and neither does an operation with a tensor on the meta device, with which vLLM tries its
    loaders before it uses them. What counts is a copy into other memory: that of a parameter, or of a tensor made on
    the way.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """`tensors` lie in the CPU's memory, and do not overlap."""
        super().__init__()
        held = sorted((tensor.data_ptr(), name, tensor.numel(), tensor.nbytes) for name, tensor in tensors)
        self._sizes = {name: elements for _, name, elements, _ in held}
        filled = [entry for entry in held if entry[3]]
        self._starts = [start for start, *_ in filled]
        self._ends = [start + nbytes for start, _, _, nbytes in filled]
        self._names = [name for _, name, *_ in filled]
        self._read: Counter[str] = Counter()

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
        if tensor.device.type != "cpu" or not tensor.numel():
            return
        index = bisect_right(self._starts, tensor.data_ptr()) - 1
        if index >= 0 and tensor.data_ptr() < self._ends[index]:
            self._read[self._names[index]] += tensor.numel()


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
