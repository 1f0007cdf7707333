"""Rules between keys and ranges of single keys: all problems of a config at once, before anything is started."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import Literal

from rlhf_dist.config.algorithm_checks import algorithm_problems, name_problems
from rlhf_dist.config.paths import is_missing, path_problems
from rlhf_dist.config.patterns import pattern_problem
from rlhf_dist.config.preference_checks import not_there, preference_problems
from rlhf_dist.config.ranges import range_problems
from rlhf_dist.config.schema import Config, RewardSpec
from rlhf_dist.config.scoring_checks import scoring_problems
from rlhf_dist.config.stop_checks import stop_problems
from rlhf_dist.errors import ConfigError

Command = Literal["train", "sft", "reward", "eval"]

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM 0.32's CPU attention accepts (`CPUAttentionBackend.get_supported_head_sizes`)."""


TAKEN_NAMES = (
    "mean",
    "std",
    "proxy",
    "gold",
    "reward",
    "reward_std",
    "gold_std",
    "kl",
    "shaped_mean",
    "groups_without_signal",
    "distinct_responses",
    "response_length",
    "greedy_reward",
    "greedy_accuracy",
    "sampled_accuracy",
    "dropped",
    "running_mean",
    "running_std",
    "greedy",
    "score_clipped",
    "non_finite",
)
"""Rewards are shown as reward/NAME and eval/NAME: these names are in use there (`gold` for the one it is)."""


def check(config: Config, command: Command) -> None:
    """Raise one `ConfigError` that lists every problem `command` would have with `config`."""
    found = problems(config, command)
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        raise ConfigError("\n  - ".join([f"the config has {len(found)} problems:", *found]))


def problems(config: Config, command: Command) -> list[str]:
    """Every problem, a sentence each: key, value, what would be right. Empty: nothing is wrong."""
    found = [*range_problems(config), *path_problems(config)]
    rules = [_names(config), name_problems(config), _data(config, command), _device(config)]
    if not found:  # sizes say nothing about each other while one of them is out of range
        rules += [_model(config)]
        rules += [_batches(config)] if command == "train" else []
    if command == "train":
        rules += [algorithm_problems(config)]
    if command in ("train", "eval"):
        rules += [_sampling(config, command), stop_problems(config.rollout.stop), _rewards(config)]
    if command == "sft":
        rules += [_sft(config)]
    if command in ("train", "sft", "reward"):
        rules += [_precision(config)]
    rules += [preference_problems(config, command)]
    if command in ("train", "eval"):
        rules += [scoring_problems(config, command)]
    return found + [problem for rule in rules for problem in rule]


def _names(config: Config) -> Iterator[str]:
    part = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
    if not re.fullmatch(f"{part}(/{part})*", config.name):
        yield (
            f"name is {config.name!r}; it must be a directory below `output`, of letters, digits, '.', '_' and '-', "
            "as in grpo or reverse/grpo"
        )
    if not config.output:
        yield "output is empty; name the directory that holds the runs, as in output: runs"
    if not config.model.path:
        yield "model.path is empty; give `tiny`, a model directory, a hub name or a run directory"


def _data(config: Config, command: Command) -> Iterator[str]:
    data = config.data
    if data.source == "task":
        if data.task.min_length > data.task.max_length:
            yield (
                f"data.task.min_length is {data.task.min_length}; it must be at most data.task.max_length, "
                f"{data.task.max_length}"
            )
        for key, value in (("path", data.path), ("eval_path", data.eval_path)):
            if value:
                yield (
                    f"data.{key} is {value!r} and has no effect with data.source task; take it out, or set "
                    "data.source, as in jsonl"
                )
        return
    if not data.path:
        yield f"data.path is empty; data.source {data.source} needs the path of its data"
    for key, value in (("path", data.path), ("eval_path", data.eval_path)):
        if value and is_missing(value):
            yield f"{not_there(f'data.{key}', value)}; give a file or directory that does"
        elif value and data.source in ("jsonl", "parquet") and os.path.isdir(value):
            yield f"data.{key} is {value!r}, a directory; data.source {data.source} needs a file"
    if command == "sft":
        if not data.response_key:
            yield "data.response_key is empty; sft needs the column with the demonstrations"
        if config.sft.wrong_share:
            yield (
                f"sft.wrong_share is {config.sft.wrong_share} and has no effect with data.source "
                f"{data.source}; set it to 0"
            )


