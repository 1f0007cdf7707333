"""All problems of a config at once, before anything is started: what its keys say of themselves, rules between keys."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import chain

from rlhf_dist.config import effects
from rlhf_dist.config.algorithm_checks import algorithm_problems, name_problems
from rlhf_dist.config.keys import Command as Command, Problems, key_problems, range_problems, told
from rlhf_dist.config.methods import METHODS
from rlhf_dist.config.paths import path_problems
from rlhf_dist.config.preference_checks import prefer_problems, preference_problems
from rlhf_dist.config.reward_kinds import KINDS
from rlhf_dist.config.schema import Config, DataConfig
from rlhf_dist.config.scoring_checks import scoring_problems
from rlhf_dist.config.stop_checks import stop_problems
from rlhf_dist.errors import ConfigError

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM 0.32's CPU attention accepts (`CPUAttentionBackend.get_supported_head_sizes`)."""
TAKEN_NAMES = re.compile(
    "mean|std|distribution|proxy|gold|reward|reward_std|gold_std|kl|shaped_mean|groups_without_signal|distinct_responses|greedy|"
    "response_length|greedy_reward|greedy_accuracy|sampled_accuracy|dropped|running_mean|running_std|score_clipped|"
    "non_finite|failed|failed_share|asked_again"
)
"""Rewards are shown as reward/NAME and eval/NAME: these names are in use there (`gold` for the one it is)."""

SENT = "weights.transport is {c.weights.transport}"
SENT_STRAIGHT: Problems = {
    f"{SENT} with learner.delta_push true, which saves bytes in the shared memory alone; set weights.transport to "
    "shared_memory, or take learner.delta_push out": lambda c: _is_sent(c) and c.learner.delta_push,
    f"{SENT} with reference.update_every {{c.reference.update_every}}; a reference that moves reads the shared memory: "
    "set weights.transport to shared_memory": lambda c: _is_sent(c) and c.reference.update_every > 0,
    f"{SENT} with algo.name {{c.algo.name}}, whose mask policy reads the shared memory: set weights.transport to "
    "shared_memory": lambda c: _is_sent(c) and c.algo.name in METHODS and "mask_top_p" in METHODS[c.algo.name].keys,
    f"{SENT} with rollout.kv_after_push keep, which prepares a load from the shared memory; set weights.transport to "
    "shared_memory, or rollout.kv_after_push to recompute": lambda c: _is_sent(c) and c.rollout.kv_after_push == "keep",
    f"{SENT} and weights.timeout_s {{c.weights.timeout_s}} with learner.timeout_s {{c.learner.timeout_s}}; ranks wait "
    "for each other while rank 0 waits for rollout workers: set weights.timeout_s to at most "
    "learner.timeout_s": lambda c: _is_sent(c) and c.weights.timeout_s > c.learner.timeout_s,
}
"""Of weights that go straight from the learner to the engines."""

