"""Maps that a GPU copies from and to, with a stand-in for the CUDA runtime: what is registered, and until when."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.shared_memory import WeightReader, WeightWriter

PLAN = make_plan([("a", (300,), "float32")], 2**20)
OUT_OF_MEMORY = 2


@dataclass
class Runtime:
    """`torch.cuda.cudart()`, as far as it is used."""

    code: int = 0
    registered: dict[int, int] = field(default_factory=dict)
    """Address -> bytes."""

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert flags == 0 and address not in self.registered
        if self.code == 0:
            self.registered[address] = nbytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    return made


def maps(path: Path) -> dict[int, int]:
    """Address -> bytes of what this process has mapped of a file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return {first: end - first for first, end in ranges}


def test_both_ends_register_their_own_map_and_give_it_back(runtime: Runtime) -> None:
    writer = WeightWriter(PLAN, pinned=True)
    assert runtime.registered == maps(writer.path), "the whole file, both buffers"
    reader = WeightReader(pinned=True)
    for version in (1, 2, 3):
        reader.take(writer.write(version, [("a", torch.full((300,), float(version)))])).close()
        assert runtime.registered == maps(writer.path) and len(runtime.registered) == 2, "each once"
    other = WeightWriter(PLAN)
    lease = reader.take(other.write(1, [("a", torch.ones(300))]))
    lease.close()
    writer.close()
    writer.close()
    assert runtime.registered == {lease_address(lease.memory): 2 * 4096}, "the reader's new map alone"
    other.close()


def lease_address(memory: object) -> int:
    import numpy as np

    return int(np.frombuffer(memory, np.uint8).ctypes.data)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_without_a_gpu_nothing_is_registered(runtime: Runtime) -> None:
    writer = WeightWriter(PLAN)
    WeightReader().take(writer.write(1, [("a", torch.ones(300))])).close()
    writer.close()
    assert runtime.registered == {}


def test_a_refusal_is_told_and_weights_move_all_the_same(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    runtime.code = OUT_OF_MEMORY
    writer = WeightWriter(PLAN, pinned=True)
    lease = WeightReader().take(writer.write(1, [("a", torch.ones(300))]))
    assert torch.equal(lease.tensors()[0][1], torch.ones(300))
    writer.close()
    assert "cudaHostRegister gave error 2" in caplog.text
