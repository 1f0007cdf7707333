"""Evaluation on held-out prompts: greedy accuracy and pass@k, or proxy reward, gold reward and KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_dist.config.schema import EvalConfig
from rlhf_dist.errors import DataError, RewardError
from rlhf_dist.loop.events import Answer
from rlhf_dist.loop.reasons import NON_FINITE
from rlhf_dist.loop.requests import greedy as without_chance, make_requests
from rlhf_dist.loop.shell import Shell
from rlhf_dist.loop.shown_answers import ShownAnswer, answers_to
from rlhf_dist.telemetry import names
from rlhf_dist.types import DroppedPrompt, Experience, NonFinite, Prompt, Purpose, Sampling

SHOWN_ANSWERS = 3
"""Greedy responses that are kept with a run's results, for people to read."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found."""

    metrics: dict[str, float]
    """`eval/...` -> value."""
    answers: tuple[str, ...]
    """Greedy responses to the first `SHOWN_ANSWERS` prompts; why there is none, for a prompt that was dropped."""
    shown: tuple[ShownAnswer, ...]
    """Greedy and sampled responses to more of them, with their scores."""
    non_finite: tuple[NonFinite, ...]
    """Responses with a reward that failed or is not finite, greedy ones first."""
    version: int
    """Of the weights that sampled every token of it."""
    measured: Sequence[Experience]
    """What the means are of: the sampled responses, or the greedy ones where there are none."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What became of prompts that were sampled and scored."""

    experiences: Sequence[Experience]
    """In the order of the prompts, without the samples that `scoring.non_finite` or `scoring.on_failure` leaves out."""
    dropped: Sequence[DroppedPrompt]
    """Prompts that gave none, and why."""
    non_finite: tuple[NonFinite, ...]
    """All responses with a reward that failed, or came as NaN or infinite."""


def evaluate(
    prompts: Sequence[Prompt],
    config: EvalConfig,
    sampling: Sampling,
    *,
    seed: int,
    shell: Shell,
    gold: str = "",
    solved_by: Mapping[str, float],
) -> Evaluation:
    """One greedy response a prompt, and `config.samples` sampled ones with the training's own sampling.

    `seed` is the run's: every evaluation draws its samples from the same seeds.

    `eval/greedy_accuracy`: share of prompts solved; `eval/pass_at_K`: share of prompts with a solved one among K =
    `eval.samples`; `eval/sampled_accuracy`. A response is solved where the rewards that `solved_by` names, each times
    its factor, come to `eval.solved_at`. These three are left out where it names none, and where no prompt has an
    answer and a gold reward is named: nothing is right or wrong there.
    Of the sampled responses (the greedy ones where there are none): `eval/reward`, `eval/reward_std` of the total;
    `eval/gold`, `eval/gold_std` of the reward named `gold`; `eval/NAME` of every other reward;
    `eval/distinct_responses`. Of the sampled ones only: `eval/kl`, nats per response, with a `reference`.
    Of the greedy ones: `eval/greedy_reward`; `eval/response_length`, tokens.
    `eval/dropped`: prompts that gave no greedy response, if any; they count as not solved. `eval/non_finite`: responses
    with a reward that is not finite, `eval/failed`: with one that failed, if any; those that are left out count as not
    solved and in no mean. Raises `DataError` if all prompts are dropped, `RewardError` if that is for their rewards.
    """
    requests = make_requests(prompts, "eval_greedy", 1, without_chance(sampling), seed)
    if config.samples:
        requests += make_requests(prompts, "eval", config.samples, sampling, seed)
    answers = shell.evaluate(requests)
    found = collected(prompts, "eval_greedy", answers)
    require_some(found)
    greedy, dropped, non_finite = found.experiences, found.dropped, found.non_finite
    sampled: Sequence[Experience] = ()
    if config.samples:
        found = collected(prompts, "eval", answers)
        require_some(found)
        sampled, non_finite = found.experiences, non_finite + found.non_finite
    metrics: dict[str, float] = {}
    if solved_by and (not gold or any(prompt.answer for prompt in prompts)):
        metrics |= accuracies(greedy, sampled, len(prompts), config, solved_by)
    metrics |= rewards(sampled or greedy, gold)
    kl = [e.reference.kl for e in sampled if e.reference is not None]
    if kl:
        metrics[names.EVAL_KL] = float(np.concatenate(kl).mean())
    metrics["eval/greedy_reward"] = float(_totals(greedy).mean())
    metrics["eval/response_length"] = float(np.mean([e.head.lengths.mean() for e in greedy]))
    if dropped:
        metrics["eval/dropped"] = float(len(dropped))
    metrics |= unusable(non_finite)
    shown = answers_to(prompts, greedy, sampled, dropped, gold, shell)
    shell.forget([experience.key for experience in (*greedy, *sampled)])
    answers = tuple(one.greedy.text if one.greedy else one.dropped for one in shown[:SHOWN_ANSWERS])
    return Evaluation(metrics, answers, shown, non_finite, version_of([*greedy, *sampled]), sampled or greedy)


