"""What the policy-gradient methods do, once more and by hand: plain torch and transformers, one response at a time.

No packing, no micro-batches, no ranks, and none of the project's own arithmetic: from the tokens, logprobs and scores
of a step to the weights after it, each formula stands here as its paper has it. `AlgoConfig` is read for its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_dist.config.schema import AlgoConfig, CorrectionConfig, KLConfig, OptimizerConfig

TEMPERATURE = 0.9
LONGEST = 20
"""Tokens that a response may have."""
STEPS = 3
SIZES = {1: (4, 5, 2), 2: (3, 6, 1), 3: (5, 2, 3)}
"""Step -> samples of each group. Of two updates a step the first has two groups, the second the last one alone."""
GREEDY = {1: (1.5, 0.5, 3.0), 2: (1.0, 2.5, 0.0), 3: (2.0, 1.0, 0.5)}
"""Step -> score of a greedy response to each group's prompt."""
# eps 1 makes Adam's step all but lr x gradient, so that equal weights mean equal gradients, small ones too.
OPTIMIZER = OptimizerConfig(lr=0.01, eps=1.0, warmup_steps=4, weight_decay=0.4, max_grad_norm=3.0)


@dataclass(frozen=True)
class Method:
    """How a method is run."""

    algo: AlgoConfig
    updates: int = 2
    epochs: int = 2
    stages: tuple[int, ...] = (2, 3)
    """Of ZeRO. One is enough for what only the advantages tell from another method: they are made before the cut."""


# The bounds are such that every one of them is met, and no token so close to one that rounding would decide.
METHODS: dict[str, Method] = {
    "reinforce, truncated by sequence": Method(
        AlgoConfig(name="reinforce", correction=CorrectionConfig("sequence", "truncate", 0.2, 5.0)),
        updates=1,
        epochs=1,
        stages=(3,),
    ),
    "opo, sequence mean, geometric truncation": Method(
        AlgoConfig(
            name="opo", aggregation="sequence_mean", correction=CorrectionConfig("geometric", "truncate", 0.75, 1.25)
        ),
        updates=1,
        epochs=1,
        stages=(3,),
    ),
    "remax, token mask": Method(
        AlgoConfig(name="remax", correction=CorrectionConfig("token", "mask", 0.6, 1.8)),
        updates=1,
        epochs=1,
        stages=(3,),
    ),
    "rloo, truncated by token": Method(
        AlgoConfig(name="rloo", correction=CorrectionConfig("token", "truncate", 0.6, 1.4)), updates=1, epochs=1
    ),
    "grpo, dual clip, KL and entropy in the loss": Method(
        AlgoConfig(
            name="grpo",
            aggregation="sequence_mean",
            clip_low=0.03,
            clip_high=0.04,
            dual_clip=1.05,
            kl=KLConfig("loss", 0.2, "k3"),
            entropy_coef=0.1,
        )
    ),
    "dapo, clip higher, half of the tokens": Method(
        AlgoConfig(name="dapo", clip_low=0.03, clip_high=0.06, entropy_share=0.5)
    ),
    "gspo, geometric mask": Method(
        AlgoConfig(
            name="gspo", clip_low=0.03, clip_high=0.04, correction=CorrectionConfig("geometric", "mask", 0.7, 1.3)
        )
    ),
    "cispo, sequence mask": Method(
        AlgoConfig(
            name="cispo", clip_low=0.02, clip_high=0.03, correction=CorrectionConfig("sequence", "mask", 0.05, 20.0)
        )
    ),
    "dr_grpo, sequence sum, token mask, off-policy limit": Method(
        AlgoConfig(
            name="dr_grpo",
            aggregation="sequence_sum",
            clip_low=0.02,
            clip_high=0.02,
            off_policy_limit=0.15,
            correction=CorrectionConfig("token", "mask", 0.5, 2.0),
        )
    ),
    "reinforce_pp_baseline": Method(
        AlgoConfig(name="reinforce_pp_baseline", clip_low=0.005, clip_high=0.005), epochs=1, stages=(3,)
    ),
    "reinforce_pp, KL in the reward": Method(
        AlgoConfig(
            name="reinforce_pp", gamma=0.9, advantage_clip=1.2, clip_low=0.02, clip_high=0.02, kl=KLConfig(coef=0.3)
        )
    ),
}


@dataclass(frozen=True)
class Sample:
    """A response, and what is known of it when a step begins."""

    group: int
    prompt: list[int]
    response: list[int]
    sampled: list[float]
    """The sampler's logprobs; not the learner's, which are about -4.8."""
    reference: list[float]
    """The reference's."""
    score: float
    greedy: float
    """Of a greedy response to the same prompt."""


