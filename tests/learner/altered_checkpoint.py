"""What ranks say that restore something else than was saved."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlhf_dist.errors import DataError, RunError
from rlhf_dist.learner.checkpoint_files import optimizer_file
from rlhf_dist.learner.model_engine import ModelEngine

ALTERED = ("weights", "exp_avg", "step", "memory", "length")
"""A tensor in the optimizer's file, a weight of the model itself, the end of the file."""


def altered(engine: ModelEngine, kind: str, checkpoint: Path, folder: Path) -> str:
    """What a restore says on this rank where rank 1 has something else than the checkpoint had."""
    name, target = optimizer_file(engine.rank), folder / f"{kind}-{checkpoint.name}"
    target.mkdir(exist_ok=True)
    tensors = load_file(checkpoint / name)
    with safe_open(checkpoint / name, framework="pt") as file:
        metadata = file.metadata()
    parameter = next(engine._deepspeed._engine.module.parameters())
    kept = parameter.data.clone()
    if engine.rank == 1:
        if kind == "memory":
            parameter.data.view(-1)[7:8].add_(1e-3)
        elif kind != "length":
            tensors[next(key for key in tensors if key.endswith(f".{kind}"))].view(-1)[:1] += (
                1e-3 if kind == "weights" else 1.0
            )
    save_file(tensors, target / name, metadata)
    if engine.rank == 1 and kind == "length":
        os.truncate(target / name, 5000)
    torch.distributed.barrier()  # each rank looks into all files
    try:
        engine.restore(target)
        return ""
    except (DataError, RunError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        parameter.data.copy_(kept)
