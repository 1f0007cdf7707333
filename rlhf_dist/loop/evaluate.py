"""Evaluation on held-out prompts: greedy accuracy and pass@k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlhf_dist.config.schema import EvalConfig
from rlhf_dist.errors import DataError
from rlhf_dist.loop.collect import collect
from rlhf_dist.loop.ports import Rollouts, Scoring
from rlhf_dist.telemetry import names
from rlhf_dist.types import Experience, Prompt, Sampling


def evaluate(
    prompts: Sequence[Prompt], config: EvalConfig, sampling: Sampling, *, rollouts: Rollouts, scoring: Scoring
) -> dict[str, float]:
    """One greedy response a prompt, and `config.samples` sampled ones with the training's own sampling.

    `eval/greedy_accuracy`: share of prompts solved (total reward at least `eval.solved_at`); `eval/greedy_reward`;
    `eval/pass_at_K`: share of prompts with a solved one among K = `eval.samples`; `eval/sampled_accuracy`;
    `eval/dropped`: prompts that gave no response, if any; they count as not solved. Raises `DataError` if all.
    """
    greedy, dropped = collect(
        prompts, replace(sampling, n=1, temperature=0.0, top_p=1.0, top_k=0), rollouts=rollouts, scoring=scoring
    )
    metrics = {"eval/dropped": float(len(dropped))} if dropped else {}
    if not greedy:
        raise DataError(f"no held-out prompt could be answered ({dropped[-1].reason}: {dropped[-1].detail})")
    scores = _scores(greedy)
    metrics |= {
        # A prompt that was dropped is one that was not solved.
        names.EVAL_GREEDY: float((scores >= config.solved_at).sum() / len(prompts)),
        "eval/greedy_reward": float(scores.mean()),
        "eval/response_length": float(np.mean([e.head.lengths.mean() for e in greedy])),
    }
    if config.samples:
        sampled, _ = collect(prompts, replace(sampling, n=config.samples), rollouts=rollouts, scoring=scoring)
        solved = _scores(sampled) >= config.solved_at
        metrics[f"{names.EVAL_PASS_PREFIX}{config.samples}"] = float(solved.any(axis=1).sum() / len(prompts))
        metrics["eval/sampled_accuracy"] = float(solved.sum() / (len(prompts) * config.samples))
    return metrics


def _scores(experiences: Sequence[Experience]) -> np.ndarray:
    """float32 [prompts, samples]."""
    return np.stack([e.scores.total for e in experiences])
