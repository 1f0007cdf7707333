"""The rewards of a config in words, and which of them say that a response is right."""

from __future__ import annotations

from importlib.util import find_spec

from rlhf_dist.config.reward_kinds import KINDS
from rlhf_dist.config.schema import Config, RewardSpec

WHERE = {"function": "function", "model": "path", "http": "url", "json": "schema", "judge": "url"}
"""Kind -> the key that says which one it is."""


def solved_by(config: Config) -> dict[str, float]:
    """Name -> factor of the rewards whose sum, at least `eval.solved_at`, makes a response count as solved.

    That is the reward that `scoring.gold` names, where it is a rule; else the rules with their weights, or each with 1
    where all of these weights are 0; else, where they cannot reach it, a gold reward that is no rule. Empty: nothing
    says what is right, so there is no accuracy.
    """
    scoring = config.scoring
    gold = {scoring.gold: 1.0} if scoring.gold in scoring.rewards else {}
    if gold and KINDS[scoring.rewards[scoring.gold].kind].right:
        return gold
    rules = {name: spec for name, spec in scoring.rewards.items() if KINDS[spec.kind].right}
    weights = {name: spec.weight for name, spec in rules.items()}
    if not any(weights.values()):
        weights = dict.fromkeys(rules, 1.0)
    open_ended = any(not KINDS[spec.kind].at_most_1 and weights[name] for name, spec in rules.items())
    best = sum(max(weight, 0.0) for weight in weights.values())
    return weights if open_ended or (rules and best >= config.eval.solved_at) else gold


def has_math_verify() -> bool:
    """Whether kind number can compare expressions."""
    return find_spec("math_verify") is not None


def reward_lines(config: Config) -> list[str]:
    """What a run is rewarded by, and where its accuracy comes from, a line each."""
    scoring = config.scoring
    told = ", ".join(f"{name} ({_one(spec)})" for name, spec in scoring.rewards.items())
    solved = solved_by(config)
    if not solved:
        return [
            f"rewards: {told}",
            f"accuracy is not measured: no rule alone can reach eval.solved_at, {config.eval.solved_at:g}; name the "
            "reward that says what is right in scoring.gold (its weight may be 0)",
        ]
    others = [name for name in scoring.rewards if name not in solved]
    accuracy = [f"accuracy is measured by {', '.join(solved)}"] if others else []
    return [f"rewards: {told}", *accuracy]


def _one(spec: RewardSpec) -> str:
    which = f" {getattr(spec, WHERE[spec.kind])}".rstrip() if spec.kind in WHERE else ""
    weight = f"weight {spec.weight:g}" if spec.weight else "weight 0, measured only"
    verified = " with math-verify" if spec.kind == "number" and has_math_verify() else ""
    return f"{spec.kind}{verified}{which}, {weight}"