def samples_of(step: int) -> list[Sample]:
    """Group after group; 1 to 20 tokens, scores that are equal here and there."""
    chance = np.random.default_rng([3, step])
    made = []
    for group, count in enumerate(SIZES[step]):
        prompt = chance.integers(0, 100, size=chance.integers(1, 12)).tolist()
        for _ in range(count):
            length = int(chance.integers(1, LONGEST + 1))
            near = -4.8 + 0.3 * chance.normal()
            made.append(
                Sample(
                    group,
                    prompt,
                    chance.integers(0, 100, size=length).tolist(),
                    (near + 0.4 * chance.normal(size=length)).astype(np.float32).tolist(),
                    (-4.8 + 0.4 * chance.normal(size=length)).astype(np.float32).tolist(),
                    float(chance.integers(0, 4)),
                    GREEDY[step][group],
                )
            )
    return made


@dataclass
class Seen:
    """What was met on the way: otherwise a comparison of the weights would say little."""

    counts: dict[str, list[float]] = field(default_factory=dict)
    """Name -> 1 for each token (or response) that it happened to, 0 for each other."""
    closest: float = float("inf")
    """To any bound, of anything that is compared with one."""

    def share(self, name: str) -> float:
        return sum(self.counts[name]) / len(self.counts[name])

    def where(self, name: str, values: Tensor, bound: float, matters: Tensor | bool = True) -> Tensor:
        """Whether values are above the bound, noted; only where it matters."""
        matters = torch.as_tensor(matters).expand(values.shape)
        above = values > bound
        self.counts.setdefault(name, []).extend((above & matters).float().flatten().tolist())
        distances = (values - bound).abs()[matters]
        if distances.numel():
            self.closest = min(self.closest, float(distances.min()))
        return above


@dataclass(frozen=True)
class Known:
    """A sample with what a step makes of it before its first update."""

    sample: Sample
    old: Tensor
    """[R] logprobs."""
    advantages: Tensor
    """[R]."""
    weight: Tensor
    """[R] or scalar; of the correction."""
    kept: Tensor
    """[R] 1 for tokens that have a policy loss."""


class Plain:
    """A run of a method."""

    def __init__(self, model: Path, method: Method) -> None:
        self.method, self.algo, self.seen = method, method.algo, Seen()
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=OPTIMIZER.lr, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
        )  # fmt: skip
        self.updates = 0

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}

    def forward(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """(logprobs, entropies) of the response's tokens, [R] each."""
        tokens = torch.tensor([sample.prompt + sample.response])
        logits = self.model(input_ids=tokens, use_cache=False).logits[0, len(sample.prompt) - 1 : -1]
        log_p = torch.log_softmax(logits / TEMPERATURE, -1)
        chosen = log_p[torch.arange(len(sample.response)), torch.tensor(sample.response)]
        return chosen, -(log_p.exp() * log_p).sum(-1)

    def step(self, step: int) -> list[float]:
        """The gradient norms of the step's updates."""
        samples = samples_of(step)
        with torch.no_grad():
            before = [self.forward(sample) for sample in samples]
        kept = self.of_high_entropy([entropy for _, entropy in before])
        credit = by_token(samples, self.algo) if self.algo.name == "reinforce_pp" else by_response(samples, self.algo)
        known = [
            Known(sample, old, a, self.correction(old, torch.tensor(sample.sampled)), k)
            for sample, (old, _), a, k in zip(samples, before, credit, kept, strict=True)
        ]
        if self.algo.advantage_clip:
            cut = torch.cat(credit).abs() >= self.algo.advantage_clip
            self.seen.counts.setdefault("advantage cut", []).extend(cut.float().tolist())
        groups = [{0, 1}, {2}] if self.method.updates == 2 else [{0, 1, 2}]
        parts = [[k for k in known if k.sample.group in chosen] for chosen in groups]
        return [self.update(part) for _ in range(self.method.epochs) for part in parts]

    def update(self, part: Sequence[Known]) -> float:
        """One optimizer step on the mean over `part`; the gradient norm before clipping."""
        self.updates += 1
        tokens = sum(len(known.old) for known in part)
        name = "sequence_mean" if self.algo.name == "gspo" else self.algo.aggregation
        self.optimizer.zero_grad()
        for known in part:
            length = len(known.old)
            share = {
                "token_mean": 1 / tokens,
                "sequence_mean": 1 / (len(part) * length),
                "sequence_sum": 1 / (len(part) * LONGEST),
            }
            (self.loss(known).sum() * share[name]).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.max_grad_norm))
        self.optimizer.param_groups[0]["lr"] = OPTIMIZER.lr * min(1.0, self.updates / OPTIMIZER.warmup_steps)
        self.optimizer.step()
        return norm

    def loss(self, known: Known) -> Tensor:
        """[R]; policy loss, KL and entropy of each token."""
        algo, sample, a = self.algo, known.sample, known.advantages
        logprobs, entropy = self.forward(sample)
        losses = known.weight * known.kept * self.policy_loss(logprobs, known.old, a)
        if algo.off_policy_limit:
            bad, left = bool(a[0] < 0), (torch.tensor(sample.sampled) - torch.stack([logprobs.detach(), known.old]))
            far, was_far = self.seen.where("left out", left.mean(1), algo.off_policy_limit, bad)
            self.seen.counts.setdefault("left out as it moved", []).append(float(bad and far != was_far))
            losses = losses * (0.0 if bad and far else 1.0)
        if algo.kl.place == "loss":
            d = logprobs - torch.tensor(sample.reference)
            losses = losses + algo.kl.coef * ((-d).exp() - 1 + d)
        return losses - algo.entropy_coef * entropy

    def policy_loss(self, logprobs: Tensor, old: Tensor, a: Tensor) -> Tensor:
        low, high = 1 - self.algo.clip_low, 1 + self.algo.clip_high
        ratio = (logprobs - old).exp()
        match self.algo.name:
            case "rloo" | "reinforce" | "opo" | "remax":
                return -a * logprobs
            case "cispo":
                self.seen.where("clipped below", -ratio.detach(), -low, a != 0)
                self.seen.where("clipped above", ratio.detach(), high, a != 0)
                return -ratio.detach().clamp(low, high) * a * logprobs
            case "gspo":  # one number for the response, the same at each of its tokens: their mean is that number
                ratio = (logprobs - old).mean().exp().expand(len(old))
        self.seen.where("clipped below", -ratio.detach(), -low, a < 0)
        self.seen.where("clipped above", ratio.detach(), high, a > 0)
        loss = -torch.minimum(ratio * a, ratio.clamp(low, high) * a)
        if self.algo.dual_clip:
            self.seen.where("dual clip", ratio.detach(), self.algo.dual_clip, a < 0)
            loss = torch.where(a < 0, torch.minimum(loss, -self.algo.dual_clip * a), loss)
        return loss

    def correction(self, old: Tensor, sampled: Tensor) -> Tensor:
        level, mode, low, high = (getattr(self.algo.correction, key) for key in ("level", "mode", "low", "high"))
        if level == "off":
            return torch.ones(())
        d = old - sampled
        ratio = {"token": d, "sequence": d.sum(), "geometric": d.mean()}[level].exp()
        self.seen.where("corrected below", -ratio, -low)
        self.seen.where("corrected above", ratio, high)
        if mode == "truncate":
            return ratio.clamp(low, high)
        return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)

    def of_high_entropy(self, entropies: Sequence[Tensor]) -> list[Tensor]:
        """1 where the entropy is among the highest of the whole step."""
        if self.algo.entropy_share == 1:
            return [torch.ones_like(entropy) for entropy in entropies]
        ordered = torch.cat(list(entropies)).sort(descending=True).values
        count = round(self.algo.entropy_share * len(ordered))
        self.seen.closest = min(self.seen.closest, float(ordered[count - 1] - ordered[count]))
        return [(entropy >= ordered[count - 1]).float() for entropy in entropies]


