"""One rank of reward model training in a process of its own: `python preference_ranks.py RANK WORLD PORT MODEL FOLDER`.

Trains on fixed judgements on real DeepSpeed and leaves in FOLDER what the tests compare: `WORLD-RANK.pt`, a dict of
results by (ZeRO stage, what).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlhf_dist.config.schema import LearnerConfig, ModelConfig, OptimizerConfig, RewardConfig
from rlhf_dist.data.judgement_rows import Comparison, Judgement, Pair, Rating
from rlhf_dist.data.packing import plan
from rlhf_dist.learner.deepspeed_engine import init_process_group
from rlhf_dist.learner.micro_batch_rows import Packed, pack_rows
from rlhf_dist.learner.preference_learner import PreferenceLearner, tokenize_judgement
from rlhf_dist.learner.scalar_engine import ScalarEngine, ScalarEngineWithLM
from rlhf_dist.models.hf import load_tokenizer
from rlhf_dist.models.scalar import PackedScalar, PackedScalarWithLM, ScoreScale, load_lm_head, load_scalar
from rlhf_dist.types import Message

# eps 1 makes Adam's steps all but lr x gradient, so that equal weights mean equal gradients, small ones too.
OPTIMIZER = OptimizerConfig(lr=0.5, eps=1.0, warmup_steps=0, weight_decay=0.01, max_grad_norm=0.5)
CONFIG = RewardConfig(steps=3, batch_size=6, optimizer=OPTIMIZER)
QUESTION = (Message("user", "say it"),)
CHUNK_TOKENS = 8
"""Ranks need a different number of logprob chunks in the same pass."""


def comparison(place: int, *responses: str, margin: float = 0.0) -> Comparison:
    """Every response is better than all that come after it."""
    pairs = [Pair(i, j, margin) for i in range(len(responses)) for j in range(i + 1, len(responses))]
    return Comparison(f"here:{place}", QUESTION, responses, tuple(pairs))


COMPARISONS: list[Judgement] = [
    comparison(1, "kind words are long", "no"),
    comparison(2, "a", "bb bb", "ccc", "dd d d"),
    comparison(3, "yes please do", "never at all", margin=0.7),
    comparison(4, "sun", "rain and wind and hail"),
    comparison(5, "one two three four five six", "six"),
    comparison(6, "up", "down", "left"),
]
RATINGS: dict[str, list[Judgement]] = {
    kind: [
        Rating(f"here:{i}", QUESTION, "abcdefg"[: i + 1] * (i + 1), float(value), kind)
        for i, value in enumerate((1, 0, 1, 1, 0, 0))
    ]
    for kind in ("regression", "logistic")
}


class NotingEngine(ScalarEngineWithLM):
    """Notes how many chunks each pass needs."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.chunks: list[int] = []

    def scores_and_logprobs(self, packed: Packed, learnt: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = int(packed.offsets.diff()[torch.tensor(learnt)].sum())
        self.chunks.append(-(-tokens // CHUNK_TOKENS))
        return super().scores_and_logprobs(packed, learnt)


class Trainer:
    """A learner with its judgements; in one micro-batch, or in 4 shared by the ranks."""

    def __init__(
        self,
        model: Path,
        stage: int,
        world: int,
        *,
        lm: float = 0.0,
        dtype: str = "float32",
        judgements: list[Judgement] = COMPARISONS,
        optimizer: OptimizerConfig = OPTIMIZER,
    ) -> None:
        learner = LearnerConfig(zero_stage=stage, ranks=world, logprob_chunk_tokens=CHUNK_TOKENS)
        engine = NotingEngine if lm else ScalarEngine
        self.engine = engine(
            model,
            ModelConfig(dtype=dtype),  # type: ignore[arg-type]
            learner,
            optimizer,
            device="cpu",
            normalized=False,
        )
        tokenizer = load_tokenizer(model)
        self.learner = PreferenceLearner(
            self.engine,
            replace(CONFIG, lm_coef=lm, optimizer=optimizer),
            judgements,
            judgements,
            tokenizer,
            chat=True,
            max_tokens=64,
            seed=0,
            shares=world,
            micro_batch_tokens=budget(tokenizer, judgements, world),
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.weights()}


def budget(tokenizer: Any, judgements: list[Judgement], world: int) -> int:
    """Micro-batch tokens that make 4 micro-batches on one rank and 2 on each of two."""
    lengths = torch.tensor([tokenize_judgement(tokenizer, judgement, True).tokens for judgement in judgements]).numpy()
    return next(b for b in range(10, 1000) if len(plan(lengths, world, b)[0]) == 4 // world)


def run_stage(stage: int, lm: float, world: int, model: Path, folder: Path) -> dict[str, Any]:
    """Three steps, and a checkpoint after the second from which another engine makes the third."""
    trainer = Trainer(model, stage, world, lm=lm)
    found: dict[str, Any] = {"start": trainer.weights()}
    found["metrics"] = trainer.learner.train_step(1)
    found["one"] = trainer.weights()
    trainer.learner.train_step(2)
    found["two"], found["held_out"] = trainer.weights(), trainer.learner.evaluate()
    checkpoint = folder / f"checkpoint-{world}-{stage}-{lm}"
    checkpoint.mkdir(exist_ok=True)
    trainer.engine.save(checkpoint, ScoreScale(0.5, 2.0))
    torch.distributed.barrier()
    found["norm"] = trainer.learner.train_step(3).values()["learner/grad_norm"]
    found["three"] = trainer.weights()
    if isinstance(trainer.engine, NotingEngine):
        found["chunks"] = trainer.engine.chunks
    again = Trainer(checkpoint / "hf", stage, world, lm=lm)
    again.engine.restore(checkpoint)
    again.learner.train_step(3)
    found["three_restored"] = again.weights()
    fresh = Trainer(checkpoint / "hf", stage, world, lm=lm)
    fresh.learner.train_step(3)
    found["three_without_restore"] = fresh.weights()
    torch.distributed.barrier()
    # The first checkpoint of a resumed run takes the place of the one that it came from.
    removed, saved = checkpoint.with_name(f"removed-{checkpoint.name}"), folder / f"second-{checkpoint.name}"
    if again.engine.rank == 0:
        saved.mkdir()
        checkpoint.rename(removed)
    torch.distributed.barrier()
    again.engine.save(saved)
    torch.distributed.barrier()
    if again.engine.rank == 0:
        removed.rename(checkpoint)
    return found


def plain(model: Path, lm: float) -> dict[str, Any]:
    """The same three steps in plain torch: one micro-batch, losses written out, AdamW."""
    loaded, head = load_scalar(model, "float32", "segmented"), load_lm_head(model, "float32")
    scalar = PackedScalarWithLM(loaded, head) if lm else PackedScalar(loaded)
    optimizer = torch.optim.AdamW(
        scalar.parameters(), lr=OPTIMIZER.lr, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
    )  # fmt: skip
    elements = [tokenize_judgement(load_tokenizer(model), judgement, True) for judgement in COMPARISONS]
    found: dict[str, Any] = {}
    for name in ("one", "two", "three"):
        losses, nll, count = [], torch.tensor(0.0), 0
        for element in elements:
            packed = pack_rows(element.rows, torch.device("cpu"))
            last, first = packed.cu_seqlens[1:].long() - 1, element.rows[0].length
            if isinstance(scalar, PackedScalarWithLM):
                scores, logprobs = scalar(
                    packed.tokens, packed.cu_seqlens, last, packed.predict[:first], packed.targets[:first], 999
                )
                nll, count = nll - logprobs.sum(), count + first
            else:
                scores = scalar(packed.tokens, packed.cu_seqlens, last)
            assert isinstance(element.judgement, Comparison)
            pairs = element.judgement.pairs
            each = [-torch.sigmoid(scores[p.better] - scores[p.worse] - p.margin).log() for p in pairs]
            losses.append(torch.stack(each).mean())
        optimizer.zero_grad()
        (torch.stack(losses).mean() + lm * nll / max(count, 1)).backward()
        found["norm"] = float(torch.nn.utils.clip_grad_norm_(scalar.parameters(), OPTIMIZER.max_grad_norm))
        optimizer.step()
        weights = {key: value.detach().clone() for key, value in scalar.model.named_parameters()}
        found |= {name: weights, f"{name}_loss": float(torch.stack(losses).mean().detach())}
    return found


def run_bfloat16(stage: int, world: int, model: Path) -> dict[str, Any]:
    trainer = Trainer(model, stage, world, dtype="bfloat16")
    found: dict[str, Any] = {"start": trainer.weights()}
    trainer.learner.train_step(1)
    trainer.learner.train_step(2)
    return found | {"two": trainer.weights(), "held_out": trainer.learner.evaluate()}


def main() -> None:
    rank, world, port = (int(word) for word in sys.argv[1:4])
    model, folder = Path(sys.argv[4]), Path(sys.argv[5])
    init_process_group(rank, world, "127.0.0.1", port, device="cpu", threads=1, timeout_s=120.0)
    found: dict[Any, Any] = {
        (stage, lm): run_stage(stage, lm, world, model, folder)
        for stage, lm in ((0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0), (0, 0.3), (3, 0.3))
    }
    for kind, judgements in RATINGS.items():
        trainer = Trainer(model, 0, world, judgements=judgements, optimizer=replace(OPTIMIZER, lr=0.05))
        losses = [trainer.learner.train_step(step).values()["reward_model/loss"] for step in (1, 2, 3)]
        found[kind] = {"losses": losses, "held_out": trainer.learner.evaluate()}
    if world == 1:
        found |= {("plain", lm): plain(model, lm) for lm in (0.0, 0.3)}
    else:
        found |= {("bfloat16", stage): run_bfloat16(stage, world, model) for stage in (1, 3)}
    torch.save(found, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main()
