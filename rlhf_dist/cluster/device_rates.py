"""How fast this machine is, for the forecast of a run: measured in a quarter of a second, or from a GPU's data sheet.

Three things are timed: a matrix product of the model's own sizes, a sum, and a piece of plain Python. The last stands
for what schedulers, calls and small operations take, which is most of a small model's decoding: how many times its
time they take was fitted to runs of models with 3 and 25 million parameters, in float32 and bfloat16, on one CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from rlhf_dist.planning.forecast import Rates

TOKENS = 1024
ELEMENTS = 2**22
REACHED = 0.75
"""Share of a lone product's rate that training reached."""
SECONDS = 0.08
"""Each measurement goes on for so long; the best of its rounds counts."""
DECODE, SEQUENCE, REQUEST, STEP, PUSH = 26.0, 0.57, 5.7, 1700.0, 430.0
"""Times the piece of Python: a decoding step of vLLM, a sequence in it, a request from its submission to its result, an
update and a push, each besides its products and bytes."""
BLOCK = 128
"""Tokens of a block of vLLM's cache on a CPU."""


@dataclass(frozen=True, slots=True)
class OfType:
    """What depends on the weights' type."""

    layer: float
    """Times the piece of Python: one layer in a decoding step."""
    segment: float
    """The same of one sequence in a layer of a learner's pass."""
    kept: float
    """See `Rates.kept`: in bfloat16 norms and others go to float32 and back, which `REACHED` does not have in."""


TYPES: Mapping[str, OfType] = MappingProxyType(
    {"float32": OfType(1.35, 0.36, float("inf")), "bfloat16": OfType(8.7, 1.07, 5e9)}
)


def cpu_rates(hidden: int, intermediate: int, dtype: str, threads: int) -> Rates:
    """Of `threads` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kind: torch.dtype = getattr(torch, dtype)
        rows, weights = torch.randn(TOKENS, hidden).to(kind), torch.randn(intermediate, hidden).to(kind)
        product_s = best(lambda: torch.nn.functional.linear(rows, weights))
        first, second = torch.randn(ELEMENTS), torch.randn(ELEMENTS)
        sum_s = best(lambda: first.add_(second, alpha=1e-3))
    finally:
        torch.set_num_threads(before)
    unit, own, products = best(plain_python), TYPES[dtype], 2.0 * TOKENS * hidden * intermediate / product_s
    return Rates(
        products=products,
        learning=REACHED * products,
        bandwidth=3 * 4 * ELEMENTS / sum_s,
        kept=own.kept,
        block=BLOCK,
        call_s=1e-4,
        segment_s=own.segment * unit,
        decode_layer_s=own.layer * unit,
        decode_s=DECODE * unit,
        sequence_s=SEQUENCE * unit,
        request_s=REQUEST * unit,
        step_s=STEP * unit,
        push_s=PUSH * unit,
        write=15e9,
        load=8e9,
    )


def plain_python() -> int:
    """A piece of the work that schedulers do: small objects made, found and counted."""
    found: dict[int, list[str]] = {}
    for number in range(1000):
        found.setdefault(number % 64, []).append(str(number))
    return sum(map(len, found.values()))


def best(work: Callable[[], object]) -> float:
    """Seconds of its fastest round."""
    work()
    found, ends = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < ends:
        begun = time.perf_counter()
        work()
        found = min(found, time.perf_counter() - begun)
    return found
