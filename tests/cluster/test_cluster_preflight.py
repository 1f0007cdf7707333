"""What a run will need of this machine's disk and shared memory, before it is started."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlhf_dist.cluster import preflight
from rlhf_dist.config.schema import Config, WeightsConfig
from rlhf_dist.errors import ResourceError
from rlhf_dist.planning.placement import Machine
from rlhf_dist.weights.shared_memory import PREFIX, SHARED_MEMORY

SEVEN = "Qwen/Qwen2.5-7B-Instruct"


def config(**model: str) -> Config:
    base = Config()
    return replace(base, model=replace(base.model, **model), loop=replace(base.loop, keep_checkpoints=2))


def test_the_disk_for_a_model_that_is_not_downloaded_yet() -> None:
    """2 bytes a parameter, and three times 4 by the optimizer; two checkpoints are kept while a third is made."""
    wanted = config(path=SEVEN, dtype="bfloat16")
    assert preflight.disk_need(SEVEN, wanted, "train") == 7_615_616_512 * (2 + 12) * 3
    assert preflight.disk_need("nobody/knows-this", config(path="nobody/knows-this"), "train") == 0


def test_the_disk_for_a_directory_goes_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert preflight.disk_need(str(tmp_path), config(path=str(tmp_path)), "sft") == 1000 * 4 * 2


def test_shared_memory_is_asked_for_by_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, ...]]()
    monkeypatch.setattr(preflight, "require_room", lambda *sizes: asked.append(sizes))
    base = config(path=SEVEN, dtype="bfloat16")
    preflight.require_shared_memory(SEVEN, base)
    preflight.require_shared_memory(SEVEN, replace(base, learner=replace(base.learner, keep_state_every=5)))
    assert asked == [(2 * 7_615_616_512, 0), (2 * 7_615_616_512, 2 * 7_615_616_512 * (2 + 12))]


@pytest.mark.parametrize(
    ("transport", "device", "path", "needed"),
    [
        ("ipc", "cpu", SEVEN, "64 MiB"),
        ("ipc", "cpu", "", "16 KiB"),
        ("ipc", "cuda", SEVEN, ""),
        ("broadcast", "cpu", SEVEN, ""),
    ],
)
def test_a_bucket_that_both_see_needs_room_on_a_cpu(
    transport: Any, device: Any, path: str, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"weight": torch.zeros(64, 64)}, tmp_path / "model.safetensors")
    path = path or str(tmp_path)
    wanted = replace(config(path=path), weights=WeightsConfig(transport=transport))
    wanted = replace(wanted, cluster=replace(wanted.cluster, device=device, address="local", colocate=True))
    monkeypatch.setattr(preflight, "local_machine", lambda: Machine(cpus=4, gpus=1))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**12))
    if not needed:
        preflight.require_shared_memory(path, wanted)
        return
    with pytest.raises(ResourceError, match=f"ipc need {needed} for a bucket of weights, and 4 KiB are free; lower w"):
        preflight.require_shared_memory(path, wanted)


@pytest.mark.parametrize("transport", ["broadcast", "ipc"])
def test_what_an_earlier_run_left_goes_whatever_the_transport(transport: Any) -> None:
    left = SHARED_MEMORY / f"{PREFIX}{os.getuid()}-left-{transport}.weights"
    left.touch()
    base = config(path=SEVEN, dtype="bfloat16")
    preflight.require_shared_memory(SEVEN, replace(base, weights=replace(base.weights, transport=transport)))
    assert not left.exists()
