"""What is counted as read: copies out of the tensors, also from views, and no dry run on the meta device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_dist.weights.tally import ReadTally

MEMORY = torch.arange(40, dtype=torch.float32)
"""As one buffer: `a` is its first 12 numbers, `b` the next 20; 8 belong to neither."""


def given() -> list[tuple[str, Tensor]]:
    return [("a", MEMORY[:12].view(4, 3)), ("b", MEMORY[12:32].view(10, 2)), ("none", torch.empty(0, 5))]


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda a, b: torch.empty(4, 3).copy_(a), {"a": 12}),
        (lambda a, b: torch.empty(2, 3).copy_(a.narrow(0, 1, 2)), {"a": 6}),
        (lambda a, b: torch.empty(3, 4)[:2].copy_(a.t()[:2]), {"a": 8}),
        (lambda a, b: torch.cat([a.flatten(), b[5:].flatten()]), {"a": 12, "b": 10}),
        (lambda a, b: (a.view(12), b.t()[1:], a.detach()), {}),
        (lambda a, b: a.t().reshape(12), {"a": 12}),
        (lambda a, b: torch.empty(4, 3, device="meta").copy_(a), {}),
        (lambda a, b: torch.empty(8).copy_(MEMORY[32:]), {}),
        (lambda a, b: [torch.empty(10, 2).copy_(b) for _ in range(2)], {"b": 20}),
        (lambda a, b: a[0, 0].item(), {"a": 1}),
    ],
    ids=["copy", "part", "transposed", "cat", "views", "reshape", "dry run", "elsewhere", "twice", "number"],
)
def test_elements_that_were_read(use: Callable[[Tensor, Tensor], object], expected: dict[str, int]) -> None:
    (_, a), (_, b), _ = tensors = given()
    with ReadTally() as tally:
        tally.watch(tensors)
        use(a, b)
    assert tally.counts() == {"a": 0, "b": 0, "none": 0} | expected


def test_memory_that_is_free_again_counts_for_nobody() -> None:
    memory = bytearray(32)  # outlives the tensors, so that the second one has the first one's address for sure
    with ReadTally() as tally:
        first = torch.frombuffer(memory, dtype=torch.float32)
        tally.watch([("first", first)])
        torch.empty(4).copy_(first[:4])
        del first
        second = torch.frombuffer(memory, dtype=torch.float32)
        torch.empty(8).copy_(second)
        tally.watch([("second", second)])
        torch.empty(8).copy_(second)
    assert tally.counts() == {"first": 4, "second": 8}
