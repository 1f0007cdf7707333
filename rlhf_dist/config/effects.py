"""The rules that keys of the schema name (`keys.py`): where a key has an effect, and what else it needs there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

from rlhf_dist.config.addresses import address_problem
from rlhf_dist.config.admission import target_lag
from rlhf_dist.config.bubblewrap import MISSING, bubblewrap_problem
from rlhf_dist.config.gym_keys import is_gym, task_problem
from rlhf_dist.config.keys import Given, Rule, plain
from rlhf_dist.config.methods import METHODS, Method
from rlhf_dist.config.paths import is_missing
from rlhf_dist.config.patterns import pattern_problem
from rlhf_dist.config.reward_kinds import KINDS, kinds, missing_library

Test = Callable[[Any], object]

WITH_MARGIN = ("pair", "transcripts")
WITH_BETTER = (*WITH_MARGIN, "ranking")
"""Forms of preference data in which one response is better than another."""


def one_of(*values: object) -> Test:
    return lambda value: value in values


def but(value: str) -> Test:
    return lambda other: other != value


def where(other: str, right: Test, way: str, why: str = "") -> Rule:
    """An effect only where the key `other` has a right value. The message ends with `why` it is so and the way out."""

    def rule(config: Any, key: Given) -> str:
        value = attrgetter(other)(config)
        if not key.changed or right(value):
            return ""
        with_value = f"{value:g}" if isinstance(value, float) else plain(value)
        return f"{key.name} is {key.shown} and has no effect with {other} {with_value}{why}; {way}"

    return rule


def says(problem: Callable[[Any, Given], object], text: str) -> Rule:
    """`text`, with {key.name}, {key.value} and {c.algo.name} filled in, where a config and the key have the problem."""
    return lambda config, key: text.format(c=config, key=key) if problem(config, key) else ""


def only(test: Test, otherwise: str) -> Rule:
    """An effect only where `test(config)` holds; `otherwise` is the rest of the sentence."""
    return says(lambda c, key: key.changed and not test(c), "{key.name} is {key.shown}" + otherwise)


def needed(text: str, when: Test = lambda _: True) -> Rule:
    """Not empty."""
    return says(lambda c, key: not key.value and when(c), "{key.name} is empty; " + text)


def at_most(other: str, when: Test) -> Rule:
    """No more than another key."""
    most = attrgetter(other)
    text = "{key.name} is {key.value}; it must be at most " + f"{other}, {{c.{other}}}"
    return says(lambda c, key: when(c) and key.value > most(c), text)


def one_a_rank(what: str) -> Rule:
    """At least as many as the learner has ranks."""

    def rule(config: Any, key: Given) -> str:
        learner = config.learner
        if key.value >= learner.shares:
            return ""
        count = "learner.ranks" + (" / learner.sequence_parallel" if learner.sequence_parallel > 1 else "")
        return f"{key.name} is {key.value}; it must be at least {count}, {learner.shares}: each rank needs a {what}"

    return rule


SPARES_GPUS = only(
    lambda c: c.cluster.device != "cpu",
    " with cluster.device cpu, where the optimizer is in the host's memory anyway; set it to none",
)
WITH_ZERO_2 = where("learner.zero_stage", one_of(2, 3), "set that to 2 or 3", ", whose optimizer stays where it is")
RANKS_START_AGAIN = says(
    lambda c, key: key.changed and c.algo.name in METHODS and "mask_every" in METHODS[c.algo.name].keys,
    "{key.name} is {key.value} and has no effect with algo.name {c.algo.name}, whose lost ranks end the run; take it "
    "out",
)
FIXED_REFERENCE = says(
    lambda c, key: key.changed and c.reference.update_every,
    "{key.name} is {key.value} and has no effect with reference.update_every {c.reference.update_every}, where lost "
    "ranks end the run; set one of them to 0",
)
KEEPING_BEST = where("loop.keep_best", bool, "set both or none")
DIVIDES_RANKS = says(
    lambda c, key: key.value > 0 and c.learner.ranks % key.value,
    "{key.name} is {key.value}; it must divide learner.ranks, {c.learner.ranks}: set one of them to a multiple of the "
    "other",
)


def file_of(section: str) -> Rule:
    """A file has an effect only where its section's `source` is one."""
    return where(f"{section}.source", but("task"), f"take it out, or set {section}.source, as in jsonl")


