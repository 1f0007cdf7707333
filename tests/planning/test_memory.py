"""The memory of a learner rank: ZeRO's published arithmetic, worked by hand, and how it moves with the config."""

from __future__ import annotations

import pytest

from rlhf_dist.algo.logprobs import BLOCK_ELEMENTS
from rlhf_dist.config.schema import LearnerConfig
from rlhf_dist.planning.memory import (
    LOGITS_BLOCK,
    activations,
    gradients,
    held_by_rank,
    learner_memory,
    logits,
    of_a_layer,
)
from rlhf_dist.planning.shape import gated

SHAPE = gated(2, 8, 16, 2, 1, 100, tied=True)
LARGE = gated(32, 4096, 14336, 32, 8, 128256, tied=False)
"""Llama 3.1 8B."""


@pytest.mark.parametrize(
    ("stage", "ranks", "bytes_each"),
    [
        # Weights 2, and by arXiv:1910.02054 12 of masters and moments, shared from ZeRO 1 on; float32 sums 4.
        (1, 1, 2 + 12 + 4),
        (1, 4, 2 + 12 / 4 + 4),
        (2, 4, 2 + 12 / 4),
        (3, 4, 2 / 4 + 12 / 4 + 4 / 4),
    ],
)
def test_zero_shares_what_it_says_in_bfloat16(stage: int, ranks: int, bytes_each: float) -> None:
    held = held_by_rank(LARGE, stage, "bfloat16", ranks)
    bucket = held.pop("reduce bucket", 0)
    assert sum(held.values()) == pytest.approx(bytes_each * LARGE.parameters, rel=1e-6)
    assert bucket == (1_000_000_000 if stage == 3 else 0), "DeepSpeed's own, of 5e8 elements"


def test_without_zero_a_rank_holds_all_in_float32() -> None:
    assert sum(held_by_rank(SHAPE, 0, "float32", 1).values()) == 12 * SHAPE.parameters
    assert gradients(SHAPE, 0, "float32", 1) == 4 * SHAPE.parameters + 8 * 800


def test_a_layer_keeps_what_was_counted_by_hand() -> None:
    """Hidden 8, 2 heads of 4, 1 for keys and values, 16 wide; bfloat16."""
    norms, feed_forward = 2 * (8 * 4 + 2 * 8 * 2), 4 * 16 * 2
    on_a_gpu, on_a_cpu = (3 * 8 + 2 * 4) * 2, (3 * 8 + 2 * 8) * 2
    assert of_a_layer(SHAPE, "bfloat16", "cuda") == norms + on_a_gpu + feed_forward
    assert of_a_layer(SHAPE, "bfloat16", "cpu") == norms + on_a_cpu + feed_forward


def test_logits_are_worked_on_in_the_blocks_that_are_planned_for() -> None:
    """The plan imports no torch, so the number stands twice."""
    assert LOGITS_BLOCK == BLOCK_ELEMENTS


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all() -> None:
    one = of_a_layer(LARGE, "bfloat16", "cuda") * 1000
    assert activations(LARGE, "bfloat16", 1000, False, "cuda") == 32 * one
    assert activations(LARGE, "bfloat16", 1000, True, "cuda") == one + 32 * 1000 * 4096 * 2


def test_a_sequence_longer_than_a_micro_batch_goes_alone() -> None:
    learner = LearnerConfig(zero_stage=3, micro_batch_tokens=1000, logprob_chunk_tokens=500)

    def found(sequence: int) -> dict[str, int]:
        return dict(learner_memory(LARGE, learner, "bfloat16", 8, True, "cuda", sequence).parts)

    assert found(400) == found(1000)
    assert found(2000)["activations"] == 2 * found(1000)["activations"]
    assert found(2000)["logits"] == found(1000)["logits"] == logits(LARGE, "bfloat16", 500)
    assert found(400)["gathered weights"] == 2_000_000_000


def test_ranks_that_share_rows_hold_their_part_of_the_activations_and_none_of_an_offloaded_optimizer() -> None:
    def memory(**changes: object) -> dict[str, int]:
        learner = LearnerConfig(zero_stage=3, ranks=8, micro_batch_tokens=8192, **changes)  # type: ignore[arg-type]
        return dict(learner_memory(LARGE, learner, "bfloat16", 8, False, "cuda", 4096).parts)

    alone, shared, offloaded = memory(), memory(sequence_parallel=4), memory(offload="optimizer")
    assert shared["activations"] * 4 == alone["activations"]
    assert {name for name in alone if alone[name] != shared[name]} == {"activations"}
    assert alone["optimizer"] > 0 == offloaded["optimizer"]
