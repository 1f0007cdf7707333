"""Rules of the `scoring` section for rewards that are models, servers or the gold reward."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from urllib.parse import SplitResult, urlsplit

from rlhf_dist.config.keys import key_problems
from rlhf_dist.config.schema import Config, RewardSpec

VARIABLE = r"[A-Z_][A-Z0-9_]*"


def scoring_problems(config: Config, command: str) -> Iterator[str]:
    """A sentence for each problem; only `train` and `eval` score."""
    if command not in ("train", "eval"):
        return
    scoring = config.scoring
    for name, spec in scoring.rewards.items():
        key = f"scoring.rewards.{name}"
        yield from key_problems(spec, f"{key}.")
        if spec.kind == "model" and spec.path == "tiny":
            yield (
                f"{key}.path is 'tiny', a language model; train a reward model with `rlhf-dist reward` and name its run"
            )
        if spec.kind == "http":
            yield from _url(f"{key}.url", spec)
            yield from _token(f"{key}.token_env", spec.token_env)
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


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at `host`, a name or an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _url(key: str, spec: RewardSpec) -> Iterator[str]:
    example = "http://127.0.0.1:8070/score"
    parts = _split(spec.url)
    if parts is None:
        yield f"{key} is {spec.url!r}; kind http needs a whole address, as in {example}"
    elif parts.username is not None or parts.password is not None:
        yield f"{key} holds a user or a password; take it out and name a variable with a token in token_env"
    elif not is_loopback(parts.hostname or "") and not spec.token_env:
        yield (
            f"{key} is {spec.url!r}, another machine, without a token; start that server with --token-env and name the "
            "variable that holds its token in token_env"
        )


def _split(url: str) -> SplitResult | None:
    """The address's parts; None when it is none."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
    except ValueError:  # the port is no number, or a bracket is left open
        return None
    return parts if whole and " " not in url else None


def _token(key: str, variable: str) -> Iterator[str]:
    if not variable:
        return
    if not re.fullmatch(VARIABLE, variable):  # not shown: it may be the token itself
        yield (
            f"{key} must be the name of an environment variable in capitals, as in REWARD_TOKEN; the token itself "
            "never stands in a config"
        )
    elif not os.environ.get(variable):
        yield f"{key} is {variable}, a variable that is not set or empty; put the server's token into it"
