"""TRL's own trainers, without their set-up: the functions in which they compute, on tensors instead of models.

A trainer is made without its constructor and given the attributes that the called method reads. What would run a model
(`_get_per_token_logps_and_entropies`), sample (`_generate`) or judge (`_calculate_rewards`) gives the numbers of a
`Batch`; everything from there to the loss is TRL's code.
"""

from __future__ import annotations

import importlib
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_dist.algo.algorithm import Algorithm
from rlhf_dist.algo.corrections import entropy_threshold, off_policy_sequence_mask
from rlhf_dist.algo.kl import kl_estimate

# The last version with PPO; later ones left it out.
WANTED = "TRL with PPO is not installed; launch/setup.sh --dev installs it, as does: pip install --no-deps trl==1.12.0"
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    # TRL sets it when imported, for all that this process starts, too; so it is taken back.
    patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    if os.environ.get("CI"):
        importlib.import_module("trl")  # where every change is tested, parity is not to be skipped unseen
    import_utils = pytest.importorskip("trl.import_utils", reason=WANTED)
    # Its client for vLLM asks for other versions of vLLM, and nothing here samples.
    patch.setattr(import_utils, "is_vllm_available", lambda *_, **__: False)
    ppo_trainer = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason=WANTED)
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason=WANTED)
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason=WANTED)
    reward_trainer = pytest.importorskip("trl.trainer.reward_trainer", reason=WANTED)
    rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer", reason=WANTED)

DTYPES = [torch.float32, torch.float64]
LIMITS = {torch.float32: (2e-6, 1e-6), torch.float64: (1e-10, 1e-12)}
"""Relative and absolute: rounding and nothing else; the absolute one for sums of about 1 that cancel."""
LONGEST = 16
"""Longest response allowed; the padded width is less."""
LEARNER, SAMPLER, REFERENCE = (SimpleNamespace(training=True, is_gradient_checkpointing=False) for _ in range(3))
"""Stand for models."""


