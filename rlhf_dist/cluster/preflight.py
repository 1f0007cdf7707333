"""What can be known to be wrong before a process is started or a file written."""

from __future__ import annotations

import shutil
from collections.abc import Container
from dataclasses import replace
from pathlib import Path

from rlhf_dist.cluster import learner_hosts as hosts
from rlhf_dist.cluster.address import joins_cluster
from rlhf_dist.cluster.importing import importing
from rlhf_dist.cluster.row_checks import check_texts, read_data
from rlhf_dist.cluster.sources import (
    check_critic,
    check_prefer_reference,
    check_reference,
    check_run_models,
    preflight_rewards,
)
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ModelError, ResourceError
from rlhf_dist.loop.kept_state import COPIES
from rlhf_dist.loop.run_lock import require_place
from rlhf_dist.models.weight_files import read_headers
from rlhf_dist.planning.memory import BYTES
from rlhf_dist.planning.placement import Command, local_machine, place
from rlhf_dist.planning.shape import shape_of
from rlhf_dist.planning.transports import MIB
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.direct_reader import largest
from rlhf_dist.weights.shared_memory import MAKE_ROOM, SHARED_MEMORY, require_room, size_text, sweep


@importing()
def check_before_start(config: Config, command: Command, resume: bool = False, skip: Container[str] = ()) -> list[str]:
    """Everything that can be known to be wrong before a process is started or a file written; returns what to warn of.

    A resume reads its data again and leaves out the checks of its texts, which the run has passed: the model that it
    began with may be gone. `skip`: keys whose model the run will not read.
    """
    require_place(config.output, config.name)
    check_run_models(config, command, skip)
    if not joins_cluster(config.cluster):
        place(config, local_machine(), command)
    if command in ("train", "eval"):
        preflight_rewards(config)
        check_reference(config)
    if command == "train":
        check_critic(config)
    if command == "prefer" and "prefer.reference" not in skip:
        check_prefer_reference(config)
    rows = read_data(config, command)
    return [] if resume else check_texts(config, command, rows)


def require_shared_memory(source: str, config: Config) -> None:
    """Refuse to start where pushes of the weights of the model `source` would find no room on this machine.

    Raises `ResourceError`, or `ModelError` for a file that is damaged.
    """
    if joins_cluster(config.cluster):
        return  # the run may be on another node
    kept = kept_bytes(source, config)
    if config.weights.transport == "shared_memory":
        require_room(pushed_bytes(source, config), kept)
        return
    if kept:
        require_room(0, kept)
    sweep(SHARED_MEMORY)  # what runs before this one left, which may have had another transport
    if config.weights.transport == "ipc":
        _require_bucket(source, config)


def pushed_bytes(source: str, config: Config) -> int:
    """Of the weights of the model `source` as they are pushed; 0 where its sizes are not known."""
    folder, dtype = Path(source), config.model.dtype
    if not folder.is_dir():
        return weight_bytes(source, config)
    stored = read_headers(folder)
    return make_plan(((name, tensor.shape, dtype) for name, tensor in stored.items()), bucket_bytes=1).nbytes


def disk_need(source: str, config: Config, command: Command) -> int:
    """Bytes of the checkpoints kept: weights, and three float32 copies by the optimizer.

    A critic with its own trunk takes as much again; a moving average is float32; a reference that moves and a mask
    policy are like the model.
    """
    kept = config.loop.keep_checkpoints + config.loop.keep_best if command in ("train", "eval") else 1
    return checkpoint_bytes(source, config, command) * (kept + 1)


def kept_bytes(source: str, config: Config) -> int:
    """Of what `learner.keep_state_every` holds in shared memory, at most."""
    return COPIES * checkpoint_bytes(source, config, "train") if config.learner.keep_state_every else 0


def checkpoint_bytes(source: str, config: Config, command: Command) -> int:
    """Of one checkpoint, see `disk_need`."""
    weights = weight_bytes(source, config)
    width = 1 if config.model.dtype == "float32" else 2
    parts = float(1 + 3 * width)
    if command == "train":
        parts *= 2 if hosts.algorithm(config.algo).needs_critic and not hosts.shares_trunk(config) else 1
        parts += width if config.learner.ema_decay else 0
        parts += 1 if config.reference.update_every else 0
        parts += 1 if hosts.algorithm(config.algo).mask is not None else 0
    return int(weights * parts)


def weight_bytes(source: str, config: Config) -> int:
    """Of the model at `source` in `model.dtype`; of a hub name that is not downloaded yet by its sizes, if known."""
    folder = Path(source)
    if folder.is_dir():
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    try:
        return BYTES[config.model.dtype] * shape_of(replace(config.model, path=source)).parameters
    except ModelError:
        return 0


def _require_bucket(source: str, config: Config) -> None:
    """On CPUs learner and rollout workers see one bucket at a time in shared memory; on GPUs it is on the device."""
    if place(config, local_machine(), "train").device == "cuda":
        return
    folder, dtype, needed = Path(source), config.model.dtype, config.weights.bucket_mib * MIB
    if folder.is_dir():
        stored = read_headers(folder)
        needed = largest(make_plan(((name, tensor.shape, dtype) for name, tensor in stored.items()), needed))
    else:
        needed = min(needed, weight_bytes(source, config))
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise ResourceError(
            f"{SHARED_MEMORY}: pushes by weights.transport ipc need {size_text(needed)} for a bucket of weights, and "
            f"{size_text(free, up=False)} are free; lower weights.bucket_mib, or {MAKE_ROOM}"
        )