PROBLEMS: dict[tuple[Command, ...], Problems] = {
    ("train", "sft", "reward", "prefer", "eval"): {
        "model.attention is varlen, which needs a GPU; with cluster.device cpu it must be segmented or "
        "auto": lambda c: c.model.attention == "varlen" and c.cluster.device == "cpu",
        "model.attention is varlen, which computes in bfloat16; set model.dtype to bfloat16": lambda c: (
            c.model.attention == "varlen" and c.model.dtype == "float32"
        ),
    },
    ("train", "sft", "reward", "prefer"): {
        "model.dtype is bfloat16 with learner.zero_stage 0; DeepSpeed adds bfloat16 gradients up in float32 only from "
        "stage 1 on: set learner.zero_stage to 1, 2 or 3, or model.dtype to float32": lambda c: (
            c.model.dtype == "bfloat16" and c.learner.zero_stage == 0
        ),
    },
    ("sft",): {
        "data.response_key is empty; sft needs the column with the demonstrations": lambda c: (
            c.data.source != "task" and not c.data.response_key
        ),
    },
    ("eval",): {
        "rollout.temperature is 0 with eval.samples {c.eval.samples}; raise it, or set eval.samples to 0 (greedy "
        "only)": lambda c: c.rollout.temperature == 0 and c.eval.samples > 1,
    },
    ("train",): {
        **SENT_STRAIGHT,
        "loop.keep_best is {c.loop.keep_best}, but no step before the last, {c.loop.steps}, has both an evaluation "
        "(eval.every {c.eval.every}) and a checkpoint (loop.checkpoint_every {c.loop.checkpoint_every}); set "
        "loop.checkpoint_every to eval.every or a multiple of it": lambda c: (
            c.loop.keep_best and not 0 < math.lcm(c.eval.every, c.loop.checkpoint_every) < c.loop.steps
        ),
        "rollout.temperature is 0; all samples of a group would be the same: it must be greater than 0 for "
        "train": lambda c: c.rollout.temperature == 0,
        "ptx.source is task, demonstrations of data.task, but data.source is {c.data.source}; set ptx.source and "
        "ptx.path, as in ptx.source=jsonl": lambda c: c.ptx.coef and c.ptx.source == "task" and c.data.source != "task",
        "data.response_key is empty; ptx.source {c.ptx.source} needs the column with the texts to learn": lambda c: (
            c.ptx.coef and c.ptx.source != "task" and not c.data.response_key
        ),
    },
}


def _is_sent(config: Config) -> bool:
    return config.weights.transport != "shared_memory"


def check(config: Config, command: Command, files: bool = True) -> None:
    """Raise one `ConfigError` that lists every problem `command` would have with `config`; `files`: see `problems`."""
    found = problems(config, command, files)
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        raise ConfigError("\n  - ".join([f"the config has {len(found)} problems:", *found]))


def problems(config: Config, command: Command, files: bool = True) -> list[str]:
    """Every problem, a sentence each: key, value, what would be right. Empty: nothing is wrong.

    `files`: whether the files that the command reads have to be named and there, as for all but a plan.
    """
    but = frozenset() if files else effects.OF_FILES
    found = [*range_problems(config), *path_problems(config)]
    rules = [key_problems(config, command=command, but=but), _name(config), name_problems(config)]
    rules += [told(own, config) for commands, own in PROBLEMS.items() if command in commands]
    if not found:  # sizes say nothing about each other while one of them is out of range
        rules += [_model(config)]
        rules += [_batches(config), _step_limit(config)] if command == "train" else []
    if command == "train":
        rules += [algorithm_problems(config)]
    if command in ("train", "eval"):
        rules += [stop_problems(config.rollout.stop), _rewards(config), scoring_problems(config, but)]
    if command in ("reward", "prefer"):
        rules += [preference_problems(config)]
    if command == "prefer":
        rules += [prefer_problems(config)]
    return [*found, *chain(*rules)]


def _step_limit(config: Config) -> Iterator[str]:
    """It is for what the limits of single waits do not see, so these have to come first."""
    within = {
        "cluster.start_timeout_s": config.cluster.start_timeout_s,
        "rollout.timeout_s": config.rollout.timeout_s,
        "scoring.timeout_s": config.scoring.timeout_s,
        "learner.timeout_s": config.learner.timeout_s,
        "weights.timeout_s": config.weights.timeout_s,
        "faults.heartbeat_s": config.faults.heartbeat_s,
    }
    longest = max(within, key=within.__getitem__)
    if 0 < config.faults.step_s <= within[longest]:
        yield (
            f"faults.step_s is {config.faults.step_s:g} and is the limit for a whole step; it must be greater than "
            f"{longest}, {within[longest]:g}, which is one for a part of it, or 0 for none"
        )


def _name(config: Config) -> Iterator[str]:
    part = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
    if not re.fullmatch(f"{part}(/{part})*", config.name):
        yield (
            f"name is {config.name!r}; it must be a directory below `output`, of letters, digits, '.', '_' and '-', "
            "as in grpo or reverse/grpo"
        )


