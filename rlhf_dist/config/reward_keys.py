"""The keys of one reward, `scoring.rewards.NAME`. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_dist.config import effects
from rlhf_dist.config.keys import ANY, COUNT, LIMIT_S, NOT_NEGATIVE, Range, key, unseen
from rlhf_dist.config.reward_kinds import kinds


@dataclass(frozen=True)
class LengthConfig:
    """kind length: 1 for a response of `min` to `max` units; outside it falls, in a straight line, to 0 over `slack`
    further units."""

    unit: Literal["words", "characters"] = key("words", effects.of_kind("length"))
    """words: parts between white space."""
    min: int = key(0, NOT_NEGATIVE, effects.of_kind("length"))
    """0: no shortest length."""
    max: int = key(0, NOT_NEGATIVE, effects.of_kind("length"), effects.NEEDS_A_LENGTH)
    """0: no longest length."""
    slack: int = key(0, NOT_NEGATIVE, effects.of_kind("length"))
    """0: the reward falls to 0 at once."""


@dataclass(frozen=True)
class RewardSpec:
    kind: Literal[
        "exact",
        "number",
        "regex",
        "function",
        "model",
        "http",
        "gold",
        "bleu",
        "chrf",
        "rouge1",
        "rouge2",
        "rougeL",
        "json",
        "length",
    ] = key("exact", effects.needs_library)
    """exact: the answer itself; number: its value; regex, function, model, http: see `pattern`, `function`, `path`,
    `url`; gold: the true reward of the built-in task `describe`; bleu, chrf, rouge1, rouge2, rougeL: likeness to the
    answer, 0 to 1; json: valid JSON, see `schema`; length: see `length`."""
    weight: float = key(1.0, ANY)
    """Factor in the total; 0: measured and shown only."""
    pattern: str = key("", effects.of_kind("regex"), effects.NEEDS_PATTERN, effects.a_pattern, shown=repr)
    """kind regex: reward 1 where it matches the whole response (Python syntax, dot matches newlines)."""
    schema: str = key("", effects.of_kind("json"), effects.a_readable_file, shown=repr)
    """kind json: file with the JSON Schema that the response has to satisfy; empty: any JSON."""
    length: LengthConfig = field(default_factory=LengthConfig)
    """kind length."""
    function: str = key("", effects.of_kind("function"), effects.a_function, shown=repr)
    """kind function: `package.module:function`, called with (prompts, responses, answers), lists of strings; returns as
    many numbers."""
    path: str = key("", effects.of_kind("model"), effects.NEEDS_MODEL, effects.A_REWARD_MODEL, shown=repr)
    """kind model: a reward model with one label: a Hugging Face directory or hub name, or a run directory."""
    normalize: bool = key(True, effects.of_kind("model"), shown=repr)
    """kind model: centre and scale by the held-out mean and deviation stored with the model, where there are any."""
    url: str = key("", effects.of_kind("http"), effects.an_address, shown=unseen)
    """kind http: address of a reward server (`rlhf-dist serve-reward`), as in http://127.0.0.1:8070/score."""
    token_env: str = key("", effects.of_kind("http"), effects.a_variable, shown=unseen)
    """kind http: environment variable that holds the server's token; the token itself never stands in a config."""
    retries: int = key(3, Range("between 0 and 20", lambda x: 0 <= x <= 20), effects.of_kind("http"))
    """kind http: further tries after one that failed."""
    timeout_s: float = key(30.0, LIMIT_S, effects.SCORES_HAVE_A_LIMIT, effects.CAN_TAKE_LONG)
    """Limit for the responses of one prompt group, for kinds that run in a process of their own or ask a server, and
    for number with math-verify. `scoring.timeout_s` is the limit for all rewards together, kind model included."""
    sandbox: bool = key(False, effects.of_kind(*kinds(lambda row: row.process)), effects.NEEDS_BUBBLEWRAP)
    """For kinds that run in a process of their own, and number with math-verify: it sees this Python and the current
    directory, to read, and nothing else: no network, no environment, no other process. Needs bubblewrap
    (docs/security.md)."""
    memory_mib: int = key(2048, COUNT, effects.SANDBOXED)
    """With `sandbox`: memory of the reward's process and all that it starts; one that uses more is killed."""
    keep_special_tokens: bool = key(False, effects.of_kind("exact", "number", "regex", "function", "http"), shown=repr)
    """Show the special tokens inside a response, as in <think>, to a reward that reads text; never its end token."""
