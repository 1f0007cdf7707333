"""A model under DeepSpeed: logprobs of ragged rows, steps, published weights, checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_dist.algo.logprobs import Entropy, chunk_count
from rlhf_dist.config.schema import LearnerConfig, ModelConfig, OptimizerConfig
from rlhf_dist.errors import RlhfError
from rlhf_dist.learner.agreement import Held, require_agreement
from rlhf_dist.learner.changed_words import Part
from rlhf_dist.learner.checkpoint_files import optimizer_file
from rlhf_dist.learner.deepspeed_engine import DeepSpeedEngine, zero_scatter
from rlhf_dist.learner.direct_publication import DirectPublication
from rlhf_dist.learner.mask_policy import MaskPolicy
from rlhf_dist.learner.micro_batch_rows import Packed
from rlhf_dist.learner.numbers_check import NumbersCheck
from rlhf_dist.learner.optimizer_state import SavedState, compared_weights, contents, load_state, steps, write_state
from rlhf_dist.learner.publication import Publication
from rlhf_dist.learner.witness import Witness
from rlhf_dist.models.attention import choose_attention
from rlhf_dist.models.hf import load_model, own_memory, read_companions, save_hf
from rlhf_dist.models.packed import PackedModel
from rlhf_dist.models.packed_policy import PackedPolicy, check_head
from rlhf_dist.models.sequence_parallel import sequence_group
from rlhf_dist.models.tensors import digest
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.receipts import Announcement, MeetingPoint, Round, Sent

PREFIX = "model."
"""PackedModel holds the Hugging Face model under this name; published names are Hugging Face's own."""


