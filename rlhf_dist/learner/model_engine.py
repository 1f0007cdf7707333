"""A language model under DeepSpeed: logprobs of ragged rows, steps, published weights, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_dist.config.schema import LearnerConfig, ModelConfig, OptimizerConfig
from rlhf_dist.errors import ConfigError, DataError, DiskError
from rlhf_dist.learner.deepspeed_engine import DeepSpeedEngine
from rlhf_dist.learner.rows import Row, pack_rows
from rlhf_dist.models.attention import choose_attention
from rlhf_dist.models.hf import load_model, save_hf
from rlhf_dist.models.policy import PackedPolicy, check_head
from rlhf_dist.weights.plan import make_plan
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.shared_memory import WeightWriter

PREFIX = "model."
"""PackedPolicy holds the Hugging Face model under this name; published names are Hugging Face's own."""


def checkpoint_files(ranks: int) -> list[str]:
    """What `save` on all ranks leaves in a checkpoint's folder, by relative path; the files that tell it is whole."""
    return ["hf/config.json", *(optimizer_file(rank) for rank in range(ranks))]


def optimizer_file(rank: int) -> str:
    """Name of a rank's optimizer state."""
    return f"optimizer-{rank}.safetensors"


class ModelEngine:
    """One rank of the policy."""

    def __init__(
        self,
        source: Path,
        model: ModelConfig,
        learner: LearnerConfig,
        optimizer: OptimizerConfig,
        *,
        device: str,
        bucket_mib: int,
    ) -> None:
        """Load the Hugging Face directory `source`; the process group is up already."""
        hf_model = load_model(source, model.dtype, choose_attention(model.attention, device, model.dtype))
        policy = PackedPolicy(hf_model.to(device), gradient_checkpointing=model.gradient_checkpointing)  # pyright: ignore[reportArgumentType]
        check_head(policy)
        self._source = source
        self._chunk = learner.logprob_chunk_tokens
        self._dtype = model.dtype
        self._bucket_bytes = bucket_mib * 2**20
        self._writer: WeightWriter | None = None
        self.device = torch.device(device)
        self._deepspeed = DeepSpeedEngine(
            policy, optimizer, zero_stage=learner.zero_stage, dtype=model.dtype, device=device
        )
        self.rank = self._deepspeed.rank

    def logprobs(self, rows: Sequence[Row], temperature: float) -> tuple[Tensor, Tensor]:
        """(logprobs, entropy) of the rows' response tokens, float32 [N] each, row after row."""
        packed = pack_rows(rows, self.device)
        return self._deepspeed.forward(
            packed.tokens, packed.cu_seqlens, packed.predict, packed.targets, temperature, self._chunk
        )

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient; `loss` is its share of the global loss, not a mean of its own."""
        self._deepspeed.backward(loss, last)

    def step(self, lr: float) -> float:
        """Optimizer step; the gradient norm before clipping."""
        return self._deepspeed.step(lr)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters by Hugging Face's names, every rank to the end."""
        for name, tensor in self._deepspeed.named_weights():
            yield name.removeprefix(PREFIX), tensor

    def publish(self, version: int) -> Announcement | None:
        """Write the weights where rollout workers read them. Every rank calls it; rank 0 returns the announcement."""
        if self.rank > 0:
            if self._deepspeed.zero_stage == 3:
                for _ in self.weights():
                    pass
            return None
        if self._writer is None:
            shapes = [(name.removeprefix(PREFIX), shape, self._dtype) for name, shape in self._deepspeed.shapes()]
            self._writer = WeightWriter(make_plan(shapes, self._bucket_bytes))
        return self._writer.write(version, self.weights())

    def save(self, folder: Path) -> None:
        """Checkpoint into `folder`: `hf/` by rank 0, and each rank's `optimizer-RANK.safetensors`."""
        if self.rank == 0:
            save_hf(self.weights(), self._source, folder / "hf")
        elif self._deepspeed.zero_stage == 3:
            for _ in self.weights():
                pass
        path = folder / optimizer_file(self.rank)
        try:
            save_file(self._deepspeed.optimizer_tensors(), path)
        except (OSError, SafetensorError) as error:
            raise DiskError(f"{path}: cannot be written: {error}; the checkpoint before it is intact") from None

    def restore(self, folder: Path) -> None:
        """Restore the optimizer from what `save` wrote; the weights came with `source`."""
        path = folder / optimizer_file(self.rank)
        if not path.exists():
            raise ConfigError(f"{path} is missing: resume with the learner.ranks that wrote the checkpoint")
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot be read: {error}; resume from another checkpoint") from None
        self._deepspeed.load_optimizer_tensors(tensors)

    def close(self) -> None:
        """Remove the shared-memory file."""
        if self._writer is not None:
            self._writer.close()
