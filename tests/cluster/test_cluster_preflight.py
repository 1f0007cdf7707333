"""What a run will need of this machine's disk and shared memory, before it is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_dist.cluster import preflight
from rlhf_dist.config.schema import Config

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
    asked = list[int]()
    monkeypatch.setattr(preflight, "require_room", asked.append)
    preflight.require_shared_memory(SEVEN, config(path=SEVEN, dtype="bfloat16"))
    assert asked == [2 * 7_615_616_512]
