"""Ranges of single numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator

from rlhf_dist.config.schema import Config

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "at least 1": (
        lambda x: x >= 1,
        """
        model.tiny.hidden_size model.tiny.intermediate_size model.tiny.layers model.tiny.heads model.tiny.kv_heads
        model.tiny.max_positions data.task.min_length data.task.max_length data.task.train_size rollout.workers
        rollout.tensor_parallel rollout.max_prompt_tokens rollout.max_response_tokens rollout.max_concurrent
        algo.group_size learner.ranks learner.micro_batch_tokens learner.updates_per_batch learner.logprob_chunk_tokens
        learner.epochs algo.correction.high algo.filter_rounds algo.mask_every
        weights.bucket_mib weights.give_up_after
        loop.steps loop.prompts_per_step loop.keep_checkpoints eval.prompts sft.steps
        sft.batch_size sft.max_tokens sft.log_every scoring.replicas scoring.batch_tokens algo.kl.horizon ptx.batch_size
        ptx.max_tokens preferences.held_out preferences.train_size preferences.max_tokens reward.steps reward.batch_size
        reward.log_every
        """,
    ),
    "between 2 and 16": (lambda x: 2 <= x <= 16, "preferences.responses"),
    "0 or more": (
        lambda x: x >= 0,
        """
        model.tiny.seed rollout.cpus rollout.top_k rollout.temperature learner.cpus learner.optimizer.warmup_steps
        learner.optimizer.weight_decay loop.max_policy_lag loop.checkpoint_every eval.every eval.samples
        sft.optimizer.warmup_steps sft.optimizer.weight_decay sft.eval_every sft.checkpoint_every telemetry.samples
        telemetry.samples_every algo.advantage_clip algo.entropy_coef algo.kl_stop algo.off_policy_limit algo.kl.coef
        algo.shaping.missing_end_penalty algo.shaping.clip algo.shaping.overlong_buffer algo.shaping.overlong_penalty
        algo.shaping.repetition_penalty critic.warmup_steps critic.clip critic.coef
        critic.optimizer.warmup_steps critic.optimizer.weight_decay reference.replicas reference.update_every ptx.coef
        reward.lm_coef reward.optimizer.warmup_steps reward.optimizer.weight_decay reward.patience
        reward.eval_every
        """,
    ),
    "greater than 0": (
        lambda x: x > 0,
        """
        rollout.kv_cache_gib rollout.timeout_s scoring.timeout_s learner.timeout_s weights.timeout_s
        loop.logprob_diff_limit cluster.start_timeout_s learner.optimizer.lr learner.optimizer.eps
        learner.optimizer.max_grad_norm sft.optimizer.lr sft.optimizer.eps sft.optimizer.max_grad_norm algo.kl.target
        preferences.noise critic.optimizer.lr critic.optimizer.eps critic.optimizer.max_grad_norm reward.optimizer.lr
        reward.optimizer.eps reward.optimizer.max_grad_norm algo.clip_high
        """,
    ),
    "greater than 0 and at most 1": (
        lambda x: 0 < x <= 1,
        "rollout.top_p rollout.gpu_memory_utilization algo.clip_low algo.entropy_share",
    ),
    "greater than 0 and less than 1": (lambda x: 0 < x < 1, "algo.mask_top_p"),
    "at least 0 and less than 1": (
        lambda x: 0 <= x < 1,
        """
        learner.optimizer.beta1 learner.optimizer.beta2 sft.optimizer.beta1 sft.optimizer.beta2 critic.optimizer.beta1
        critic.optimizer.beta2 reward.optimizer.beta1 reward.optimizer.beta2 learner.ema_decay reference.ema
        """,
    ),
    "between 0 and 1": (
        lambda x: 0 <= x <= 1,
        """
        learner.optimizer.final_lr_share sft.optimizer.final_lr_share critic.optimizer.final_lr_share
        reward.optimizer.final_lr_share sft.wrong_share algo.gamma algo.lam algo.correction.low
        """,
    ),
    "0 (off) or greater than 1": (lambda x: x == 0 or x > 1, "algo.dual_clip"),
    "0, 1, 2 or 3": (lambda x: x in (0, 1, 2, 3), "learner.zero_stage"),
    "between 0 and 4294967295": (lambda x: 0 <= x < 2**32, "seed"),
    "a finite number": (math.isfinite, "eval.solved_at preferences.rating_min preferences.rating_max"),
}
"""What is right -> test, keys. Every number of the schema outside `scoring.rewards` is in one row."""


def ranged_keys() -> set[str]:
    """The keys whose range is checked."""
    return {key for _, keys in _RANGES.values() for key in keys.split()}


def range_problems(config: Config) -> Iterator[str]:
    """A sentence for each number that is out of its range."""
    for right, (test, keys) in _RANGES.items():
        for key in keys.split():
            value = operator.attrgetter(key)(config)
            if not math.isfinite(value):
                yield f"{key} is {value}; it must be a finite number, {right}"
            elif not test(value):
                yield f"{key} is {value}; it must be {right}"
