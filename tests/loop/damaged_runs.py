"""A run with two checkpoints, made by hand, and what tests do to it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from ledgers import LedgerByUid

from rlhf_dist.errors import DataError
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.resume_point import resume_point
from rlhf_dist.loop.run_directory import open_run_directory

FILES = (
    "hf/config.json",
    "hf/model.safetensors",
    "hf/tokenizer.json",
    "optimizer-0.safetensors",
    "optimizer-1.safetensors",
    "critic/hf/model.safetensors",
    "critic/optimizer-1.safetensors",
    "value_head.safetensors",
    "hf_ema/model.safetensors",
    "reference/model.safetensors",
    "mask/model.safetensors",
)


def use(ledger: Ledger, step: int) -> None:
    """A step of two groups."""
    LedgerByUid(ledger).use([f"0/{2 * step}", f"0/{2 * step + 1}"], step)


def make_run(output: Path) -> Path:
    """A run of four steps with the checkpoints step-2 and step-4."""
    directory = open_run_directory(str(output), "run", "name: run\n", resume=False)
    ledger = Ledger(directory.ledger)
    for step in (1, 2, 3, 4):
        use(ledger, step)
        if step == 3:
            ledger.issue([("0/dropped", 0)], 2)
            ledger.drop([("0/dropped", 0)], "stale")
        if step % 2:
            continue
        folder = directory.begin_checkpoint(step)
        for number, name in enumerate(FILES):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(bytes([step, number]) * 1000)
        directory.commit_checkpoint(step, 2, {"step": step, "ledger": asdict(ledger.totals(step))}, FILES)
    ledger.close()
    directory.close()
    return directory.path


def refused(run: Path, step: int | None = None) -> str:
    with pytest.raises(DataError) as raised:
        resume_point(run, "train", step)
    message = str(raised.value)
    assert "\n" not in message
    return message


def step_2(run: Path) -> str:
    """The way out that every damage of step-4 has."""
    return f". Resume from step-2 with `rlhf-dist train {run}/config.yaml --resume-from step-2`"


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def renamed(run: Path) -> None:
    (run / "checkpoints" / "step-4").rename(run / "checkpoints" / "step-6")
    (run / "checkpoints" / "LATEST").write_text("step-6\n")
