"""ZeRO-3 over two real ranks: none of them ever holds the whole model while it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forks import ForkServer
from rank_processes import run_ranks
from safetensors.torch import load_file

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.models.tiny import make_tiny

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]
SMALL = TinyConfig(hidden_size=64, intermediate_size=128, layers=2, heads=2, kv_heads=1, max_positions=64)
LARGE = TinyConfig(hidden_size=768, intermediate_size=2048, layers=6, heads=12, kv_heads=4, max_positions=64)


def test_a_ranks_memory_grows_by_its_share_and_the_largest_parameter(tmp_path: Path, forks: ForkServer) -> None:
    """And 10%; the model is 144 MB."""
    model, small = make_tiny(LARGE, tmp_path), make_tiny(SMALL, tmp_path)
    ranks = run_ranks(forks, "load_ranks.py", tmp_path, model, small, tmp_path, worlds=(2,))
    stored = load_file(model / "model.safetensors")
    count, largest = sum(x.numel() for x in stored.values()), max(x.numel() for x in stored.values())
    for found in ranks.values():
        assert count / 2 <= found["held"] <= count / 2 + len(stored)
        assert 4 * found["held"] * 0.9 < found["taken"] <= 1.1 * 4 * (count / 2 + largest), "or it measures nothing"
        assert found["weights"].keys() == stored.keys()
        assert all(torch.equal(found["weights"][name], tensor) for name, tensor in stored.items())