def _model(config: Config) -> Iterator[str]:
    model, tiny = config.model, config.model.tiny
    if model.path != "tiny":
        return
    if tiny.hidden_size % tiny.heads:
        yield f"model.tiny.hidden_size is {tiny.hidden_size}; it must be a multiple of model.tiny.heads, {tiny.heads}"
    elif config.cluster.device != "cuda" and tiny.hidden_size // tiny.heads not in CPU_HEAD_DIMS:
        yield (
            f"model.tiny.hidden_size {tiny.hidden_size} / model.tiny.heads {tiny.heads} makes head_dim "
            f"{tiny.hidden_size // tiny.heads}, which the CPU engine refuses; it takes "
            f"{', '.join(map(str, CPU_HEAD_DIMS))}"
            f" (hidden_size {tiny.heads * _nearest(tiny.hidden_size // tiny.heads)} would do)"
        )
    if tiny.heads % tiny.kv_heads:
        yield (
            f"model.tiny.kv_heads is {tiny.kv_heads}; it must divide model.tiny.heads, {tiny.heads}: "
            f"{_divisors(tiny.heads)} do"
        )
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > tiny.max_positions:
        yield (
            f"rollout.max_prompt_tokens {config.rollout.max_prompt_tokens} + rollout.max_response_tokens "
            f"{config.rollout.max_response_tokens} is {longest}, more than model.tiny.max_positions "
            f"{tiny.max_positions}; "
            f"set model.tiny.max_positions to {longest} or shorten the others"
        )


def _device(config: Config) -> Iterator[str]:
    device, parallel = config.cluster.device, config.rollout.tensor_parallel
    if device == "cpu" and parallel > 1:
        yield f"rollout.tensor_parallel is {parallel} with cluster.device cpu; it counts GPUs, on a CPU it must be 1"
    if config.model.attention == "flash_attention_2":
        if device == "cpu":
            yield (
                "model.attention is flash_attention_2, which needs a GPU; with cluster.device cpu it must be "
                "segmented or auto"
            )
        if config.model.dtype == "float32":
            yield "model.attention is flash_attention_2, which computes in bfloat16; set model.dtype to bfloat16"


def _precision(config: Config) -> Iterator[str]:
    if config.model.dtype == "bfloat16" and config.learner.zero_stage == 0:
        yield (
            "model.dtype is bfloat16 with learner.zero_stage 0; DeepSpeed adds bfloat16 gradients up in float32 only "
            "from stage 1 on: set learner.zero_stage to 1, 2 or 3, or model.dtype to float32"
        )


def _batches(config: Config) -> Iterator[str]:
    prompts, updates, ranks = config.loop.prompts_per_step, config.learner.updates_per_batch, config.learner.ranks
    if prompts % updates:
        yield (
            f"learner.updates_per_batch is {updates}; it must divide loop.prompts_per_step, {prompts}: "
            f"{_divisors(prompts)} do"
        )
    rows = prompts * config.algo.group_size
    if rows < ranks * updates:
        yield (
            f"loop.prompts_per_step {prompts} x algo.group_size {config.algo.group_size} is {rows} responses, "
            "too few for "
            f"learner.ranks {ranks} x learner.updates_per_batch {updates}: each rank needs at least one in each update"
        )


