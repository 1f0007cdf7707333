"""A reward model or critic under DeepSpeed: one number per row or per token with a loss, steps, checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_dist.config.schema import LearnerConfig, ModelConfig, OptimizerConfig
from rlhf_dist.learner.deepspeed_engine import zero_scatter
from rlhf_dist.learner.micro_batch_rows import Packed
from rlhf_dist.learner.model_engine import Engine
from rlhf_dist.models.attention import choose_attention
from rlhf_dist.models.scalar import (
    NO_SCALE,
    PackedScalar,
    PackedScalarWithLM,
    ScoreScale,
    check_scalar,
    linear,
    load_lm_head,
    load_scalar,
    read_scale,
    save_scalar,
)
from rlhf_dist.models.tensors import read_tensors, write_tensors

LM_PREFIX = "lm_head."
LM_HEAD_FILE = "lm_head.safetensors"
"""In a checkpoint's folder, beside `hf/`, when a language-model head is trained along."""


class ScalarEngine(Engine):
    """One rank of a model with a scalar head."""

    def __init__(
        self,
        source: Path,
        model: ModelConfig,
        learner: LearnerConfig,
        optimizer: OptimizerConfig,
        *,
        device: str,
        normalized: bool = True,
    ) -> None:
        """Load `source`, a reward model or a causal LM (then the head is new, all zero); the process group is up.

        `normalized`: numbers are centred and scaled as stored with the model; false: they are the head's own.
        """
        scatter = zero_scatter(learner.zero_stage, model.dtype, optimizer.max_grad_norm)
        loaded = load_scalar(source, model.dtype, choose_attention(model.attention, device, model.dtype), scatter)
        scalar = self._module(loaded, source, model).to(device)
        self._scale = read_scale(source) if normalized else NO_SCALE
        super().__init__(scalar, source, model, learner, optimizer, device)

    def values(self, packed: Packed) -> Tensor:
        """float32 [N], one per token with a loss, row after row: read at the position before it."""
        return self._normalized(self._read(packed, packed.predict))

    def scores(self, packed: Packed) -> Tensor:
        """float32 [S], one per row: read at its last token."""
        return self._normalized(self._read(packed, last_tokens(packed)))

    def save(self, folder: Path, scale: ScoreScale | None = None) -> None:
        """Checkpoint into `folder`: `hf/` by rank 0, and each rank's `optimizer-RANK.safetensors`.

        `scale` is stored in config.json; None keeps the normalisation that came with the model.
        """
        if self.rank == 0:
            save_scalar(self.weights(), self.companions, folder / "hf", scale)
        else:
            self._join_gathering()
        self.save_optimizer(folder)

    def _check(self, module: Any) -> None:
        check_scalar(module)

    def _module(self, loaded: PreTrainedModel, source: Path, model: ModelConfig) -> PackedScalar:
        return PackedScalar(loaded, model.gradient_checkpointing)

    def _read(self, packed: Packed, positions: Tensor) -> Tensor:
        return self._deepspeed.forward(packed.tokens, packed.cu_seqlens, positions)

    def _normalized(self, raw: Tensor) -> Tensor:
        return (raw - self._scale.score_mean) / self._scale.divisor


class ScalarEngineWithLM(ScalarEngine):
    """The same with the language-model head of the start, which is trained along and kept beside `hf/`."""

    def __init__(
        self,
        source: Path,
        model: ModelConfig,
        learner: LearnerConfig,
        optimizer: OptimizerConfig,
        *,
        device: str,
        normalized: bool = True,
    ) -> None:
        """`source` is a causal LM, or `hf/` of a checkpoint that this engine saved."""
        self._chunk = learner.logprob_chunk_tokens
        super().__init__(source, model, learner, optimizer, device=device, normalized=normalized)
        self._usual_chunks = self.chunks_of(learner.micro_batch_tokens, learner.micro_batch_tokens, self._chunk)

    def scores_and_logprobs(self, packed: Packed, learnt: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """(scores float32 [S] as `scores`, logprobs float32 [N] of tokens with a loss in rows that are learnt)."""
        mask = packed.spread(learnt) > 0
        predict = packed.predict[mask]
        raw, logprobs = self._deepspeed.forward(
            packed.tokens,
            packed.cu_seqlens,
            last_tokens(packed),
            predict,
            packed.targets[mask],
            self._chunk,
            self._deepspeed.equally_often(
                self.chunks_of(len(predict), len(packed.tokens), self._chunk), self._usual_chunks
            ),
        )
        return self._normalized(raw), logprobs

    def weights(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Those of the scalar model alone."""
        return (pair for pair in super().weights(wanted) if not pair[0].startswith(LM_PREFIX))

    def save(self, folder: Path, scale: ScoreScale | None = None) -> None:
        """See `ScalarEngine.save`; the language-model head beside it."""
        super().save(folder, scale)
        # Every rank to the end: under ZeRO-3 they gather together.
        head = {
            name.removeprefix(LM_PREFIX): tensor.cpu().clone()
            for name, tensor in self._deepspeed.named_weights()
            if name.startswith(LM_PREFIX)
        }
        if self.rank == 0:
            write_tensors(head, folder / LM_HEAD_FILE)

    def _module(self, loaded: PreTrainedModel, source: Path, model: ModelConfig) -> PackedScalar:
        saved = source.parent / LM_HEAD_FILE
        head = linear(read_tensors(saved)) if saved.exists() else load_lm_head(source, model.dtype)
        return PackedScalarWithLM(loaded, head, model.gradient_checkpointing)

    def _read(self, packed: Packed, positions: Tensor) -> Tensor:
        none = positions[:0]
        return self._deepspeed.forward(packed.tokens, packed.cu_seqlens, positions, none, none, self._chunk)[0]


def last_tokens(packed: Packed) -> Tensor:
    """int64 [S]; the position of each row's last token."""
    return packed.cu_seqlens[1:].long() - 1
