"""One rank of training on preferences in a process of its own: `prefer_ranks.py RANK WORLD PORT MODEL OTHER FOLDER`.

Trains on fixed judgements on real DeepSpeed and leaves in FOLDER what the tests compare: `WORLD-RANK.pt`, a dict of
results by (ZeRO stage, method).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from rlhf_dist.config.prefer_keys import PREFER_METHODS
from rlhf_dist.config.schema import LearnerConfig, ModelConfig, OptimizerConfig, PreferConfig
from rlhf_dist.data.judgement_rows import Comparison, Judgement, Pair, Rating
from rlhf_dist.data.packing import plan
from rlhf_dist.learner.deepspeed_engine import init_process_group
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.learner.prefer_learner import PreferLearner
from rlhf_dist.learner.preference_learner import tokenize_judgement
from rlhf_dist.learner.reference_values import FrozenReference
from rlhf_dist.models.hf import load_tokenizer
from rlhf_dist.types import Message

# eps 1 makes Adam's steps all but lr x gradient, so that equal weights mean equal gradients, small ones too.
OPTIMIZER = OptimizerConfig(lr=0.5, eps=1.0, warmup_steps=0, weight_decay=0.01, max_grad_norm=0.5)
CASES = [(0, "dpo"), (3, "dpo"), (2, "ipo"), (3, "kto"), (0, "orpo"), (1, "simpo")]
CHUNK_TOKENS = 8
"""Ranks need a different number of logprob chunks in the same pass."""


def comparison(place: int, *responses: str) -> Comparison:
    """Every response is better than all that come after it."""
    pairs = [Pair(i, j, 0.0) for i in range(len(responses)) for j in range(i + 1, len(responses))]
    return Comparison(f"here:{place}", (Message("user", f"say {'it' * place}"),), responses, tuple(pairs))


PAIRS: list[Judgement] = [
    comparison(1, "kind words are long", "no"),
    comparison(2, "a", "bb bb", "ccc", "dd d d"),
    comparison(3, "yes please do", "never at all"),
    comparison(4, "sun", "rain and wind and hail"),
    comparison(5, "one two three four five six", "six"),
]
SINGLES: list[Judgement] = [
    Rating("here:6", (Message("user", "more"),), "and more", 1.0, "logistic"),
    Rating("here:7", (Message("user", "and less"),), "less", 0.0, "logistic"),
]


def config_of(method: str) -> PreferConfig:
    keys: dict[str, Any] = {"desirable_weight": 1.5, "beta": 0.7} if method == "kto" else {"beta": 0.4}
    return PreferConfig(method=method, steps=3, batch_size=len(judgements(method)), optimizer=OPTIMIZER, **keys)  # type: ignore[arg-type]


def judgements(method: str) -> list[Judgement]:
    return [*PAIRS, *SINGLES] if method == "kto" else PAIRS


class Trainer:
    """A learner with its judgements; in one micro-batch, or in 4 shared by the ranks."""

    def __init__(self, model: Path, stage: int, method: str, world: int, reference: str = "") -> None:
        """`reference`: "start", a model, or none, as after a resume."""
        learner = LearnerConfig(zero_stage=stage, ranks=world, logprob_chunk_tokens=CHUNK_TOKENS)
        self.engine = ModelEngine(model, ModelConfig(), learner, OPTIMIZER, device="cpu", bucket_mib=64)
        tokenizer, used = load_tokenizer(model), judgements(method)
        frozen = FrozenReference(reference, ModelConfig(), learner, device="cpu")
        own = (lambda packed: self.engine.logprobs(packed, 1.0)) if reference == "start" else frozen
        self.learner = PreferLearner(
            self.engine,
            config_of(method),
            used,
            used,
            tokenizer,
            chat=True,
            max_tokens=64,
            seed=0,
            shares=world,
            micro_batch_tokens=budget(tokenizer, used, world),
            reference=own if reference and PREFER_METHODS[method].reference else None,
        )
        if reference and PREFER_METHODS[method].reference:
            assert self.learner.read_reference() == 0

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.weights()}


def budget(tokenizer: Any, used: list[Judgement], world: int) -> int:
    """Micro-batch tokens that make 4 micro-batches on one rank and 2 on each of two."""
    lengths = torch.tensor([tokenize_judgement(tokenizer, judgement, True).tokens for judgement in used]).numpy()
    return next(b for b in range(10, 1000) if len(plan(lengths, world, b)[0]) == 4 // world)


def run_case(stage: int, method: str, world: int, model: Path, other: Path, folder: Path) -> dict[str, Any]:
    """Three steps, and a checkpoint after the second from which another learner makes the third."""
    trainer = Trainer(model, stage, method, world, str(other) if (stage, method) == (3, "dpo") else "start")
    found: dict[str, Any] = {"start": trainer.weights(), "before": trainer.learner.evaluate()}
    found["metrics"] = trainer.learner.train_step(1)
    found["one"] = trainer.weights()
    trainer.learner.train_step(2)
    found["two"] = trainer.weights()
    checkpoint = folder / f"checkpoint-{world}-{stage}-{method}"
    checkpoint.mkdir(exist_ok=True)
    trainer.engine.save(checkpoint)
    trainer.learner.save_reference(checkpoint)
    torch.distributed.barrier()
    trainer.learner.train_step(3)
    found |= {"three": trainer.weights(), "after": trainer.learner.evaluate()}
    again = Trainer(checkpoint / "hf", stage, method, world)
    again.engine.restore(checkpoint)
    again.learner.restore_reference(checkpoint)
    again.learner.train_step(3)
    found |= {"three_restored": again.weights(), "after_restored": again.learner.evaluate()}
    trainer.engine.close()
    again.engine.close()
    return found


class Plain:
    """The same in plain torch: rows one by one, losses written out, AdamW."""

    def __init__(self, model: Path, other: Path, method: str, moved: bool) -> None:
        self.config = config_of(method)
        self.policy: Any = AutoModelForCausalLM.from_pretrained(model)
        self.reference: Any = AutoModelForCausalLM.from_pretrained(other if moved else model)
        self.elements = [tokenize_judgement(load_tokenizer(model), each, True) for each in judgements(method)]
        self.rows = [[(row.tokens.tolist(), row.length) for row in element.rows] for element in self.elements]

    def sum(self, model: Any, tokens: list[int], length: int) -> torch.Tensor:
        ids = torch.tensor([tokens])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return logprobs[-length:].sum()

    def point(self) -> float:
        """KTO's: each prompt with the first response to the next one."""
        ratios = []
        for number, ((tokens, length), *_) in enumerate(self.rows):
            answer, answer_length = self.rows[(number + 1) % len(self.rows)][0]
            row = (tokens[:-length] + answer[-answer_length:], answer_length)
            ratios.append(float(self.sum(self.policy, *row) - self.sum(self.reference, *row)))
        return max(0.0, sum(ratios) / len(ratios))

    @torch.enable_grad()
    def loss(self) -> torch.Tensor:
        config, method, losses = self.config, self.config.method, []
        point = self.point() if method == "kto" else 0.0
        nll, count = torch.tensor(0.0), 0
        for element, rows in zip(self.elements, self.rows, strict=True):
            p = torch.stack([self.sum(self.policy, *row) for row in rows])
            with torch.no_grad():
                r = torch.stack([self.sum(self.reference, *row) for row in rows])
            n = torch.tensor([float(length) for _, length in rows])
            good, bad = config.desirable_weight, config.undesirable_weight
            likes = good * (1 - torch.sigmoid(config.beta * (p - r - point)))
            dislikes = bad * (1 - torch.sigmoid(config.beta * (point - (p - r))))
            if isinstance(element.judgement, Rating):
                losses.append((likes if element.judgement.value else dislikes)[0])
                continue
            nll, count = nll - p[0], count + int(n[0])  # the first of a ranking is the best
            odds = p / n - torch.log1p(-torch.exp(p / n))
            each = []
            for pair in element.judgement.pairs:
                b, w = pair.better, pair.worse
                each.append(
                    {
                        "dpo": -logsigmoid(config.beta * (p[b] - r[b] - p[w] + r[w])),
                        "ipo": ((p[b] - r[b]) / n[b] - (p[w] - r[w]) / n[w] - 1 / (2 * config.beta)) ** 2,
                        "kto": (likes[b] + dislikes[w]) / 2,
                        "orpo": -config.beta * logsigmoid(odds[b] - odds[w]),
                        "simpo": -logsigmoid(config.beta * (p[b] / n[b] - p[w] / n[w]) - config.gamma),
                    }[method]
                )
            losses.append(torch.stack(each).mean())
        return torch.stack(losses).mean() + (nll / count if method == "orpo" else 0.0)

    def run(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=OPTIMIZER.lr, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
        )  # fmt: skip
        found: dict[str, Any] = {}
        for name in ("one", "two", "three"):
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), OPTIMIZER.max_grad_norm))
            optimizer.step()
            weights = {key: value.detach().clone() for key, value in self.policy.named_parameters()}
            found |= {name: weights, f"{name}_loss": float(loss.detach()), f"{name}_norm": norm}
        return found | {"after_loss": float(self.loss().detach())}


def main() -> None:
    rank, world, port = (int(word) for word in sys.argv[1:4])
    model, other, folder = (Path(word) for word in sys.argv[4:7])
    init_process_group(rank, world, "127.0.0.1", port, device="cpu", threads=1, timeout_s=120.0)
    found: dict[Any, Any] = {case: run_case(*case, world, model, other, folder) for case in CASES}
    if world == 1:
        moved = {case: case == (3, "dpo") for case in CASES}
        found |= {("plain", case): Plain(model, other, case[1], moved[case]).run() for case in CASES}
    torch.save(found, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main()
