"""What a reference that moves leaves in a checkpoint."""

from __future__ import annotations

from rlhf_dist.config.schema import ReferenceConfig

REFERENCE_FOLDER = "reference"
"""In a checkpoint's folder; a Hugging Face directory."""
MASTERS_FILE = "float32_masters.safetensors"
"""In that directory: the moving average itself, where the model's dtype holds it rounded only."""


def reference_files(reference: ReferenceConfig, dtype: str, step: int) -> list[str]:
    """The files, by relative path, that tell that the reference's part of a checkpoint at `step` is whole."""
    if not reference.update_every:
        return []
    has_masters = reference.ema > 0 and dtype != "float32" and step >= reference.update_every
    names = ["config.json", *([MASTERS_FILE] if has_masters else [])]
    return [f"{REFERENCE_FOLDER}/{name}" for name in names]
