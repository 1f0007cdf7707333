"""A bucket that processes share: what is told of CUDA's memory, with stand-ins for the calls that need a GPU."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from weight_senders import round_of, sending, transfer

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights import staging
from rlhf_dist.weights.direct_reader import DirectReader
from rlhf_dist.weights.receipts import MeetingPoint, Round
from rlhf_dist.weights.shared_memory import PREFIX, SHARED_MEMORY
from rlhf_dist.weights.staging import (
    CudaStaging,
    FileStaging,
    StagingReceiver,
    StagingSender,
    decoded,
    encoded,
    identity,
    make_staging,
    see,
)

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


MEETING = MeetingPoint(("127.0.0.1", 1), "ipc", 1.0, secret="only through Ray")
MADE = Round(1, 1, 1, MEETING, ("w0",))
HERE = torch.device("cpu")


def test_only_what_the_learner_wrote_is_opened(tmp_path: Path) -> None:
    """Any user of the machine can write into a store that listens on loopback."""
    assert "Ray" not in repr(MADE)
    stranger = tmp_path / f"{PREFIX}x"
    stranger.write_bytes(bytes(100))
    name = f"1/export/{identity(HERE)}"
    store: Any = HashStore()
    sender = StagingSender(store, MADE, [1], 100, HERE)
    honest = store.get(name).decode()
    for forged in (str(stranger), f"{'0' * 64} {stranger}", honest.partition(" ")[0], honest + "x", "", "\u00e9"):
        store.set(name, forged)
        with pytest.raises(WeightSyncError, match="was not written by the learner"):
            StagingReceiver(store, MADE, 1, 100, HERE, time.monotonic() + 1)
    other = replace(MADE, number=2)
    store.set(f"2/export/{identity(HERE)}", honest)
    with pytest.raises(WeightSyncError, match="was not written by the learner"):
        StagingReceiver(store, other, 1, 100, HERE, time.monotonic() + 1)
    store.set(name, honest)
    StagingReceiver(store, MADE, 1, 100, HERE, time.monotonic() + 1).close()
    sender.close()
    for path in (stranger, SHARED_MEMORY / "other", SHARED_MEMORY / ".." / stranger.relative_to("/")):
        with pytest.raises(WeightSyncError, match="is not a bucket"):
            see(str(path), 100, HERE)


class Told:
    """In place of a store, of a GPU's queue and of memory: writes down who is asked for what."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.tensor = self

    def __getitem__(self, part: slice) -> Told:
        return self

    def __len__(self) -> int:
        return 8

    def set(self, name: str, value: str) -> None:
        self.calls.append(name)

    def get(self, name: str) -> bytes:
        self.calls.append("get")
        return b""

    def wait(self, names: list[str], limit: object) -> None:
        self.calls.append(f"wait {names[0]}")

    def delete_key(self, name: str) -> None: ...

    def export(self) -> str:
        return "a bucket"

    def copy_(self, source: object) -> None:
        self.calls.append("copy")

    def synchronize(self) -> None:
        self.calls.append("synchronize")


def test_a_gpus_queue_is_empty_before_another_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only asked of a GPU has not been done, and other processes do not know its queue."""
    told: Any = Told()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: told)
    monkeypatch.setattr(staging, "identity", lambda device: "gpu")
    monkeypatch.setattr(staging, "make_staging", lambda nbytes, device: told)
    monkeypatch.setattr(staging, "see", lambda exported, nbytes, device: told)
    monkeypatch.setattr(staging, "unsealed", lambda *given: "")
    sender = StagingSender(told, MADE, [1], 8, CUDA)
    receiver = StagingReceiver(told, MADE, 1, 8, CUDA, time.monotonic() + 1)
    told.calls.clear()
    sender.send(0, 8, time.monotonic() + 1)
    assert told.calls == ["synchronize", "1/filled gpu/0", "wait 1/taken 0/1"]
    told.calls.clear()
    receiver.receive(0, told, time.monotonic() + 1)
    assert told.calls == ["wait 1/filled gpu/0", "get", "copy", "synchronize", "1/taken 0/1"]


def test_a_bucket_on_a_gpu_is_let_go_before_cuda_is_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    made = CudaStaging(100, HERE)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: left.append(made.tensor.numel()))
    made.close()
    assert left == [0]


def test_memory_of_a_shared_gpu_is_given_back_around_each_push(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine lets go of a bucket after the learner's round has ended: what it had then goes at the next push."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: calls.append("ipc_collect"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    with sending("ipc") as sender:
        publication: Any = sender.publication
        publication._frees = True
        publication._hash = lambda data: calls.append("hash") or "hash"
        announced = sender.publish(1)
        frees = ["ipc_collect", "empty_cache"]
        assert calls == [*frees, *["hash"] * len(announced.hashes), *frees]
        calls.clear()
        close = StagingSender.close
        monkeypatch.setattr(StagingSender, "close", lambda self: (calls.append("close"), close(self))[0])
        transfer(sender, announced, round_of(announced, 1, 1, ("w0",)), {"w0": DirectReader(HERE)})
        assert calls == ["close", *frees]
