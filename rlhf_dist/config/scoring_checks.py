"""Rules of the `scoring` section that relate its rewards to the data and to each other."""

from __future__ import annotations

from collections.abc import Container, Iterator

from rlhf_dist.config.gym_keys import is_gym
from rlhf_dist.config.keys import Rule, key_problems, range_problems
from rlhf_dist.config.schema import Config


def scoring_problems(config: Config, but: Container[Rule] = ()) -> Iterator[str]:
    """For `train` and `eval`, which score: a sentence for each problem. `but`: rules of keys that are left out."""
    scoring = config.scoring
    for name, spec in scoring.rewards.items():
        key = f"scoring.rewards.{name}"
        yield from range_problems(spec, f"{key}.")
        yield from key_problems(spec, f"{key}.", but=but)
        if spec.kind == "reasoning_gym" and not (config.data.source == "task" and is_gym(config.data.task.name)):
            yield (
                f"{key}.kind is reasoning_gym, which scores its own tasks; set data.source to task and data.task.name "
                "to one, as in reasoning_gym:spell_backward, or use another kind"
            )
        if spec.kind == "gold" and (config.data.source != "task" or config.data.task.name != "describe"):
            given = config.data.task.name if config.data.source == "task" else f"of data.source {config.data.source}"
            yield (
                f"{key}.kind is gold, the true reward of the built-in task describe, and the prompts are {given}; set "
                "data.source to task and data.task.name to describe, or use another kind"
            )
    if scoring.gold and scoring.gold not in scoring.rewards:
        yield (
            f"scoring.gold is {scoring.gold!r}; it must be the name of one of scoring.rewards: "
            f"{', '.join(scoring.rewards) or 'there is none'}"
        )
