"""What is said where the ranks that resume differ; `test_learner_ranks.py` has real ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf_dist.errors import DataError, RlhfError, RunError
from rlhf_dist.learner.agreement import Compared, Held, require_agreement

FOLDER = Path("runs/grpo/checkpoints/step-40")
WAY_OUT = "resume from another checkpoint with --resume-from step-N"


def held(rank: int, weights: str = "a" * 32, foreign: int = 0, unsound: int = 0) -> Held:
    compared = {f"optimizer-{rank}.safetensors": Compared(foreign, unsound, 12_000)}
    return Held(compared, {"optimizer steps": "0" * 32, "weights": weights})


@pytest.mark.parametrize(
    ("ranks", "kind", "message"),
    [
        (
            [held(0), held(1, foreign=3)],
            DataError,
            f"{FOLDER}: the float32 weights in optimizer-1.safetensors (3 of 12,000 differ) are not those in hf; the "
            f"files are damaged or of different steps; {WAY_OUT}",
        ),
        (
            [held(0, foreign=12_000), held(1, foreign=12_000)],
            DataError,
            f"{FOLDER}: the float32 weights in optimizer-0.safetensors (12,000 of 12,000 differ) and "
            "optimizer-1.safetensors (12,000 of 12,000 differ) are not those in hf; the files are damaged or of "
            f"different steps; {WAY_OUT}",
        ),
        (
            [held(0, unsound=12_000), held(1)],
            DataError,
            f"{FOLDER}: weights in optimizer-0.safetensors (12,000 of 12,000) are NaN or infinite, as they are in hf: "
            f"the training had gone wrong before they were saved; {WAY_OUT}",
        ),
        (
            [held(0), held(1, "b" * 32)],
            RunError,
            f"{FOLDER}: the ranks that resumed do not have the same weights (hashes: rank 0: aaaaaaaa; rank 1: "
            f"bbbbbbbb). Resume again; if the ranks differ again, {WAY_OUT}",
        ),
        (
            [held(0), held(1), held(2, "b" * 32), held(3)],
            RunError,
            f"{FOLDER}: the ranks that resumed do not have the same weights (hashes: ranks 0, 1, 3: aaaaaaaa; rank 2: "
            f"bbbbbbbb). Resume again; if the ranks differ again, {WAY_OUT}",
        ),
    ],
)
def test_ranks_that_differ_are_named(ranks: Sequence[Held], kind: type[RlhfError], message: str) -> None:
    with pytest.raises(kind) as caught:
        require_agreement(FOLDER, ranks)
    assert str(caught.value) == message


@pytest.mark.parametrize("count", [1, 2, 5])
def test_ranks_that_agree_go_on(count: int) -> None:
    require_agreement(FOLDER, [held(rank) for rank in range(count)])
