"""A bucket that processes share: what is told of CUDA's memory, with stand-ins for the calls that need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf_dist.weights import staging
from rlhf_dist.weights.staging import CudaStaging, FileStaging, decoded, encoded, identity, make_staging, see

CUDA = torch.device("cuda:3")
HANDLES = (b"\x00handle\xff", 4096, 512, False, b"counter", 7, b"event\n", True)
"""What torch gives away of a bucket of CUDA's memory, from the handle on."""


class Rebuilt:
    """In place of `rebuild_cuda_tensor`."""

    def __init__(self) -> None:
        self.given: tuple[Any, ...] = ()

    def __call__(self, *given: Any) -> torch.Tensor:
        self.given = given
        return torch.zeros(4096, dtype=torch.uint8)


def test_a_bucket_on_a_gpu_is_told_by_handles_and_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilt, kind = Rebuilt(), (torch.Tensor, (4096,), (1,), 0, torch.UntypedStorage, torch.uint8, 0)
    monkeypatch.setattr(staging, "reduce_tensor", lambda tensor: (rebuilt, (*kind, *HANDLES)))
    monkeypatch.setattr(staging, "rebuild_cuda_tensor", rebuilt)
    told = CudaStaging(4096, torch.device("cpu")).export()
    assert told.isascii() and "torch" not in told
    see(told, 4096, CUDA)
    assert rebuilt.given == (*kind[:-1], CUDA.index, *HANDLES), "on the device as the receiver counts it"


def test_handles_survive_being_told() -> None:
    assert tuple(decoded(encoded(HANDLES))) == HANDLES


def test_a_gpu_is_known_by_what_all_processes_call_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"uuid": f"id of {device}"}))
    assert identity(CUDA) == "id of cuda:3"
    assert identity(torch.device("cpu")) == identity(torch.device("cpu")) != ""


def test_a_bucket_on_a_cpu_is_seen_by_others_and_goes() -> None:
    made = make_staging(100, torch.device("cpu"))
    assert isinstance(made, FileStaging)
    other = see(made.export(), 60, torch.device("cpu"))
    made.tensor[:60] = torch.arange(60, dtype=torch.uint8)
    assert other.tolist() == list(range(60))
    made.close()
    made.close()
    with pytest.raises(OSError, match="No such file"):
        see(made.export(), 60, torch.device("cpu"))
    assert other.tolist() == list(range(60)), "what is mapped stays"