def _model(config: Config) -> Iterator[str]:
    tiny, rollout = config.model.tiny, config.rollout
    if config.model.path != "tiny":
        return
    head_dim = tiny.hidden_size // tiny.heads
    if tiny.hidden_size % tiny.heads:
        yield f"model.tiny.hidden_size is {tiny.hidden_size}; it must be a multiple of model.tiny.heads, {tiny.heads}"
    elif config.cluster.device != "cuda" and head_dim not in CPU_HEAD_DIMS:
        nearest = min(CPU_HEAD_DIMS, key=lambda allowed: abs(allowed - head_dim))
        yield (
            f"model.tiny.hidden_size {tiny.hidden_size} / model.tiny.heads {tiny.heads} makes head_dim {head_dim}, "
            f"which the CPU engine refuses; it takes {', '.join(map(str, CPU_HEAD_DIMS))} (hidden_size "
            f"{tiny.heads * nearest} would do)"
        )
    if tiny.heads % tiny.kv_heads:
        yield (
            f"model.tiny.kv_heads is {tiny.kv_heads}; it must divide model.tiny.heads, {tiny.heads}: "
            f"{_divisors(tiny.heads)} do"
        )
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if longest > tiny.max_positions:
        yield (
            f"rollout.max_prompt_tokens {rollout.max_prompt_tokens} + rollout.max_response_tokens "
            f"{rollout.max_response_tokens} is {longest}, more than model.tiny.max_positions {tiny.max_positions}; set "
            f"model.tiny.max_positions to {longest} or shorten the others"
        )


def _batches(config: Config) -> Iterator[str]:
    prompts, group, learner = config.loop.prompts_per_step, config.algo.group_size, config.learner
    if prompts % learner.updates_per_batch:
        yield (
            f"learner.updates_per_batch is {learner.updates_per_batch}; it must divide loop.prompts_per_step, "
            f"{prompts}: {_divisors(prompts)} do"
        )
    if prompts * group < learner.shares * learner.updates_per_batch:
        parts = f" / learner.sequence_parallel {learner.sequence_parallel}" if learner.sequence_parallel > 1 else ""
        yield (
            f"loop.prompts_per_step {prompts} x algo.group_size {group} is {prompts * group} responses, too few for "
            f"learner.ranks {learner.ranks}{parts} x learner.updates_per_batch {learner.updates_per_batch}: each rank "
            "needs at least one in each update"
        )


def _rewards(config: Config) -> Iterator[str]:
    rewards = config.scoring.rewards
    if not rewards:
        yield "scoring.rewards is empty; name at least one, as in rewards: {exact: {kind: exact}}"
    for name, spec in rewards.items():
        key = f"scoring.rewards.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            yield f"{key}: the name {name!r} must consist of letters, digits, '_' and '-'; it names a metric"
        if (TAKEN_NAMES.fullmatch(name) or name == f"pass_at_{config.eval.samples}") and name != config.scoring.gold:
            yield f"{key}: the name {name!r} is that of another metric, reward/{name} or eval/{name}; give another"
        if KINDS[spec.kind].compares:
            yield from _answers(config.data, f"{key}.kind is {spec.kind}, which compares with the answer, but")
    best = sum(max(spec.weight, 0.0) for spec in rewards.values())
    open_ended = not all(KINDS[spec.kind].at_most_1 for spec in rewards.values())
    if 0 < best < config.eval.solved_at < math.inf and not open_ended:
        yield (
            f"eval.solved_at is {config.eval.solved_at}, but the weights under scoring.rewards add up to {best:g}: "
            f"nothing could count as solved; set it to at most {best:g}"
        )
    if rewards and all(spec.weight == 0 for spec in rewards.values()):
        yield (
            "the weight of every reward under scoring.rewards is 0; at least one must differ from 0, or there is "
            "nothing to learn"
        )


def _answers(data: DataConfig, sentence: str) -> Iterator[str]:
    if data.source == "task" and data.task.name == "describe":
        yield f"{sentence} data.task.name describe has none; use gold, model, http, regex or function"
    if data.source != "task" and not data.answer_key:
        yield f"{sentence} data.answer_key is empty; name its column"


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, 4096) + 1) if number % n == 0)
