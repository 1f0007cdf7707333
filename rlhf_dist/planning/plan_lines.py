"""A placement in words: who gets what, and the arithmetic of the batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from rlhf_dist.config.prefer_keys import PREFER_METHODS
from rlhf_dist.config.schema import Config
from rlhf_dist.planning.nodes import MANY_NODES
from rlhf_dist.planning.placement import Command, Placement, count_of


def describe(placement: Placement, config: Config, command: Command) -> list[str]:
    """Lines for a reader: who gets what, and the arithmetic of the batches."""
    p = placement
    lines = [f"device: {p.device}"]
    if p.rollout_workers:
        who = count_of(p.rollout_workers, "worker")
        lines.append(
            f"rollout: {who}, each {_share(p.rollout_threads, p.rollout_gpus, p.rollout_num_cpus, p.rollout_num_gpus)}"
        )
    if p.learner_ranks:
        who = f"{count_of(p.learner_ranks, 'rank')}, ZeRO-{config.learner.zero_stage}"
        who += f" ({p.critic_ranks} of them the critic's own)" if p.critic_ranks else ""
        lines.append(
            f"learner: {who}, each {_share(p.learner_threads, p.learner_gpus, p.learner_num_cpus, p.learner_num_gpus)}"
        )
    if p.rollout_workers and p.learner_ranks:
        lines.append(f"rollout and learner {_halves(config)}; scoring takes no CPU in Ray's books")
    if p.rollout_workers:
        servers = count_of(config.scoring.replicas, "scoring server")
        if config.reference.replicas and command == "train":
            servers += f" and {count_of(config.reference.replicas, 'reference server')}"
        lines.append(f"scoring: {servers}, each {count_of(p.scoring_threads, 'CPU thread')}")
    if p.servers:
        lines.append(f"GPUs of scoring: {count_of(len(p.servers), 'server')} with a model, each {_booked(p)}")
    if p.worker_nodes or p.rank_nodes:
        sides = (("rollout workers", Counter(p.worker_nodes)), ("learner ranks", Counter(p.rank_nodes)))
        lines.append(f"nodes: {'; '.join(f'{who} {_spread(side)}' for who, side in sides if side)}")
    lines += LINES[command](config)
    if p.rollout_workers:
        samples = f" and {config.eval.samples} samples" if config.eval.samples else ""
        lines.append(f"evaluation: {config.eval.prompts} held-out prompts, each with 1 greedy response{samples}")
    if command != "eval":
        lines.append(f"run directory: {config.output}/{config.name}")
    return lines


def unused_lines(placement: Placement, nodes: int, gpus: int, used: int) -> list[str]:
    """A line where some of the nodes' GPUs, of which so many are used, or on CPUs whole nodes, are left over."""
    total, what = (gpus, "GPU") if placement.device == "cuda" else (nodes, "node")
    free = total - (used if what == "GPU" else len({*placement.worker_nodes, *placement.rank_nodes}) or 1)
    more = "rollout.workers and learner.ranks say how many are used"
    return [f"not used: {free:,} of {count_of(total, what)}; {more}"] if free else []


def _spread(side: Counter[str]) -> str:
    """`3 on 10.0.0.1, 2 on 10.0.0.4`; of many nodes how many have as many."""
    if len(side) <= MANY_NODES:
        return ", ".join(f"{count} on {node}" for node, count in side.items())
    return ", ".join(f"{count} on each of {nodes} nodes" for count, nodes in Counter(side.values()).items())


def _booked(placement: Placement) -> str:
    if placement.server_num_gpus == 1:
        return "a GPU of its own"
    beside = "rollout worker" if placement.servers[0] < placement.rollout_workers else "learner rank"
    return f"{placement.server_num_gpus:g} of a {beside}'s GPU and of its memory"


def _halves(config: Config) -> str:
    """Where and when the two work."""
    lag, own = config.loop.max_policy_lag, "have devices of their own"
    if lag == 0:
        return "take turns on the same devices" if config.cluster.colocate else f"{own}, and take turns"
    ago = count_of(lag, "version")
    return f"{'share the devices' if config.cluster.colocate else own}, and work at once, on tokens at most {ago} old"


def _train_lines(config: Config) -> list[str]:
    loop, updates = config.loop, config.learner.updates_per_batch
    passes = f", {config.learner.epochs} passes" if config.learner.epochs > 1 else ""
    rows = loop.prompts_per_step * config.algo.group_size
    tokens = rows * config.rollout.max_response_tokens
    return [
        f"step: {loop.prompts_per_step} prompts x {config.algo.group_size} samples = {rows} responses, at most "
        f"{tokens:,} "
        f"response tokens, {count_of(updates, 'optimizer step')} of {rows // updates} responses each{passes}",
        f"run: {count_of(loop.steps, 'step')}, {loop.steps * rows:,} responses, "
        f"{count_of(loop.steps * updates * config.learner.epochs, 'optimizer step')}",
        f"micro-batches: at most {config.learner.micro_batch_tokens} tokens each",
    ]


def _sft_lines(config: Config) -> list[str]:
    sft = config.sft
    return [
        f"step: {sft.batch_size} sequences of at most {sft.max_tokens} tokens",
        f"run: {count_of(sft.steps, 'optimizer step')}, {sft.steps * sft.batch_size:,} sequences",
        f"micro-batches: at most {config.learner.micro_batch_tokens} tokens each",
    ]


def _reward_lines(config: Config) -> list[str]:
    reward = config.reward
    return [
        f"step: {reward.batch_size} judgements of at most {config.preferences.max_tokens} tokens a response",
        f"run: at most {count_of(reward.steps, 'optimizer step')}, {reward.steps * reward.batch_size:,} judgements",
        f"micro-batches: at most {config.learner.micro_batch_tokens} tokens each",
    ]


def _prefer_lines(config: Config) -> list[str]:
    prefer = config.prefer
    reference = [f"reference: {prefer.reference}, read once before training"]
    return [
        *(reference if PREFER_METHODS[prefer.method].reference else []),
        f"step: {prefer.batch_size} judgements of at most {config.preferences.max_tokens} tokens a response, by "
        f"{prefer.method}",
        f"run: {count_of(prefer.steps, 'optimizer step')}, {prefer.steps * prefer.batch_size:,} judgements",
        f"micro-batches: at most {config.learner.micro_batch_tokens} tokens each",
    ]


LINES: dict[Command, Callable[[Config], list[str]]] = {
    "train": _train_lines,
    "sft": _sft_lines,
    "reward": _reward_lines,
    "prefer": _prefer_lines,
    "eval": lambda _: [],
}
"""Command -> the arithmetic of its batches."""


def _share(threads: int, gpus: int, num_cpus: float, num_gpus: float) -> str:
    devices = count_of(threads, "CPU thread") + (f" and {count_of(gpus, 'GPU')}" if gpus else "")
    booked = f"{num_cpus:g} CPU" + (f", {num_gpus:g} GPU" if gpus else "")
    why = "shared, so each books half in Ray" if num_cpus < threads else "Ray"
    return f"{devices} ({why}: {booked})"
