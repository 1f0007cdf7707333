"""The reference's logprobs of judged responses: computed once before training, kept in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.config.schema import LearnerConfig, ModelConfig
from rlhf_dist.errors import DataError
from rlhf_dist.learner.checkpoint_files import REFERENCE_VALUES_FILE
from rlhf_dist.learner.micro_batch_rows import Packed
from rlhf_dist.models.attention import choose_attention
from rlhf_dist.models.hf import load_model, own_memory
from rlhf_dist.models.packed_policy import PackedPolicy, check_head
from rlhf_dist.models.tensors import WAY_OUT, read_tensors, write_tensors

Key = tuple[bool, int]
"""(whether it is held out, number in its data): one judgement."""
PARTS = {"held_out", "number", "rows", "logprobs", "digest"}
"""Of the file of a checkpoint."""


class ReferenceValues:
    """Logprobs of whole responses, nats, float32, by judgement."""

    def __init__(self) -> None:
        self._of: dict[Key, np.ndarray] = {}

    def keep(self, found: Mapping[Key, Sequence[float]]) -> None:
        """Those of some judgements, in the order of their rows."""
        self._of |= {key: np.asarray(values, np.float32) for key, values in found.items()}

    def __contains__(self, key: Key) -> bool:
        return key in self._of

    def of(self, key: Key) -> np.ndarray:
        """float32, one for each row of the judgement."""
        assert key in self._of, f"no reference for judgement {key}"
        return self._of[key]

    def judgements(self) -> list[Key]:
        """Those with values, in order."""
        return sorted(self._of)

    def save(self, folder: Path, digest: bytes) -> None:
        """Write the file of a checkpoint. `digest`: of the judgements that the values are of. Raises DiskError."""
        keys = self.judgements()
        tensors = {
            "held_out": torch.tensor([held_out for held_out, _ in keys], dtype=torch.bool),
            "number": torch.tensor([number for _, number in keys], dtype=torch.int64),
            "rows": torch.tensor([len(self._of[key]) for key in keys], dtype=torch.int64),
            "logprobs": torch.from_numpy(np.concatenate([self._of[key] for key in keys])),
            "digest": torch.tensor(list(digest), dtype=torch.uint8),
        }
        write_tensors(tensors, folder / REFERENCE_VALUES_FILE)

    def restore(self, folder: Path) -> bytes:
        """Read what `save` wrote; returns the digest. Raises DataError."""
        path = folder / REFERENCE_VALUES_FILE
        found = read_tensors(path)
        if found.keys() != PARTS or found["rows"].sum() != len(found["logprobs"]):
            raise DataError(f"{path}: does not hold the reference's logprobs; {WAY_OUT}")
        ends = np.cumsum(found["rows"].numpy())[:-1]
        values = np.split(found["logprobs"].numpy(), ends)
        keys = zip(found["held_out"].tolist(), found["number"].tolist(), strict=True)
        self._of = dict(zip(keys, values, strict=True))
        return bytes(found["digest"].tolist())


class FrozenReference:
    """Another model than the policy's own start, whole on every rank for as long as its logprobs are computed."""

    def __init__(self, source: str, model: ModelConfig, learner: LearnerConfig, *, device: str) -> None:
        """The Hugging Face directory or hub name `source`, which is loaded at the first call."""
        self._source, self._model, self._learner, self._device = source, model, learner, device
        self._policy: PackedPolicy | None = None

    @torch.no_grad()
    def __call__(self, packed: Packed) -> Tensor:
        """Logprobs of the tokens with a loss, float32 [N], row after row. Raises ModelError."""
        policy = self._policy = self._policy or self._load()
        where = (packed.tokens, packed.cu_seqlens, packed.predict, packed.targets)
        return policy(*where, 1.0, self._learner.logprob_chunk_tokens, "none")[0]

    def _load(self) -> PackedPolicy:
        model = self._model
        loaded = load_model(self._source, model.dtype, choose_attention(model.attention, self._device, model.dtype))
        policy = PackedPolicy(loaded.to(self._device))  # pyright: ignore[reportArgumentType]
        policy.requires_grad_(False)
        own_memory(policy)
        check_head(policy)
        return policy
