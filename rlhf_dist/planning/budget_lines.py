"""Memory and forecast in words, and what to change where memory does not suffice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlhf_dist.config.checks import check
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import InputError
from rlhf_dist.planning.device_memory import Device, devices, shared_memory
from rlhf_dist.planning.forecast import (
    Forecast,
    Lengths,
    assumed_lengths,
    forecast,
    gpu_rates,
    split_into,
    splits,
)
from rlhf_dist.planning.hardware import KINDS, Cluster
from rlhf_dist.planning.host_memory import Host, hosts
from rlhf_dist.planning.nodes import place_in
from rlhf_dist.planning.placement import Placement, count_of
from rlhf_dist.planning.shape import ModelShape

GB = 1e9
SAY_MEMORY = "as such nodes usually have; say what yours have, as in --cluster 4x8xH100-80G,2000G"
WORTH_SAYING = 0.95
"""A split of the GPUs that takes less than this share of the planned step's time is named."""


def model_line(config: Config, shape: ModelShape) -> str:
    """Which model is planned for."""
    return (
        f"model: {config.model.path}, {shape.parameters / 1e6:,.0f} million parameters, {shape.layers} layers, "
        f"{config.model.dtype}"
    )


def memory_lines(config: Config, placement: Placement, shape: ModelShape, found: Sequence[Device]) -> list[str]:
    """A line for each kind of device, and one for the nodes' shared memory."""
    lines = []
    for device in found:
        of = f" of {device.capacity / GB:.0f}" if device.capacity else ""
        parts = ", ".join(f"{name} {size / GB:.3g}" for name, size in device.parts.items() if size)
        gpu = "'s GPU" if placement.device == "cuda" else ""
        lines.append(f"memory of each {device.name}{gpu} ({device.count}): {device.total / GB:.3g}{of} GB: {parts}")
        if device.cache_tokens:
            longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
            lines.append(
                f"key-value cache: {device.cache_tokens:,} tokens an engine, "
                f"{device.cache_tokens // longest:,} sequences of {longest:,} tokens"
            )
    if placement.learner_ranks and placement.rollout_workers:
        room = shared_memory(config, shape) / GB
        if room:
            more = len({*placement.worker_nodes, placement.learner_node}) > 1
            where = "the learner's node and each node with rollout workers" if more else "the node"
            lines.append(f"/dev/shm: {room:.3g} GB on {where}, for two copies of the weights")
    return lines


def host_lines(found: Sequence[Host], assumed: bool) -> list[str]:
    """A line for each kind of node; `assumed`: how much memory they have is not known, but usual."""
    lines = []
    for host in found:
        of = f" of {host.capacity / GB:.0f}" if host.capacity else ""
        parts = ", ".join(f"{name} {size / GB:.3g}" for name, size in host.parts.items())
        nodes = f"each of {host.count} nodes" if host.count > 1 else "the node"
        lines.append(f"main memory of {nodes} with {host.who}: {host.total / GB:.3g}{of} GB: {parts}")
    if assumed:
        lines.append(f"main memory is assumed to be {found[0].capacity / GB:.0f} GB a node, {SAY_MEMORY}")
    return lines


def too_large_for_hosts(config: Config, found: Sequence[Host], assumed: bool) -> str:
    """As `too_large`, of the nodes' own memory."""
    problems = []
    for host in found:
        if host.fits:
            continue
        largest_first = sorted(host.parts, key=lambda name: -host.parts[name])
        ways = [way for name in largest_first[:3] for way in _ways_out_of_host(config, name)]
        largest = ", ".join(dict.fromkeys(ways))
        nodes = f"{host.count} nodes" if host.count > 1 else "a node"
        problems.append(
            f"{nodes} with {host.who} would need {host.total / GB:.3g} GB of main memory "
            f"and have {host.capacity / GB:.0f}: {largest}{f'; {SAY_MEMORY}' if assumed else ''}"
        )
    return "; ".join(problems)


