"""What a critic leaves in a checkpoint."""

from __future__ import annotations

from rlhf_dist.learner.model_engine import checkpoint_files

CRITIC_FOLDER = "critic"
"""Where a critic with its own trunk has its model and optimizer."""
HEAD_FILE = "value_head.safetensors"
"""The value head of a critic on the policy's trunk; its optimizer is the policy's."""


def critic_files(shared: bool, ranks: int) -> list[str]:
    """The files, by relative path, that tell that the critic's part of a checkpoint is whole."""
    return [HEAD_FILE] if shared else [f"{CRITIC_FOLDER}/{name}" for name in checkpoint_files(ranks)]
