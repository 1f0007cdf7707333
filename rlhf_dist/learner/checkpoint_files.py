"""What a learner leaves in a checkpoint. Without torch: the controller asks for it, too."""

from __future__ import annotations

CRITIC_FOLDER = "critic"
"""Where a critic with its own trunk has its model and optimizer."""
HEAD_FILE = "value_head.safetensors"
"""The value head of a critic on the policy's trunk; its optimizer is the policy's."""
EMA_FOLDER = "hf_ema"
EMA_FILES = [f"{EMA_FOLDER}/config.json"]
"""The files, by relative path, that tell that the average is there; from the policy's first step on."""
REFERENCE_VALUES_FILE = "reference.safetensors"
"""The reference's logprobs of the judgements that a policy learns from."""
MASK_FOLDER = "mask"
"""Where the mask policy is."""
MASK_FILES = [f"{MASK_FOLDER}/config.json"]
"""The files, by relative path, that tell that it is there."""


def checkpoint_files(ranks: int) -> list[str]:
    """What `save` on all ranks leaves in a checkpoint's folder, by relative path; the files that tell it is whole."""
    return ["hf/config.json", *(optimizer_file(rank) for rank in range(ranks))]


def optimizer_file(rank: int) -> str:
    """Name of a rank's optimizer state."""
    return f"optimizer-{rank}.safetensors"


def critic_files(shared: bool, ranks: int) -> list[str]:
    """The files, by relative path, that tell that the critic's part of a checkpoint is whole."""
    return [HEAD_FILE] if shared else [f"{CRITIC_FOLDER}/{name}" for name in checkpoint_files(ranks)]
