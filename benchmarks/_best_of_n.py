"""The parts of `rlhf-dist bench overoptimization`: samples of the start with scores, best of n, and a categorical toy.

`python _best_of_n.py WORK.json` samples and scores in a process of its own, by the product's engine and scorer; what it
writes are scores.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_dist.config.load import from_yaml
from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.errors import RunError

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
class BestOfN:
    """What the proxy's favourite among n samples of the start is worth."""

    n: int
    """Samples that it is chosen from."""
    kl: float
    """log n - (n - 1) / n: KL of that policy to the start, nats per response."""
    proxy: float
    """Expected proxy reward, mean over prompts."""
    gold: float
    """Expected gold reward, the same."""
    gold_error: float
    """Standard error of the latter over prompts; 0 for a single one."""


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


def powers(last: int) -> Iterator[int]:
    """1, 2, 4, ... up to `last`."""
    n = 1
    while n <= last:
        yield n
        n *= 2


def best_of_n(scores: Sequence[dict[str, list[float]]]) -> list[BestOfN]:
    """For n = 1, 2, 4, ... up to the samples of a prompt; `scores`: proxy and gold of each prompt's samples."""
    import torch

    from rlhf_dist.algo.best_of_n import best_of_n_estimate, best_of_n_kl

    tensors = [{name: torch.tensor(values, dtype=torch.float64) for name, values in one.items()} for one in scores]
    found = []
    for n in powers(min(len(one["proxy"]) for one in tensors)):
        proxies = [best_of_n_estimate(one["proxy"], one["proxy"], n) for one in tensors]
        golds = [best_of_n_estimate(one["proxy"], one["gold"], n) for one in tensors]
        mean = math.fsum(golds) / len(golds)
        spread = math.fsum((gold - mean) ** 2 for gold in golds) / max(1, len(golds) - 1)
        found.append(
            BestOfN(
                n=n,
                kl=best_of_n_kl(n),
                proxy=math.fsum(proxies) / len(proxies),
                gold=mean,
                gold_error=math.sqrt(spread / len(golds)),
            )
        )
    return found


def toy(last: int) -> list[ToyRow]:
    """Best of 1, 2, 4, ... `last` on distributions of `TOY_SIZES` responses: exact KL beside the formula.

    Probabilities are a softmax of normal logits, gold rewards are normal: drawn once, from a seed. The fewer responses,
    the likelier that two samples are the same one, and the further the KL stays below the formula.
    """
    import torch

    from rlhf_dist.algo.best_of_n import best_of_n_distribution, best_of_n_kl, categorical_kl

    chance = torch.Generator().manual_seed(TOY_SEED)
    starts = {}
    for size in TOY_SIZES:
        probs = torch.randn(size, generator=chance, dtype=torch.float64).softmax(0)
        rewards = torch.randn(size, generator=chance, dtype=torch.float64)
        mean = (probs * rewards).sum()
        deviation = (probs * (rewards - mean) ** 2).sum().sqrt()
        starts[size] = (probs, (rewards - mean) / deviation)
    rows = []
    for n in powers(last):
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
