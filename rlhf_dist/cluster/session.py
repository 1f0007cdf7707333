"""The Ray session of a command: join a Ray job's cluster, or start one here; reserve what the plan needs."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlhf_dist.cluster import local_ray, signals
from rlhf_dist.cluster.address import check_cluster, joins_cluster
from rlhf_dist.cluster.compile_cache import VARIABLE, compile_cache
from rlhf_dist.cluster.private_folder import SESSION, TEMPORARY, private_folder, temporary_parent
from rlhf_dist.cluster.processes import lost_ray
from rlhf_dist.config.schema import ClusterConfig
from rlhf_dist.errors import RayLost, ResourceError
from rlhf_dist.planning.placement import NODE, Machine, local_machine
from rlhf_dist.telemetry.timeline import Patience

LOOPBACK = "127.0.0.1"
RAY_LOGS = ("gcs_server.out", "gcs_server.err", "raylet.out", "raylet.err")
LOG_LIMIT = 2**20
"""Bytes of a log that are kept."""


def prepare(config: ClusterConfig) -> None:
    """Settings that Ray reads once, when it is imported: call this first, before anything heavy is imported.

    A local Ray asks for a token, made up for this session, so that no other user of the machine can send it work.

    Raises `ResourceError` where the cluster to join does not answer, or there is no folder for temporary files.
    """
    if joins_cluster(config):
        check_cluster(config)
    else:
        temporary_parent(os.environ)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # 0 GPUs asked for has to mean that CUDA_VISIBLE_DEVICES is left alone: Ray's coming default.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not joins_cluster(config):
        # Ray would give its workers the lowest priority but four: whatever else ran on the machine would come first.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Ray would start a process for each CPU to wait for tasks, and there are none: every actor has its own.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        os.environ.pop("RAY_ADDRESS", None)
        # torch chooses a folder when it is imported, and the workers get this process's choice.
        if cache := compile_cache(os.environ):
            os.environ[VARIABLE] = str(cache)
        # Named for other systems, where it is off: on Linux too it makes Ray take loopback as the node's address, and
        # listen there only. `_node_ip_address` alone does not: Ray replaces a loopback address by the outside one.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def nodes_of_cluster(nodes: Sequence[Mapping[str, Any]], own: str) -> tuple[Machine, ...]:
    """The living nodes that Ray lists, the command's own first; `own`: its address."""
    living = [node for node in nodes if node["Alive"]]
    found = [
        Machine(int(has.get("CPU", 0)), int(has.get("GPU", 0)), node["NodeManagerAddress"])
        for node, has in ((node, node["Resources"]) for node in living)
    ]
    return tuple(sorted(found, key=lambda node: node.address != own))


def cluster_nodes() -> tuple[Machine, ...]:
    """Of the Ray cluster that was joined."""
    import ray

    return nodes_of_cluster(ray.nodes(), ray.util.get_node_ip_address())


@contextmanager
def ray_session(config: ClusterConfig, logs: Path, tell: Callable[[str], None]) -> Iterator[tuple[Machine, ...]]:
    """Ray, up for the time of the block; yields what to plan for: this machine, or the nodes of the cluster.

    A local one listens on loopback only, and keeps its files in a folder that only this user can enter and that is
    removed with it; when the block fails, the logs of Ray's own processes are copied to `logs`. `tell` gets a line for
    the user where that folder is not where the environment says. A session inside a session is the same one.
    """
    join = joins_cluster(config)
    assert join or os.environ.get("RAY_AUTH_MODE") == "token", "call prepare() before ray is imported"
    machine = local_machine()
    import ray

    if ray.is_initialized():
        yield cluster_nodes() if join else (machine,)
        return
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if join:
        try:
            start_ray(settings | {"address": "auto"})
            yield cluster_nodes()
        finally:
            local_ray.shut_down()
        return
    settings |= {
        "address": "local",
        "num_cpus": machine.cpus,
        "num_gpus": machine.gpus,
        "include_dashboard": False,
        "_node_ip_address": LOOPBACK,
    }
    parent, note = temporary_parent(os.environ)
    if note:
        tell(note)
    signals.require_none()
    with private_folder(parent) as folder, kept_on_failure(folder, logs):
        try:
            with temporary_files_in(folder / TEMPORARY):
                start_ray(settings | {"_temp_dir": str(folder / SESSION)})
            yield (machine,)
        except KeyboardInterrupt:
            if signals.has_come():
                local_ray.end_at_once(folder)  # Somebody waits at the keyboard.
            raise
        finally:
            local_ray.shut_down()


def start_ray(settings: Mapping[str, Any]) -> None:
    """`ray.init`, with its errors in one line. Raises `RayLost`."""
    import ray

    try:
        with local_ray.starting():
            ray.init(**settings)
    except Exception as error:  # Ray's own errors have many types, and no common one
        raise RayLost(f"Ray did not start: {' '.join(str(error).split()) or type(error).__name__}") from None


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """What starts in the block, and what that starts, has its temporary files in `folder`; this process does not."""
    tempfile.gettempdir()  # Python remembers the first answer
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["TMPDIR"]
        if before is not None:
            os.environ["TMPDIR"] = before


@contextmanager
def kept_on_failure(folder: Path, logs: Path) -> Iterator[None]:
    """When the block fails, copy the logs of Ray's own processes from the session's `folder` to `logs`."""
    try:
        yield
    except Exception:
        for name in RAY_LOGS:
            with suppress(OSError):
                copy_end(folder / SESSION / "session_latest" / "logs" / name, logs / name)
        raise


def copy_end(source: Path, target: Path) -> None:
    """Copy the end of a log, for this user's eyes only; not one that holds the session's token."""
    with source.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_LIMIT))
        data = file.read(LOG_LIMIT)
    token = os.environ.get("RAY_AUTH_TOKEN", "").encode()
    if data and not (token and token in data):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch(mode=0o600)
        target.write_bytes(data)


@contextmanager
def reserve(bundles: Sequence[Mapping[str, float]], timeout_s: float) -> Iterator[Any]:
    """A placement group: all on one node, or each place on the node that it names.

    With the block its actors end, so that another run in the same session finds room.

    Raises `ResourceError` when there is no room within `timeout_s`.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    from rlhf_dist.cluster.waits import wait

    pinned = any(name.startswith(NODE) for bundle in bundles for name in bundle)
    wanted = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
    group = placement_group(wanted, strategy="PACK" if pinned else "STRICT_PACK")
    try:
        if not wait([group.ready()], Patience(timeout_s)):
            cpus = sum(bundle["CPU"] for bundle in bundles)
            gpus = sum(bundle["GPU"] for bundle in bundles)
            who = "the nodes of the plan do not have" if pinned else "no node of the cluster has"
            raise ResourceError(
                f"{who} {cpus:g} CPUs and {gpus:g} GPUs free within {timeout_s:g} s "
                "(cluster.start_timeout_s); free some, or lower rollout.workers, learner.ranks or their cpus"
            )
        yield group
    finally:
        if lost_ray() is None:
            remove_placement_group(group)
