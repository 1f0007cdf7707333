"""The parts of `rlhf-dist bench overoptimization`: samples of the start with scores, best of n, and a categorical toy.

`python _best_of_n.py WORK.json` samples and scores in a process of its own, by the product's engine and scorer; what it
writes are scores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_dist.config.load import from_yaml
from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.errors import RunError

if TYPE_CHECKING:  # torch takes seconds to import
    from rlhf_dist.algo.best_of_n import BestOfN

TOY_SIZES = (20, 1_000)
"""Responses of the toy's distribution."""
TOY_SEED = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What the sampling process is given."""

    config: str
    """`config.yaml` of a finished stage."""
    start: str
    """Hugging Face directory to sample from."""
    samples: int
    """Responses to a prompt."""
    prompts: int
    """Held-out prompts."""
    seed: int
    scores: str
    """JSON file to write."""


@dataclass(frozen=True, slots=True)
class ToyRow:
    """Best of n by the gold reward itself on a categorical distribution; everything exact."""

    n: int
    formula: float
    """log n - (n - 1) / n."""
    kl: dict[int, float]
    """Responses of the distribution -> KL(best of n || it), nats."""
    gold: dict[int, float]
    """The same of the expected gold reward, in standard deviations of the start above its mean."""


def best_of_n(scores: Sequence[dict[str, list[float]]]) -> list[BestOfN]:
    """See `best_of_n_curve`; `scores`: proxy and gold of each prompt's samples."""
    import torch

    from rlhf_dist.algo.best_of_n import best_of_n_curve

    proxies, golds = ([torch.tensor(one[name], dtype=torch.float64) for one in scores] for name in ("proxy", "gold"))
    return best_of_n_curve(proxies, golds)


def toy(last: int) -> list[ToyRow]:
    """Best of 1, 2, 4, ... and `last` on distributions of `TOY_SIZES` responses: exact KL beside the formula.

    Probabilities are a softmax of normal logits, gold rewards are normal: drawn once, from a seed. The fewer responses,
    the likelier that two samples are the same one, and the further the KL stays below the formula.
    """
    import torch

    from rlhf_dist.algo.best_of_n import best_of_n_distribution, best_of_n_kl, categorical_kl, sizes

    chance = torch.Generator().manual_seed(TOY_SEED)
    starts = {}
    for size in TOY_SIZES:
        probs = torch.randn(size, generator=chance, dtype=torch.float64).softmax(0)
        rewards = torch.randn(size, generator=chance, dtype=torch.float64)
        mean = (probs * rewards).sum()
        deviation = (probs * (rewards - mean) ** 2).sum().sqrt()
        starts[size] = (probs, (rewards - mean) / deviation)
    rows = []
    for n in sizes(last):
        best = {size: best_of_n_distribution(probs, rewards, n) for size, (probs, rewards) in starts.items()}
        rows.append(
            ToyRow(
                n=n,
                formula=best_of_n_kl(n),
                kl={size: categorical_kl(best[size], probs) for size, (probs, _) in starts.items()},
                gold={size: float((best[size] * rewards).sum()) for size, (_, rewards) in starts.items()},
            )
        )
    return rows


def sample(work: Work) -> list[dict[str, list[float]]]:
    """Samples of the start for held-out prompts, as the stage's training sampled and scored them.

    Returns for each prompt its samples' total reward (`proxy`) and gold reward. Raises RunError for a dropped prompt.
    """
    from rlhf_dist.cluster import actors
    from rlhf_dist.data.stream import held_out
    from rlhf_dist.loop.controller_rules import rules_of
    from rlhf_dist.loop.requests import make_requests
    from rlhf_dist.planning.placement import local_machine, place
    from rlhf_dist.rollout.vllm_engine import VllmEngine
    from rlhf_dist.rollout.worker import RolloutWorker, Submit
    from rlhf_dist.scoring.reward_model import RewardModel
    from rlhf_dist.scoring.scorer import Scorer
    from rlhf_dist.types import Answered, Unanswered

    config = from_yaml(Path(work.config).read_text(encoding="utf-8"), work.config)
    placement = place(config, local_machine(), "eval")
    engine = VllmEngine(
        Path(work.start),
        config.rollout,
        dtype=config.model.dtype,
        device=placement.device,
        threads=placement.rollout_threads,
        name="sampler",
        chat=config.data.chat,
        special_texts=any(reward.keep_special_tokens for reward in config.scoring.rewards.values()),
    )
    worker = RolloutWorker("sampler", engine, chat=config.data.chat, max_prompt_tokens=config.rollout.max_prompt_tokens)

    def reward_model(name: str, spec: RewardSpec) -> Any:
        return RewardModel(name, spec, config.scoring, actors.model_setting(config, work.start, placement.device))

    scorer = Scorer(config.scoring, reward_model)
    found = {}
    prompts = held_out(config.data, work.prompts)
    requests = make_requests(prompts, "eval", work.samples, rules_of(config, False, False).sampling, work.seed)
    worker.post(0, Submit(tuple(requests)))
    while len(found) < len(requests):
        worker.turn()
        for event in worker.events(0.0):
            if isinstance(event, Unanswered):
                drop = event.drop
                raise RunError(f"held-out prompt {drop.uid} gave no samples ({drop.reason}: {drop.detail})")
            if isinstance(event, Answered):
                scores = scorer.score(event.body.place)
                gold = scores.components[config.scoring.gold]
                found[event.head.uid] = {"proxy": scores.total.tolist(), "gold": gold.tolist()}
    scorer.close()
    return [found[prompt.uid] for prompt in prompts]


def write_work(work: Work, path: Path) -> None:
    """For the sampling process."""
    path.write_text(json.dumps(asdict(work)), encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """The work's file."""
    work = Work(**json.loads(Path(argv[0]).read_text(encoding="utf-8")))
    Path(work.scores).write_text(json.dumps(sample(work)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