def of_kind(*kinds: str) -> Rule:
    """For a key of a reward: the kinds that read it."""
    return where("kind", one_of(*kinds), f"set kind to {' or '.join(kinds)}, or take it out")


def with_row(test: Callable[[Method], object]) -> Test:
    """For `algo.name`: a method whose row is right. A name that is no method's is told of by itself."""
    return lambda name: name not in METHODS or test(METHODS[name])


def of_methods(test: Callable[[Method], object], why: str = "") -> Rule:
    """An effect only with methods whose row is right."""
    have = ", ".join(name for name, row in METHODS.items() if test(row))
    return where("algo.name", with_row(test), f"take it out, or choose {have}", why)


def of_method(config: Any, key: Given) -> str:
    """For a key of `algo` that some methods have: their rows name it."""
    name = key.name.removeprefix("algo.")
    return of_methods(lambda row: name in row.keys)(config, key)


def needed_path(section: str) -> Rule:
    """Not empty where the section reads files."""
    text = f"{section}.source {{c.{section}.source}} needs the path of its data"
    return needed(text, lambda c: getattr(c, section).source != "task")


DATA_PATH = needed_path("data")
PREFERENCES_PATH = needed_path("preferences")


def a_file(config: Any, key: Given) -> str:
    """A file that is there; for some sources of `data` it may be a directory."""
    data = key.name.startswith("data.")
    if key.value and is_missing(key.value):
        looked = "" if Path(key.value).is_absolute() else f" (looked in {Path.cwd()})"
        what = "a file or directory" if data else "a file"
        return f"{key.name} is {key.shown}, which does not exist{looked}; give {what} that does"
    if (data and config.data.source not in ("jsonl", "parquet")) or not os.path.isdir(key.value):
        return ""
    who = f"data.source {config.data.source} needs" if data else "it needs"
    return f"{key.name} is {key.shown}, a directory; {who} a file"


def a_task(config: Any, key: Given) -> str:
    """A built-in task, or one of reasoning_gym, with its settings."""
    wrong = task_problem(key.value, config.data.task.settings) if config.data.source == "task" else ""
    return f"{key.name} is {key.value}, which {wrong}" if wrong else ""


def needs_gym(config: Any, key: Given) -> str:
    """The library of the task is installed."""
    asked = config.data.source == "task" and is_gym(key.value)
    missing = missing_library("reasoning_gym") if asked else ""
    return f"{key.name} is {key.value}, which {missing}" if missing else ""


def a_readable_file(config: Any, key: Given) -> str:
    """A file that is there, where one is named."""
    if not key.value or os.path.isfile(key.value):
        return ""
    what = "a directory" if os.path.isdir(key.value) else "which does not exist"
    looked = "" if Path(key.value).is_absolute() else f" (looked in {Path.cwd()})"
    return f"{key.name} is {key.shown}, {what}{looked}; give a file"


def a_pattern(spec: Any, key: Given) -> str:
    """A regular expression."""
    wrong = pattern_problem(key.value) if spec.kind == "regex" else ""
    return f"{key.name} is {key.shown}, which is not a regular expression: {wrong}" if wrong else ""


def a_function(spec: Any, key: Given) -> str:
    """A function of a module."""
    right = spec.kind != "function" or re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", key.value)
    return "" if right else f"{key.name} is {key.shown}; kind function needs the form package.module:function"


def an_address(spec: Any, key: Given) -> str:
    """Of a reward server or a judge."""
    asked = KINDS[spec.kind].remote
    # A judge is somebody else's server, which may have no token.
    wrong = address_problem(key.value, spec.kind, bool(spec.token_env) or spec.kind == "judge") if asked else ""
    return f"{key.name} {wrong}" if wrong else ""


def a_variable(spec: Any, key: Given) -> str:
    """An environment variable that is set."""
    if not KINDS[spec.kind].remote or not key.value:
        return ""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", key.value):  # not shown: it may be the token itself
        return (
            f"{key.name} must be the name of an environment variable in capitals, as in REWARD_TOKEN; the token itself "
            "never stands in a config"
        )
    if not os.environ.get(key.value):
        return f"{key.name} is {key.value}, a variable that is not set or empty; put the server's token into it"
    return ""


def needs_library(spec: Any, key: Given) -> str:
    """A kind whose library is installed."""
    missing = missing_library(key.value)
    return f"{key.name} is {key.value}, which {missing}" if missing else ""


