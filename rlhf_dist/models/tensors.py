"""Files of named tensors in a checkpoint. Safetensors only: reading a pickle can run code."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_dist.errors import DataError, DiskError

WAY_OUT = "resume from another checkpoint with --resume-from step-N"


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file of a checkpoint. Raises DiskError."""
    try:
        save_file(tensors, path, metadata)
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{path}: cannot be written: {error}; the checkpoint before it is intact") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote, on the CPU. Raises DataError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read: {error}; {WAY_OUT}") from None


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """xxh3-128 in hex of names, dtypes, shapes and bytes, in the order given; at memory speed."""
    whole = xxhash.xxh3_128()
    for name, tensor in tensors:
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