def too_large(config: Config, found: Sequence[Device]) -> str:
    """What does not fit and which keys would help; empty where all fits."""
    problems = []
    for device in found:
        no_cache = device.without_cache
        if device.fits and not no_cache:
            continue
        need = f"a {device.name} needs {device.total / GB:.3g} GB of {device.capacity / GB:.0f}"
        what = f"{need}, and has no room for a key-value cache" if no_cache else need
        problems.append(f"{what}: {_way_out(config, device)}")
    return "; ".join(problems)


def forecast_lines(planned: Forecast, lengths: Lengths, basis: str) -> list[str]:
    """What a step takes, phase by phase, and which side waits."""
    turns = "at once" if planned.at_once else "in turn"
    times = planned.step, planned.generate, planned.score, planned.train, planned.sync
    step, generate, score, train, push = map(_seconds, times)
    behind = f"; oldest tokens {count_of(planned.lag, 'version')} behind" if planned.lag else ""
    return [
        f"forecast ({basis}): {step} s a step, {planned.tokens / planned.step:,.0f} response tokens a "
        f"second, for prompts of {lengths.prompt:.0f} and responses of {lengths.response:.0f} tokens",
        f"forecast of the phases, {turns}: generate {generate} s (scoring in it {score}), "
        f"train {train} s, push {push} s; the longest is {planned.bottleneck}",
        f"forecast of waiting: rollout workers {planned.rollout_idle:.0%} of the time, learner "
        f"{planned.learner_idle:.0%}{behind}",
    ]


def _seconds(time: float) -> str:
    return f"{time:,.0f}" if time >= 1000 else f"{time:.3g}"


def gpu_forecast(
    config: Config, placement: Placement, shape: ModelShape, cluster: Cluster, found: Sequence[Device], response: int
) -> list[str]:
    """The forecast on a cluster of known GPUs, and the split of them that makes a step shortest. `response`: 0: all."""
    assert cluster.gpu is not None
    rates = gpu_rates(cluster.gpu, config.model.dtype, config.rollout.enforce_eager)
    lengths = assumed_lengths(config, response)
    cache = min((device.cache_tokens for device in found if device.cache_tokens), default=0)
    planned = forecast(config, placement, shape, rates, lengths, cache)
    lines = forecast_lines(planned, lengths, f"from the data sheet of {cluster.kind}, not measured")
    if other := direct_transport(config):
        placed = placement_or_why(other, cluster, shape)
        step = planned.step if isinstance(placed, str) else forecast(other, placed, shape, rates, lengths, cache).step
        if step < WORTH_SAYING * planned.step:
            lines.append(f"weights.transport={other.weights.transport} would take {_seconds(step)} s a step")
    if placement.paired:
        return lines
    found_splits = splits(config, placement, cluster.nodes, shape, rates, lengths, cache)
    faster = [split for split in found_splits if split[0] < WORTH_SAYING * planned.step]
    # Where the given one does not fit, only a split that does is worth a word.
    said = split_line(config, cluster, shape, faster, bool(too_large(config, found)))
    return [*lines, f"split of these GPUs: {said}"] if said else lines


def split_line(
    config: Config, cluster: Cluster, shape: ModelShape, faster: Sequence[tuple[float, int, int]], too_small: bool
) -> str:
    """The fastest of these splits that fits; if none does, why the first does not, unless the given is `too_small`."""
    first = ""
    for step, workers, ranks in faster:
        named = f"rollout.workers={workers} learner.ranks={ranks} would take {_seconds(step)} s a step"
        placed = placement_or_why(split_into(config, workers, ranks), cluster, shape)
        if not isinstance(placed, str):
            return named
        first = first or f"no other that fits is more than 5% faster; {named}, but {placed}"
    return "" if too_small else first or "no other is more than 5% faster"


