"""The actor side: prompts -> rollouts -> scores and reference logprobs -> experiences."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_dist.errors import RunError
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.ports import References, Rollouts, Scoring
from rlhf_dist.types import DroppedPrompt, Experience, Handle, Prompt, RolloutHead, Sampling


def collect(
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    rollouts: Rollouts,
    scoring: Scoring,
    reference: References | None = None,
    ledger: Ledger | None = None,
) -> tuple[list[Experience], list[DroppedPrompt]]:
    """Sample and score each prompt; a group is scored while the others are still being sampled.

    Returns (experiences in the order of the prompts, prompts that gave none and why). Evaluation has no ledger, and a
    run without KL no reference. Raises `RunError` when a prompt is neither.
    """
    by_uid = {prompt.uid: prompt for prompt in prompts}
    finished: dict[str, tuple[RolloutHead, Handle]] = {}
    pending: dict[str, Handle] = {}
    compared: dict[str, Handle] = {}
    dropped: list[DroppedPrompt] = []
    for result in rollouts.generate(prompts, sampling):
        if isinstance(result, DroppedPrompt):
            dropped.append(result)
            continue
        head, rollout = result
        finished[head.uid] = (head, rollout)
        pending[head.uid] = scoring.submit(rollout)
        if reference is not None:
            compared[head.uid] = reference.submit(rollout, sampling.temperature)
    lost = by_uid.keys() - finished.keys() - {drop.uid for drop in dropped}
    if lost:
        raise RunError(
            f"{len(lost)} of {len(prompts)} prompts came back neither sampled nor dropped, first {min(lost)}"
        )
    if ledger is not None:
        for drop in dropped:
            ledger.drop([drop.uid], drop.reason)
        ledger.finish(finished)
    scores = scoring.gather(pending)
    references = {} if reference is None else reference.gather(compared)
    if ledger is not None:
        ledger.score(scores)
    experiences = [
        Experience(
            prompt, head=finished[uid][0], scores=scores[uid], rollout=finished[uid][1], reference=references.get(uid)
        )
        for uid, prompt in by_uid.items()
        if uid in finished
    ]
    return experiences, dropped
