"""How fast this machine is, for the forecast of a run: measured in a fifth of a second, or from a GPU's data sheet."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from rlhf_dist.planning.forecast import Rates

TOKENS = 1024
ELEMENTS = 2**22
REACHED = 0.65
"""Share of a lone product's rate that training reached on the CPU this was fitted on, as are the constants below."""
SECONDS = 0.08
"""Each measurement goes on for so long; the best of its rounds counts."""


def cpu_rates(hidden: int, intermediate: int, dtype: str, threads: int) -> Rates:
    """Of `threads` CPU threads, by a product and a sum of the model's own sizes; what a call costs is a constant."""
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
    products = 2.0 * TOKENS * hidden * intermediate / product_s
    return Rates(
        products=products,
        learning=REACHED * products,
        bandwidth=3 * 4 * ELEMENTS / sum_s,
        call_s=0.5e-3,
        decode_layer_s=0.25e-3,
        decode_s=3e-3,
        sequence_s=65e-6,
        write=15e9,
        load=8e9,
    )


def best(work: Callable[[], object]) -> float:
    """Seconds of its fastest round."""
    work()
    found, ends = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < ends:
        begun = time.perf_counter()
        work()
        found = min(found, time.perf_counter() - begun)
    return found