NEEDS_JUDGE = needed("kind judge needs the name that the endpoint has for it", lambda spec: spec.kind == "judge")
NEEDS_RUBRIC = says(
    lambda spec, key: spec.kind == "judge" and bool(key.value.strip()) == bool(spec.judge.rubric_file),
    "{key.name}: kind judge needs a text there, or a file in judge.rubric_file, and not both",
)
A_SCALE = says(
    lambda spec, key: spec.kind == "judge" and not spec.judge.low < key.value,
    "{key.name} is {key.value:g} with judge.low {c.judge.low:g}; the best score has to be above the worst",
)
NEEDS_A_LENGTH = says(
    lambda spec, key: spec.kind == "length" and (not (spec.length.min or key.value) or 0 < key.value < spec.length.min),
    "{key.name} is {key.value} with length.min {c.length.min}; kind length needs one of them, and max not below min",
)
NEEDS_PATTERN = needed("kind regex needs one, as in pattern: '<answer>.*</answer>'", lambda spec: spec.kind == "regex")
NEEDS_MODEL = needed(
    "kind model needs a reward model's directory, hub name or run directory", lambda spec: spec.kind == "model"
)
A_REWARD_MODEL = says(
    lambda spec, key: spec.kind == "model" and key.value == "tiny",
    "{key.name} is {key.shown}, a language model; train a reward model with `rlhf-dist reward` and name its run",
)
TINY_FITS = at_most("model.tiny.max_positions", lambda c: c.model.path == "tiny")
PTX_FITS = at_most("model.tiny.max_positions", lambda c: c.model.path == "tiny" and c.ptx.coef)
ADAPTIVE_KL = where("algo.kl.controller", one_of("adaptive"), "set that to adaptive, or take it out")
CORRECTING = where("algo.correction.level", but("off"), "set that to token, sequence or geometric, or take it out")
KL_IN_LOSS = where(
    "algo.kl.place", one_of("loss"), "set algo.kl.place to loss, or take it out", ", which is always by k1"
)
WITH_REFERENCE = only(
    lambda c: c.algo.kl.coef != 0 or c.algo.kl.measure,
    " but no reference is run: algo.kl.coef is 0; set that above 0, or algo.kl.measure to true",
)
WITH_CRITIC = of_methods(lambda row: row.baseline == "critic", ", which has no critic")
WITH_RATIO = of_methods(lambda row: row.ratio, ", whose loss has no ratio")
RATIO_OF_METHOD = only(
    lambda c: with_row(lambda row: c.algo.ratio_to in row.ratio)(c.algo.name),
    " with algo.name {c.algo.name}, whose ratio is always to the proximal logprobs: algo.correction is its weight for "
    "the sampler's; take it out, or choose ppo",
)
COUNTED_ONCE = only(
    lambda c: c.algo.correction.level == "off",
    " with algo.correction.level {c.algo.correction.level}, and both correct for the distance to the sampler: it would "
    "count twice; set algo.ratio_to to proximal, or algo.correction.level to off",
)
SHAPED_GREEDY = only(
    lambda c: with_row(lambda row: row.baseline != "greedy")(c.algo.name),
    " with algo.name {c.algo.name}, whose greedy responses are not shaped: the two would not compare; take it out",
)
SEVERAL_UPDATES = only(
    lambda c: c.learner.updates_per_batch * c.learner.epochs != 1,
    " with one optimizer step a batch (learner.epochs 1, learner.updates_per_batch 1); there is nothing to leave out: "
    "raise those, or set it to 0",
)
SHARED_TRUNK = where(
    "critic.start", one_of("shared"), "take it out, or set critic.start to shared", ", whose loss stands alone"
)
OWN_TRUNK = only(
    lambda c: c.critic.start != "shared", " with critic.start shared; one trunk has one place: set it to false"
)
FROZEN_POLICY = only(
    lambda c: c.critic.start != "shared",
    " with critic.start shared; the policy's trunk cannot be frozen while its value head learns: set it to 0, or "
    "critic.start to policy",
)
GPU_SHARE = only(lambda c: c.cluster.device != "cpu", " with cluster.device cpu; it is a share of a GPU; take it out")
BUILT_IN = where("data.source", one_of("task"), "set it to 0")
DESCRIBING = where("data.task.name", one_of("describe"), "take it out, or set that to describe")
WITH_WRONG_ANSWERS = where(
    "data.task.name",
    lambda name: name != "describe" and not is_gym(name),
    "set it to 0",
    ", which knows no wrong answer",
)
OF_BUILT_IN = where("data.task.name", lambda name: not is_gym(name), "take it out, and use data.task.settings")
PTX_WEIGHT = where("ptx.coef", bool, "take it out, or give ptx.coef a weight")
PTX_PATH = needed(
    "ptx.source {c.ptx.source} needs the path of its data", lambda c: c.ptx.coef and c.ptx.source != "task"
)
NEEDS_BUBBLEWRAP = says(
    lambda spec, key: key.value and bubblewrap_problem(),
    "{key.name} is true, and " + MISSING + "; or set it to false to run the reward without a sandbox",
)
SANDBOXED = where("sandbox", bool, "set that to true, or take it out")
OF_FILES: frozenset[Rule] = frozenset(
    {a_file, a_readable_file, a_variable, DATA_PATH, PTX_PATH, NEEDS_MODEL, NEEDS_BUBBLEWRAP, needs_gym, needs_library}
)
"""Rules about what a training run reads, is told by its environment or has on its machine; a plan does without."""
A_FILES_TEXT = only(
    lambda c: c.ptx.coef == 0 or c.ptx.source != "task",
    ", which needs a file; with ptx.source task it must be response",
)
A_FILES_FORM = only(
    lambda c: c.preferences.source != "task",
    "; preferences.source task makes pairs: set it to pair, or set preferences.source, as in jsonl",
)
MARGIN = where(
    "preferences.form", one_of(*WITH_MARGIN), f"take it out, or set preferences.form to {' or '.join(WITH_MARGIN)}"
)
BETTER_RESPONSE = only(
    lambda c: c.preferences.source == "task" or c.preferences.form in WITH_BETTER,
    " and has no effect with preferences.form {c.preferences.form}, in which no response is the better one; "
    "set it to 0",
)
SCORES_HAVE_A_LIMIT = where("kind", but("model"), "take it out; scoring.timeout_s is its limit")
CAN_FAIL_KINDS = kinds(lambda row: row.can_fail)
CAN_FAIL = only(
    lambda c: any(KINDS[spec.kind].can_fail for spec in c.scoring.rewards.values()),
    f" and no reward is of a kind that can fail and be left out: {', '.join(CAN_FAIL_KINDS)}; take it out",
)
MASKED_FAILURES = where("scoring.on_failure", one_of("mask"), "set that to mask, or take it out")
CAN_TAKE_LONG = where("kind", one_of(*CAN_FAIL_KINDS), "take it out; it cannot take long")
TURNS_NEED_CHAT = says(
    lambda c, key: c.data.source == "task" and key.value == "guess" and not c.data.chat,
    "{key.name} is {key.value} with data.chat false; its second turn needs a chat template: set data.chat to true",
)
SEVERAL_SERVERS = only(
    lambda c: c.scoring.replicas > 1 or c.reference.replicas > 1,
    ", and there is no second server to ask: set scoring.replicas or reference.replicas above 1, or take it out",
)
IN_BFLOAT16 = where(
    "model.dtype",
    one_of("bfloat16"),
    "take it out, or set model.dtype to bfloat16",
    ", whose steps change nearly every weight",
)
LAGGING = where("loop.max_policy_lag", bool, "no group is late there; set that above 0, or take it out")
RUNS_AT_A_PUSH = where(
    "loop.max_policy_lag",
    bool,
    "set that above 0, or rollout.kv_after_push to recompute",
    ", where no response is being sampled when new weights arrive",
)
OVERSAMPLED = where(
    "loop.max_policy_lag",
    one_of(0),
    "set one of them to its default",
    ", where slow groups are not waited for",
)


def window_fits(config: Any, key: Given) -> str:
    """The window alone must not come to more than the lag."""
    loop = config.loop
    if not key.value or target_lag(loop) >= 0:
        return ""
    steps = loop.max_policy_lag - target_lag(loop)
    widest = 1 + loop.prompts_per_step * loop.max_policy_lag
    return (
        f"{key.name} is {key.value} with loop.prompts_per_step {loop.prompts_per_step}: a group that so many may "
        f"overtake can come {steps} versions late, and loop.max_policy_lag is {loop.max_policy_lag}; set the window to "
        f"at most {widest}, or 0, or raise the lag"
    )
