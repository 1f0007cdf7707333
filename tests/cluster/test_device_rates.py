"""Rates of this machine's CPU: what is made of the times that are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_dist.cluster import device_rates
from rlhf_dist.cluster.device_rates import REACHED, best, cpu_rates, plain_python


def test_a_slower_interpreter_makes_calls_slower_and_products_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(python_s: float, product_s: float) -> Any:
        def timed(work: Callable[[], Any]) -> float:
            return python_s if work is plain_python else product_s

        monkeypatch.setattr(device_rates, "best", timed)
        return cpu_rates(64, 128, "float32", 1)

    usual, slow = found(1e-4, 1e-3), found(2e-4, 1e-3)
    assert usual.products == slow.products == pytest.approx(2 * 1024 * 64 * 128 / 1e-3)
    assert usual.learning == REACHED * usual.products
    for name in ("decode_s", "decode_layer_s", "sequence_s", "request_s", "segment_s", "step_s", "push_s"):
        assert getattr(slow, name) == pytest.approx(2 * getattr(usual, name)) and getattr(usual, name) > 0
    assert found(1e-4, 2e-3).products == usual.products / 2


def test_measuring_takes_a_moment_and_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    own, bf16 = cpu_rates(64, 128, "float32", 1), cpu_rates(64, 128, "bfloat16", 1)
    assert torch.get_num_threads() == before
    assert min(own.products, own.bandwidth, bf16.products, bf16.kept) > 0
    rounds: list[int] = []
    assert 0 < best(lambda: rounds.append(1)) < 0.01 and len(rounds) > 2
