"""The keys of one reward, `scoring.rewards.NAME`. Imports without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_dist.config import effects
from rlhf_dist.config.keys import ANY, COUNT, LIMIT_S, NOT_NEGATIVE, Range, key, unseen
from rlhf_dist.config.reward_kinds import kinds

REMOTE = kinds(lambda row: row.remote)
READ_SPECIAL = ("exact", "number", "regex", "function", "http", "judge")
"""Kinds that can be shown special tokens."""


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
class JudgeConfig:
    """kind judge: a language model behind `url`, which is asked once for each response."""

    model: str = key("", effects.of_kind("judge"), effects.NEEDS_JUDGE, shown=repr)
    """The model's name at the endpoint."""
    rubric: str = key("", effects.of_kind("judge"), effects.NEEDS_RUBRIC, shown=repr)
    """What is good and what is bad, in words."""
    rubric_file: str = key("", effects.of_kind("judge"), effects.a_readable_file, shown=repr)
    """The same as a file; one of the two."""
    low: float = key(0.0, ANY, effects.of_kind("judge"))
    """The worst score, as the judge is told; a number outside the scale is no answer."""
    high: float = key(10.0, ANY, effects.of_kind("judge"), effects.A_SCALE)
    """The best score. The reward is the judge's number as it is."""
    read: Literal["json", "last_line"] = key("json", effects.of_kind("judge"))
    """json: the answer is {"score": number} and nothing else; last_line: its last line has one number."""
    max_tokens: int = key(512, COUNT, effects.of_kind("judge"))
    """Of an answer; one that is cut there is no answer."""
    concurrency: int = key(8, Range("between 1 and 64", lambda x: 1 <= x <= 64), effects.of_kind("judge"))
    """Requests at once, of each scoring server."""
    max_requests: int = key(0, NOT_NEGATIVE, effects.of_kind("judge"))
    """Of each scoring server, counted from its start, further tries too; one more ends the run. 0: no limit."""


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
        "reasoning_gym",
        "judge",
    ] = key("exact", effects.needs_library)
    """exact: the answer itself; number: its value; regex, function, model, http: see `pattern`, `function`, `path`,
    `url`; gold: the true reward of the built-in task `describe`; bleu, chrf, rouge1, rouge2, rougeL: likeness to the
    answer, 0 to 1; json: valid JSON, see `schema`; reasoning_gym: the score that this library gives for the task in
    `data.task.name`; length, judge: see the sections below."""
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
    url: str = key("", effects.of_kind(*REMOTE), effects.an_address, shown=unseen)
    """kind http: address of a reward server (`rlhf-dist serve-reward`), as in http://127.0.0.1:8070/score; kind judge:
    of an endpoint as OpenAI has it, as in http://127.0.0.1:8000/v1/chat/completions."""
    token_env: str = key("", effects.of_kind(*REMOTE), effects.a_variable, shown=unseen)
    """kind http, judge: environment variable that holds the server's token or key, which itself never stands in a
    config."""
    retries: int = key(3, Range("between 0 and 20", lambda x: 0 <= x <= 20), effects.of_kind(*REMOTE))
    """kind http, judge: further tries after one that failed."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """kind judge."""
    timeout_s: float = key(30.0, LIMIT_S, effects.SCORES_HAVE_A_LIMIT, effects.CAN_TAKE_LONG)
    """Limit for the responses of one prompt group, for kinds that run in a process of their own or ask a server, and
    for number with math-verify. `scoring.timeout_s` is the limit for all rewards together, kind model included."""
    sandbox: bool = key(False, effects.of_kind(*kinds(lambda row: row.process)), effects.NEEDS_BUBBLEWRAP)
    """For kinds that run in a process of their own, and number with math-verify: it sees this Python and the current
    directory, to read, and nothing else: no network, no environment, no other process. Needs bubblewrap
    (docs/security.md)."""
    memory_mib: int = key(2048, COUNT, effects.SANDBOXED)
    """With `sandbox`: memory of the reward's process and all that it starts; one that uses more is killed."""
    keep_special_tokens: bool = key(False, effects.of_kind(*READ_SPECIAL), shown=repr)
    """Show the special tokens inside a response, as in <think>, to a reward that reads text; never its end token."""