class Engine:
    """One rank of a model that is trained: what engines of every head share."""

    def __init__(
        self,
        module: PackedModel,
        source: Path,
        model: ModelConfig,
        learner: LearnerConfig,
        optimizer: OptimizerConfig,
        device: str,
    ) -> None:
        """`module` is on `device` and was loaded from the Hugging Face directory `source`; the process group is up."""
        self.device = torch.device(device)
        # Now, not when it is saved: a resumed run removes the checkpoint that it came from.
        self.companions = read_companions(source)
        own_memory(module)
        self._deepspeed = DeepSpeedEngine(
            module,
            optimizer,
            zero_stage=learner.zero_stage,
            dtype=model.dtype,
            device=device,
            offload=learner.offload == "optimizer",
        )
        # With DeepSpeed, which gathers what a rank does not have; and before rows are shared, as each has its own here.
        self._check(module)
        module.share_rows(sequence_group(learner.sequence_parallel, learner.timeout_s))
        self.rank = self._deepspeed.rank
        self.share = self.rank // learner.sequence_parallel
        """Which of a batch's shares it trains; ranks that share rows have the same."""
        self.parts = learner.sequence_parallel
        """How many ranks share each row."""

    def _check(self, module: Any) -> None:
        """Refuse a model that does not compute on packed rows what it does alone. Raises ModelError."""
        raise NotImplementedError

    def chunks_of(self, wanted: int, tokens: int, chunk: int) -> int:
        """Into how many a rank cuts the logprobs that it computes, at most, of so many wanted in a row of `tokens`."""
        return chunk_count(min(wanted, -(-tokens // self.parts)), chunk)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient; `loss` is its share of the global loss, not a mean of its own."""
        self._deepspeed.backward(loss, last)

    def step(self, lr: float) -> float:
        """Optimizer step; the gradient norm before clipping."""
        return self._deepspeed.step(lr)

    def numbers_check(self, max_logprob_diff: float = 0.0) -> NumbersCheck:
        """Judges each optimizer step from now on: one that it refuses is not taken."""
        check = NumbersCheck(max_logprob_diff, self.device)
        self._deepspeed.refuses = check.refuses
        return check

    def counts(self) -> dict[str, int]:
        """How far it has come since it was made; may be asked by any thread."""
        made = self._deepspeed
        return {"passes": made.passes, "micro_batches": made.micro_batches, "optimizer_steps": made.steps}

    def witness(self) -> Witness:
        """Sees which rows the optimizer takes, from now on."""
        return Witness(self._deepspeed.optimizer, self._deepspeed.loss_factor, self.device)

    def of_all_ranks(self, mine: Any) -> list[Any]:
        """What each rank gives, by rank; every rank calls it."""
        return self._deepspeed.of_all_ranks(mine)

    def weights(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters by Hugging Face's names, all or the wanted, every rank to the end."""
        names = None if wanted is None else [PREFIX + name for name in wanted]
        for name, tensor in self._deepspeed.named_weights(names):
            if name.startswith(PREFIX):
                yield name.removeprefix(PREFIX), tensor

    def save_optimizer(self, folder: Path) -> None:
        """Write this rank's `optimizer-RANK.safetensors` into `folder`; see `write_state`."""
        deepspeed = self._deepspeed
        write_state(deepspeed.parts(), deepspeed.optimizer, folder / optimizer_file(self.rank), deepspeed.world_size)

    def restore(self, folder: Path) -> None:
        """Restore the optimizer from what `save` wrote; the weights came with `source`. Every rank calls it, of as many
        ranks and under whatever ZeRO stage.

        Before anything is taken, the ranks compare what they hold. Raises ConfigError for another model or an older
        version's file, DataError for one that is damaged or of other weights, RunError for ranks that differ.
        """
        deepspeed, parts = self._deepspeed, self._deepspeed.parts()
        mine: Held | RlhfError
        saved: SavedState | None = None
        with ExitStack() as opened:
            try:
                saved = opened.enter_context(SavedState(folder, self.rank))
                mine = Held(compared_weights(parts, saved, deepspeed.dtype), self._whole(parts, saved))
            except RlhfError as error:  # told to the others, who would wait for this rank
                mine = error
            everyone = deepspeed.of_all_ranks(mine)
            for found in everyone:
                if isinstance(found, RlhfError):
                    raise found
            require_agreement(folder, everyone)
            assert saved is not None
            load_state(parts, deepspeed.optimizer, saved)

    def _whole(self, parts: Sequence[Part], saved: SavedState) -> dict[str, str]:
        """Hashes of what every rank has to hold alike, in words.

        Under ZeRO 3 a rank has a part of the weights that no other has, from ZeRO 1 on a part of Adam's moments.
        """
        found = {"optimizer steps": digest([("steps", torch.tensor(steps(parts, saved)))])}
        if self._deepspeed.zero_stage < 3:
            found["weights"] = digest(self._deepspeed.named_weights())
        if self._deepspeed.zero_stage == 0:
            found["optimizer state"] = digest(contents(parts, saved))
        return found

    def close(self) -> None:
        """Remove what lies outside the process."""

    def _join_gathering(self) -> None:
        """What the other ranks do while rank 0 reads `weights`."""
        if self._deepspeed.zero_stage == 3:
            for _ in self.weights():
                pass


class ModelEngine(Engine):
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
        shared: bool = False,
        mask: MaskPolicy | None = None,
        meeting: MeetingPoint | None = None,
    ) -> None:
        """Load the Hugging Face directory `source`; the process group is up already.

        `shared`: rollout workers have the same devices. `mask`: what may be drawn. `meeting`: how weights are sent
        straight to the engines, and where rank 0 listens for them (its port is found here); None: they go through
        shared memory.
        """
        scatter = zero_scatter(learner.zero_stage, model.dtype, optimizer.max_grad_norm)
        hf_model = load_model(source, model.dtype, choose_attention(model.attention, device, model.dtype), scatter)
        self._source = source
        self._mask = mask
        hf_model.to(device)  # pyright: ignore[reportArgumentType]
        policy = self._packed(hf_model, model.gradient_checkpointing)
        self._chunk = learner.logprob_chunk_tokens
        super().__init__(policy, source, model, learner, optimizer, device)
        shapes = [
            (name.removeprefix(PREFIX), shape, model.dtype)
            for name, shape in self._deepspeed.shapes()
            if name.startswith(PREFIX)
        ]
        plan = make_plan(shapes, bucket_mib * 2**20)
        self._publication: Publication | DirectPublication
        if meeting is None:
            self._publication = Publication(
                self._deepspeed, self.weights, plan, prefix=PREFIX, changes=learner.delta_push, shared=shared
            )
        else:
            self._publication = DirectPublication(self._deepspeed, self.weights, plan, meeting, shared=shared)
        self._usual_chunks = self.chunks_of(learner.micro_batch_tokens, learner.micro_batch_tokens, self._chunk)

    def logprobs(self, packed: Packed, temperature: float, masked: bool = True) -> Tensor:
        """Of the tokens with a loss, float32 [N], row after row.

        `masked`: under the mask, where there is one; false for text that was not sampled.
        """
        return self._forward(packed, temperature, "none", masked)[0]

    def logprobs_and_entropy(self, packed: Packed, temperature: float, gradient: bool = False) -> tuple[Tensor, Tensor]:
        """The same, under the mask, with the entropies; `gradient`: of those too."""
        return self._forward(packed, temperature, "gradient" if gradient else "value", True)

    def _forward(self, packed: Packed, temperature: float, entropy: Entropy, masked: bool) -> Any:
        return self._deepspeed.forward(
            packed.tokens,
            packed.cu_seqlens,
            packed.predict,
            packed.targets,
            temperature,
            self._chunk,
            entropy,
            self._mask.mask(packed) if self._mask is not None and masked else None,
            self._deepspeed.equally_often(
                self.chunks_of(len(packed.predict), len(packed.tokens), self._chunk), self._usual_chunks
            ),
        )

    def _whole(self, parts: Sequence[Part], saved: SavedState) -> dict[str, str]:
        found = super()._whole(parts, saved)
        return found if self._mask is None else found | {"mask": digest(self._mask.weights())}

    def _check(self, module: Any) -> None:
        check_head(PackedPolicy(module.model))

    def _packed(self, model: PreTrainedModel, gradient_checkpointing: bool) -> PackedModel:
        return PackedPolicy(model, gradient_checkpointing)

    def step(self, lr: float) -> float:
        """As `Engine.step`; where it was taken, the next publication has new weights."""
        norm = super().step(lr)
        self._publication.moved = self._publication.moved or not self._deepspeed.refused
        return norm

    def publish(self, version: int) -> Announcement | None:
        """Write the weights where rollout workers read them, or hash what `send` will send them.

        Every rank calls it; rank 0 returns the announcement.

        Without an optimizer step since the last publication, its bytes get the new number.
        """
        announcement = self._publication.publish(version)
        if self._mask is not None:
            self._mask.follow(version, self.weights())
        return announcement

    def send(self, made: Round) -> Sent:
        """Send the published weights to the engines of a round. Every rank calls it, with a meeting only."""
        assert isinstance(self._publication, DirectPublication)
        return self._publication.send(made)

    def save(self, folder: Path) -> None:
        """Checkpoint into `folder`: `hf/` by rank 0, and each rank's `optimizer-RANK.safetensors`."""
        if self.rank == 0:
            save_hf(self.weights(), self.companions, folder / "hf")
            if self._mask is not None:
                self._mask.save(self.companions, folder)
        else:
            self._join_gathering()
        self.save_optimizer(folder)

    def close(self) -> None:
        """Remove the shared-memory file, or end the connections."""
        self._publication.close()
