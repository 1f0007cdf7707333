"""`rlhf-dist plan`: what a training run would take; starts nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_dist.cli import arguments
from rlhf_dist.errors import InputError, ModelError, ResourceError

if TYPE_CHECKING:
    from rlhf_dist.config.schema import Config
    from rlhf_dist.planning.hardware import Cluster
    from rlhf_dist.planning.placement import Machine


def run(argv: Sequence[str]) -> int:
    """Print placement, batches, memory and forecast of `train` on this machine, or on a cluster of the given size."""
    parser = arguments.config_parser(
        "plan",
        "Who would get which CPUs and GPUs in `train`, what each device would hold, and how long a step would take.",
    )
    parser.add_argument(
        "--cluster",
        action=arguments.Once,
        help="nodes x GPUs of each x kind, as in 4x8xH100-80G, or nodes x CPUs x CPU; ,2000G behind it: memory of each",
    )
    for name in ("CPUs", "GPUs"):
        text = f"{name} of one machine to plan for; default: this machine's"
        parser.add_argument(f"--{name.lower()}", action=arguments.Once, type=_count, help=text)
    text = "mean response assumed by the forecast; default: the longest"
    parser.add_argument("--response-tokens", action=arguments.Once, type=_count, default=0, help=text)
    args = arguments.parse(parser, argv)
    if args.cluster is not None and (args.cpus is not None or args.gpus is not None):
        raise InputError("--cluster says what each node has; take --cpus and --gpus out")
    config = arguments.load_checked(args.words, "plan", "train", files=False)
    from rlhf_dist.planning.hardware import parse_cluster
    from rlhf_dist.planning.host_memory import memory_here
    from rlhf_dist.planning.placement import Machine, count_of, local_machine

    if args.cluster is not None:
        cluster = parse_cluster(args.cluster)
        each = cluster.nodes[0]
        size = f"{each.gpus} {cluster.kind} and {each.cpus} CPUs" if each.gpus else f"{each.cpus} CPUs"
        heading = f"cluster: {count_of(len(cluster.nodes), 'node')}, each with {size}"
        return _print_plan(config, heading, cluster.nodes, cluster, cluster.host_memory, args.response_tokens)
    here = local_machine()
    machine = Machine(here.cpus if args.cpus is None else args.cpus, here.gpus if args.gpus is None else args.gpus)
    heading = f"machine: {machine.cpus} CPUs, {machine.gpus} GPUs"
    memory = memory_here() if args.cpus is None and args.gpus is None else 0
    return _print_plan(config, heading, (machine,), None, memory, args.response_tokens)


def _print_plan(
    config: Config, heading: str, nodes: Sequence[Machine], cluster: Cluster | None, memory: int, response: int
) -> int:
    """All lines; the exit code. `memory`: bytes of each node's own, 0 where it is not known.

    Raises `ResourceError` where something does not fit, after the lines.
    """
    from rlhf_dist.planning import budget_lines
    from rlhf_dist.planning.host_memory import hosts
    from rlhf_dist.planning.nodes import place_in
    from rlhf_dist.planning.plan_lines import describe, unused_lines
    from rlhf_dist.planning.shape import require_parts, shape_of

    if config.cluster.device == "cuda" and not any(node.gpus for node in nodes):
        raise ResourceError(
            f"cluster.device is cuda, but what is planned for has no GPU ({heading}); name a cluster that has, as in "
            "--cluster 1x8xH100-80G, or set cluster.device to cpu"
        )
    placement = place_in(config, nodes, "train")
    lines = [heading, *describe(placement, config, "train")]
    if stages := [name for name, stage in config.pipeline.stages.items() if stage.command == "train"]:
        lines.append(f"pipeline: planned without the keys that its stages set ({', '.join(stages)}); give them here")
    try:
        shape = shape_of(config.model)
    except ModelError as error:
        print("\n".join([*lines, f"memory and forecast: {error}"]))
        return 0
    require_parts(config, shape)
    found = budget_lines.planned_devices(config, placement, shape, cluster)
    lines += [budget_lines.model_line(config, shape), *budget_lines.memory_lines(config, placement, shape, found)]
    of_nodes, assumed = hosts(config, placement, shape, memory), cluster is not None and cluster.assumed
    lines += budget_lines.host_lines(of_nodes, assumed)
    if cluster is not None and placement.device == "cuda":
        lines += budget_lines.gpu_forecast(config, placement, shape, cluster, found, response)
    used = sum(device.count for device in found)
    lines += unused_lines(placement, len(nodes), sum(node.gpus for node in nodes), used)
    print("\n".join(lines))
    problems = budget_lines.too_large(config, found), budget_lines.too_large_for_hosts(config, of_nodes, assumed)
    if any(problems):
        raise ResourceError("; ".join(filter(None, problems)))
    return 0


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)