def collected(prompts: Sequence[Prompt], purpose: Purpose, answers: Mapping[tuple[str, str], Answer]) -> Collected:
    """What the requests of one purpose came to, in the order of the prompts."""
    found = [answers[purpose, prompt.uid] for prompt in prompts]
    return Collected(
        [answer.experience for answer in found if answer.experience is not None],
        [answer.drop for answer in found if answer.drop is not None],
        tuple(bad for answer in found for bad in answer.non_finite),
    )


def unusable(found: Sequence[NonFinite]) -> dict[str, float]:
    """How many have a reward that is not finite, and that failed; nothing of what there is none of."""
    counts = {
        "eval/non_finite": sum(bool(bad.rewards) for bad in found),
        "eval/failed": sum(bool(bad.failed) for bad in found),
    }
    return {name: float(count) for name, count in counts.items() if count}


def version_of(found: Sequence[Experience]) -> int:
    """The one version of all their tokens: nothing is pushed while an evaluation is under way."""
    versions = {version for e in found for version in (e.head.oldest_version, e.head.newest_version)}
    assert len(versions) == 1, f"an evaluation is of one version, not of {sorted(versions)}"
    return versions.pop()


def require_some(found: Collected) -> None:
    """Raise where no prompt gave an experience: `RewardError` or `DataError`."""
    if not found.experiences:
        last = found.dropped[-1]
        if last.reason == NON_FINITE:
            way = "" if any(bad.failed for bad in found.non_finite) else ", or set scoring.non_finite to zero"
            raise RewardError(
                f"no held-out prompt has a response with finite rewards ({last.detail}); mend the reward{way}"
            )
        raise DataError(f"no held-out prompt could be answered ({last.reason}: {last.detail})")


def accuracies(
    greedy: Sequence[Experience],
    sampled: Sequence[Experience],
    prompts: int,
    config: EvalConfig,
    solved_by: Mapping[str, float],
) -> dict[str, float]:
    """Shares solved, of all `prompts` and samples: what was dropped or left out was not solved."""
    solved = [solved_responses(e, solved_by, config.solved_at) for e in greedy]
    metrics = {names.EVAL_GREEDY: float(np.concatenate(solved).sum() / prompts)}
    if sampled:
        counts = [int(solved_responses(e, solved_by, config.solved_at).sum()) for e in sampled]
        metrics[f"{names.EVAL_PASS_PREFIX}{config.samples}"] = float(np.count_nonzero(counts) / prompts)
        metrics["eval/sampled_accuracy"] = float(sum(counts) / (prompts * config.samples))
    return metrics


def solved_responses(experience: Experience, solved_by: Mapping[str, float], solved_at: float) -> np.ndarray:
    """bool [n]; a response whose total is not finite is left out and counts as not solved."""
    scores = experience.scores
    total = np.zeros(len(scores.total), np.float64)
    for name, factor in solved_by.items():
        total += factor * scores.components[name].astype(np.float64)
    # As the total is: weights of 0.7, 0.2 and 0.1 come to 1.
    return (total.astype(np.float32) >= solved_at) & np.isfinite(scores.total)


def rewards(experiences: Sequence[Experience], gold: str) -> dict[str, float]:
    """Means (and deviations of total and gold) over all responses, and how many of them are different."""
    total = _totals(experiences)
    metrics = {names.EVAL_REWARD: float(total.mean()), "eval/reward_std": float(total.std())}
    components = {
        name: np.concatenate([e.scores.components[name] for e in experiences])
        for name in experiences[0].scores.components
    }
    if gold:
        truth = components.pop(gold)
        metrics |= {names.EVAL_GOLD: float(truth.mean()), "eval/gold_std": float(truth.std())}
    hashes = np.concatenate([e.scores.hashes for e in experiences])
    metrics |= {f"eval/{name}": float(values.mean()) for name, values in components.items()}
    metrics["eval/distinct_responses"] = len(np.unique(hashes)) / len(hashes)
    return metrics


def _totals(experiences: Sequence[Experience]) -> np.ndarray:
    """float32 [B], response by response."""
    return np.concatenate([e.scores.total for e in experiences])