def _sft(config: Config) -> Iterator[str]:
    if config.sft.batch_size < config.learner.ranks:
        yield (
            f"sft.batch_size is {config.sft.batch_size}; it must be at least learner.ranks, {config.learner.ranks}: "
            "each rank needs a sequence"
        )
    if config.model.path == "tiny" and config.sft.max_tokens > config.model.tiny.max_positions:
        yield (
            f"sft.max_tokens is {config.sft.max_tokens}; it must be at most model.tiny.max_positions, "
            f"{config.model.tiny.max_positions}"
        )


def _sampling(config: Config, command: Command) -> Iterator[str]:
    if config.rollout.temperature == 0 and command == "train":
        yield "rollout.temperature is 0; all samples of a group would be the same: it must be greater than 0 for train"
    elif config.rollout.temperature == 0 and config.eval.samples > 1:
        yield (
            f"rollout.temperature is 0 with eval.samples {config.eval.samples}; raise it, or set eval.samples "
            "to 0 (greedy only)"
        )


def _rewards(config: Config) -> Iterator[str]:
    rewards = config.scoring.rewards
    if not rewards:
        yield "scoring.rewards is empty; name at least one, as in rewards: {exact: {kind: exact}}"
    for name, spec in rewards.items():
        key = f"scoring.rewards.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            yield f"{key}: the name {name!r} must consist of letters, digits, '_' and '-'; it names a metric"
        if (name in TAKEN_NAMES or name == f"pass_at_{config.eval.samples}") and name != config.scoring.gold:
            yield f"{key}: the name {name!r} is that of another metric, reward/{name} or eval/{name}; give another"
        yield from _reward(key, spec)
        if spec.kind in ("exact", "number") and config.data.source != "task" and not config.data.answer_key:
            yield (
                f"{key}.kind is {spec.kind}, which compares with the answer, but data.answer_key is empty; "
                "name its column"
            )
    best = sum(max(spec.weight, 0.0) for spec in rewards.values())
    # The other kinds give 0 or 1.
    open_ended = any(spec.kind in ("function", "model", "http", "gold") for spec in rewards.values())
    if 0 < best < config.eval.solved_at < math.inf and not open_ended:
        yield (
            f"eval.solved_at is {config.eval.solved_at}, but the weights under scoring.rewards add up to "
            f"{best:g}: nothing "
            f"could count as solved; set it to at most {best:g}"
        )
    if rewards and all(spec.weight == 0 for spec in rewards.values()):
        yield (
            "the weight of every reward under scoring.rewards is 0; at least one must differ from 0, or "
            "there is nothing to learn"
        )


def _reward(key: str, spec: RewardSpec) -> Iterator[str]:
    if not math.isfinite(spec.weight):
        yield f"{key}.weight is {spec.weight}; it must be a finite number"
    if not (math.isfinite(spec.timeout_s) and spec.timeout_s > 0):
        yield f"{key}.timeout_s is {spec.timeout_s}; it must be a finite number, greater than 0"
    if spec.kind == "regex":
        if not spec.pattern:
            yield f"{key}.pattern is empty; kind regex needs one, as in pattern: '<answer>.*</answer>'"
        wrong = pattern_problem(spec.pattern)
        if wrong:
            yield f"{key}.pattern is {spec.pattern!r}, which is not a regular expression: {wrong}"
    elif spec.pattern:
        yield (
            f"{key}.pattern is {spec.pattern!r} and has no effect with kind {spec.kind}; set kind to regex, "
            "or take it out"
        )
    if spec.kind == "function":
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", spec.function):
            yield f"{key}.function is {spec.function!r}; kind function needs the form package.module:function"
    elif spec.function:
        yield (
            f"{key}.function is {spec.function!r} and has no effect with kind {spec.kind}; set kind to "
            "function, or take it out"
        )


def _nearest(head_dim: int) -> int:
    return min(CPU_HEAD_DIMS, key=lambda allowed: abs(allowed - head_dim))


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, min(number, 4096) + 1) if number % n == 0)