def by_response(samples: Sequence[Sample], algo: AlgoConfig) -> list[Tensor]:
    """The response's score against a baseline, at each of its tokens."""
    everyone = [sample.score for sample in samples]
    from_means, found = [], []
    for i, sample in enumerate(samples):
        mates = [other for other in samples if other.group == sample.group]
        group, lengths = np.array([other.score for other in mates]), [len(other.response) for other in mates]
        others = [other.score for j, other in enumerate(samples) if other.group == sample.group and j != i]
        equal = len(set(group)) == 1
        from_means.append(sample.score - group.mean())
        match algo.name:
            case "reinforce":
                a = sample.score - np.mean(everyone)
            case "remax":
                a = sample.score - sample.greedy
            case "opo":
                a = sample.score - np.dot(lengths, group) / sum(lengths)
            case "rloo":
                a = 0.0 if equal else sample.score - np.mean(others)
            case "dr_grpo" | "reinforce_pp_baseline":
                a = from_means[-1]
            case _:
                a = 0.0 if equal else from_means[-1] / (group.std(ddof=1) + 1e-6)
        found.append(a)
    scale = np.sqrt(np.mean(np.square(from_means))) + 1e-6 if algo.name == "reinforce_pp_baseline" else 1.0
    return [torch.full((len(s.response),), float(a / scale)) for s, a in zip(samples, found, strict=True)]


def by_token(samples: Sequence[Sample], algo: AlgoConfig) -> list[Tensor]:
    """Discounted rewards to come, less their mean, by their deviation, over all tokens of the step; then cut."""
    returns = []
    for sample in samples:
        rewards = -algo.kl.coef * (np.array(sample.sampled) - np.array(sample.reference))
        rewards[-1] += sample.score
        returns.append([sum(algo.gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))])
    everything = np.concatenate(returns)
    scaled = [(np.array(row) - everything.mean()) / np.sqrt(everything.var() + 1e-8) for row in returns]
    return [torch.tensor(row.clip(-algo.advantage_clip, algo.advantage_clip), dtype=torch.float32) for row in scaled]


def run_plain(model: Path, method: Method) -> dict[str, Any]:
    """Three steps."""
    plain = Plain(model, method)
    start = plain.weights()
    norms = [norm for step in range(1, STEPS + 1) for norm in plain.step(step)]
    return {"start": start, "three": plain.weights(), "norms": norms, "seen": plain.seen}