def placement_or_why(config: Config, cluster: Cluster, shape: ModelShape) -> Placement | str:
    """Of a config that passes its checks and fits the cluster's GPUs and nodes; of another why not, in short."""
    try:
        check(config, "train", files=False)
        placement = place_in(config, cluster.nodes, "train")
    except InputError as error:
        return str(error).splitlines()[0].split("; ")[0]
    problem = too_large(config, planned_devices(config, placement, shape, cluster)) or too_large_for_hosts(
        config, hosts(config, placement, shape, cluster.host_memory), cluster.assumed
    )
    return problem.split(": ")[0] or placement


def direct_transport(config: Config) -> Config | None:
    """The config with weights sent straight to the engines; None where it has that, or its other keys forbid it."""
    if config.weights.transport != "shared_memory":
        return None
    other = replace(
        config, weights=replace(config.weights, transport="ipc" if config.cluster.colocate else "broadcast")
    )
    try:
        check(other, "train", files=False)
    except InputError:
        return None
    return other


def capacity_of(cluster: Cluster | None) -> int:
    """Bytes of one GPU; 0 where it is not known."""
    return 0 if cluster is None or cluster.gpu is None else KINDS[cluster.kind].memory


def planned_devices(config: Config, placement: Placement, shape: ModelShape, cluster: Cluster | None) -> list[Device]:
    """See `devices`."""
    return devices(config, placement, shape, capacity_of(cluster))


def _way_out(config: Config, device: Device) -> str:
    """Keys that would make what it holds at its peak smaller, those that cost least first."""
    held = {name.split(": ")[-1] for name, size in device.parts.items() if size}
    learner, memory = config.learner, f"rollout.gpu_memory_utilization ({config.rollout.gpu_memory_utilization:g})"
    ways = []
    if "activations" in held:
        ways += [] if config.model.gradient_checkpointing else ["set model.gradient_checkpointing to true"]
        ways.append(f"lower learner.micro_batch_tokens ({learner.micro_batch_tokens})")
    if "optimizer" in held:
        ways += ["set learner.zero_stage to 3"] if learner.zero_stage < 3 and learner.ranks > 1 else []
        stage = "" if learner.zero_stage > 1 else " and learner.zero_stage to 2"
        ways += [f"set learner.offload to optimizer{stage}", "raise learner.ranks (more GPUs)"]
    if device.without_cache:
        ways += [] if "pair" in device.name else ["raise rollout.tensor_parallel"]
        ways.append(f"raise {memory}")
    elif "key-value cache" in held:
        ways.append(f"lower {memory}")
    if any("servers" in name for name in held):
        ways.append("set cluster.server_gpu_share to 1 (GPUs of their own)")
    return ", ".join(ways) or "use GPUs with more memory"


def _ways_out_of_host(config: Config, part: str) -> list[str]:
    """Keys that make one part of a node's main memory smaller."""
    workers = f"lower rollout.workers ({config.rollout.workers})"
    if part == "rollout workers":
        return [f"lower rollout.kv_cache_gib ({config.rollout.kv_cache_gib:g})", workers]
    if part in ("learner ranks", "critic ranks"):
        again = [] if config.model.gradient_checkpointing else ["set model.gradient_checkpointing to true"]
        raised = ["raise learner.zero_stage to 2"] if config.learner.zero_stage < 2 and config.learner.ranks > 1 else []
        return [*again, f"lower learner.micro_batch_tokens ({config.learner.micro_batch_tokens})", *raised]
    if part == "weights for pushes":
        other = direct_transport(config)
        sent = [f"set weights.transport to {other.weights.transport}"] if other else []
        return sent + ([] if config.model.dtype == "bfloat16" else ["set model.dtype to bfloat16"])
    return {
        "optimizer": ["set learner.offload to none", "use more nodes"],
        "sleeping engines": ["set cluster.colocate to false", workers],
        "servers": ["lower scoring.replicas or reference.replicas"],
        "moving average": ["set learner.ema_decay to 0"],
        "changed words": ["set learner.delta_push to false"],
        "experiences": ["lower loop.prompts_per_step or rollout.max_response_tokens"],
        "processes": [workers, f"lower learner.ranks ({config.learner.ranks})"],
    }.get(part, [])