def same(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to the rounding of their dtype."""
    relative, absolute = LIMITS[theirs.dtype]
    torch.testing.assert_close(ours, theirs, rtol=relative, atol=absolute)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What TRL's n / (n - 1) of a variance comes out as: single precision otherwise, whatever the numbers are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def itself(x: Any, *_: Any, **__: Any) -> Any:
    """What a collective gives where there is one process."""
    return x


def one_process(**more: Any) -> SimpleNamespace:
    """The parts of an `Accelerator` that are asked for."""
    collectives = dict.fromkeys(("gather", "gather_for_metrics", "reduce", "pad_across_processes"), itself)
    return SimpleNamespace(
        device=torch.device("cpu"), process_index=0, num_processes=1, sync_gradients=True, **collectives, **more
    )


def trainer(kind: type, **attributes: Any) -> Any:
    """A trainer that has these attributes, its methods, and nothing more."""
    made = object.__new__(kind)
    vars(made).update(accelerator=one_process(), model=SAMPLER, aux_loss_enabled=False, _total_train_tokens=0)
    vars(made).update(_metrics={"train": defaultdict(list)}, **attributes)
    return made


@dataclass(frozen=True)
class Batch:
    """Responses as TRL has them: [B, T], with places that are no tokens of the policy."""

    mask: Tensor
    """[B, T] bool."""
    logprobs: Tensor
    """[B, T] of the learner; as all that follows, with some number where the mask is false."""
    old: Tensor
    """[B, T] of the learner before its first update."""
    sampled: Tensor
    """[B, T] of the sampler."""
    reference: Tensor
    """[B, T]."""
    entropy: Tensor
    """[B, T]."""
    scores: Tensor
    """[B]."""
    group_size: int

    @property
    def lengths(self) -> Tensor:
        """[B] tokens of the policy."""
        return self.mask.sum(1)

    @property
    def groups(self) -> Tensor:
        """[B]."""
        return torch.arange(len(self.scores)) // self.group_size


def make_batch(
    seed: int, dtype: torch.dtype, lengths: tuple[int, ...] = (5, 1, 9, 3, 7, 2, 4, 6), gap: int = 0
) -> Batch:
    """Random responses of these lengths, in groups of four, every `gap`-th place masked out; ratios up to e^8."""
    chance = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        # Single precision has all digits, because TRL makes a tensor of the sampler's logprobs by itself.
        return torch.randn(*size, generator=chance).to(dtype)

    size = (len(lengths), max(lengths))
    mask = torch.arange(size[1]) < torch.tensor(lengths)[:, None]
    if gap:
        mask &= (torch.arange(size[1]) + 1) % gap != 0
    old = -normal(*size).abs() - 0.1
    far = 8.0 * normal(*size).sign() * (torch.rand(size, generator=chance) < 0.1)
    return Batch(
        mask=mask,
        logprobs=old + 0.4 * normal(*size) + far,
        old=old,
        sampled=(old + 0.5 * normal(*size)).float().to(dtype),
        reference=old + 0.3 * normal(*size),
        entropy=normal(*size).abs(),
        # Quarters: their sums have no rounding, so that equal scores have a deviation of exactly 0 in TRL too.
        scores=(4 * normal(len(lengths))).round() / 4,
        group_size=4,
    )


def ids_of(batch: Batch) -> list[list[int]]:
    """Token ids of the responses, one for each place up to the last that is a token (and one for an empty response)."""
    width = batch.mask.shape[1]
    reach = (batch.mask * torch.arange(1, width + 1)).amax(1).clamp(min=1)
    return [[7] * n for n in reach.tolist()]


def scorer(kind: type, batch: Batch, logprobs: Tensor, entropy: Tensor, **settings: Any) -> Any:
    """A GRPO or RLOO trainer whose samples, models and judge are the batch."""
    ids, mask = ids_of(batch), batch.mask.long()
    samples = [
        [[7]] * len(ids),
        ids,
        [row[: len(x)].tolist() for row, x in zip(mask, ids, strict=True)],
        [""] * len(ids),
        [row[: len(x)].tolist() for row, x in zip(batch.sampled, ids, strict=True)],
        {},
        None,
        None,
    ]
    measured = {id(LEARNER): logprobs, id(SAMPLER): batch.old, id(REFERENCE): batch.reference}
    width = max(map(len, ids))
    arguments = SimpleNamespace(
        delta=None,
        use_bias_correction_kl=False,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing_kwargs=None,
        per_device_train_batch_size=len(ids),
    )
    for name in [name for name in settings if hasattr(arguments, name)]:
        setattr(arguments, name, settings.pop(name))
    attributes = {
        "args": arguments,
        "ref_model": REFERENCE,
        "_generate": lambda prompts: samples if kind is grpo_trainer.GRPOTrainer else (samples[0], ids, samples[3]),
        "_get_per_token_logps_and_entropies": lambda model, *_, **__: (
            measured[id(model)][:, :width],
            entropy[:, :width],
            None,
        ),
        "_calculate_rewards": lambda *_: batch.scores[:, None],
        "reward_weights": torch.ones(1, dtype=batch.scores.dtype),
        "num_generations": batch.group_size,
        "_tokenizer": SimpleNamespace(pad_token_id=0, eos_token_id=1),
        "processing_class": SimpleNamespace(batch_decode=lambda x, **_: [""] * len(x)),
        "_logs": defaultdict(list),
    }
    return trainer(kind, **(dict(SWITCHED_OFF) | attributes | settings))


SWITCHED_OFF: dict[str, Any] = {
    "environment_factories": None,
    "environments": None,
    "tools": None,
    "pad_to_multiple_of": None,
    "mask_truncated_completions": False,
    "reward_func_names": [],
    "_pending_extra_logs": {},
    "_pending_metrics": {},
    "log_multimodal": False,
    "multi_objective_aggregation": "sum_then_normalize",
    "scale_rewards": "group",
    "reward_clip_range": None,
    "normalize_advantages": False,
    "num_iterations": 1,
    "current_gradient_accumulation_steps": 1,
    "use_vllm": False,
    "vllm_importance_sampling_correction": False,
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "_entropy_bonus_enabled": False,
    "use_adaptive_entropy": False,
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "beta": 0.0,
    "max_completion_length": LONGEST,
}
"""What GRPO and RLOO read, everything off that can be."""


@dataclass(frozen=True)
class Outcome:
    """A loss and its gradients; those are 0 where the mask is false."""

    loss: Tensor
    by_logprob: Tensor
    """[B, T]."""
    by_entropy: Tensor
    """[B, T]."""
    advantages: Tensor
    """[B] that the loss was made with."""


def outcome(loss: Tensor, logprobs: Tensor, entropy: Tensor, advantages: Tensor) -> Outcome:
    """The gradients of a loss with respect to [B, T]."""
    of_both = torch.autograd.grad(loss, (logprobs, entropy), allow_unused=True, materialize_grads=True)
    return Outcome(loss.detach(), of_both[0], of_both[1], advantages)


def theirs(kind: type, batch: Batch, one_rank: pytest.MonkeyPatch, **settings: Any) -> Outcome:
    """From scores and logprobs to advantages, corrections and loss, by TRL alone."""
    for module in (grpo_trainer, rloo_trainer):
        one_rank.setattr(module, "gather_object", itself)
        one_rank.setattr(module, "gather", itself)
    logprobs, entropy = (x.clone().requires_grad_() for x in (batch.logprobs, batch.entropy))
    made = scorer(kind, batch, logprobs, entropy, **settings)
    with default_dtype(batch.scores.dtype):
        inputs = made._generate_and_score_completions([{"prompt": "?"} for _ in batch.scores])
        # Else it takes the ratio to be 1.
        inputs.setdefault("old_per_token_logps", batch.old[:, : inputs["completion_mask"].shape[1]])
        return outcome(made._compute_loss(LEARNER, inputs), logprobs, entropy, inputs["advantages"])


def ours(algorithm: Algorithm, batch: Batch, advantages: Tensor, kl_coef: float = 0.0) -> Outcome:
    """The loss of one optimizer step, of the recipe's functions and as the learner puts them together."""
    logprobs_BT, entropy_BT = (x.clone().requires_grad_() for x in (batch.logprobs, batch.entropy))
    mask, lengths = batch.mask, batch.lengths
    logprobs, entropy, old, sampled = (x[mask] for x in (logprobs_BT, entropy_BT, batch.old, batch.sampled))
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    by_token = advantages.repeat_interleave(lengths)
    losses, _ = algorithm.loss(logprobs, old, by_token, offsets)
    if algorithm.correction is not None:
        losses = losses * algorithm.correction(old, sampled, offsets)[0]
    if algorithm.entropy_share < 1:
        losses = losses * (entropy >= entropy_threshold(entropy, algorithm.entropy_share))
    if algorithm.off_policy_limit:
        losses = losses * off_policy_sequence_mask(logprobs, sampled, by_token, offsets, algorithm.off_policy_limit)
    if algorithm.kl_estimator is not None:
        losses = losses + kl_coef * kl_estimate(logprobs, batch.reference[mask], algorithm.kl_estimator)
    losses = losses - algorithm.entropy_coef * entropy
    weights = algorithm.token_weights(lengths, LONGEST).to(losses.dtype).repeat_interleave(lengths)
    return outcome((losses * weights).sum(), logprobs_BT, entropy_BT, advantages)


def with_equal_ratio(batch: Batch) -> Batch:
    """The batch before its first update."""
    return replace(batch, logprobs=batch.old)
