"""What an actor is made from, and what every actor's process does first."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.cluster.processes import leave_signs
from rlhf_dist.config.schema import Config
from rlhf_dist.telemetry.streams import print_any_text

TUNABLES = "GLIBC_TUNABLES"
ENGINE_MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
"""For an engine on a CPU, which makes each layer anew when it loads weights.

`hugetlb`: the kernel clears two MiB at a time instead of four KiB, which takes a third off a load. `arena_max`: threads
get their memory from the process's heap. An arena of its own, as a thread has by default, grows without large pages,
and an engine lives in a thread. Without glibc, or large pages in the kernel, nothing happens.
"""

CUDNN_LAST = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
"""1: PyTorch's attention does not try cuDNN first, as it does on Hopper: cuDNN makes a plan for each new length."""
TRITON_FLOAT32 = "TRITON_F32_DEFAULT"
"""ieee: Triton's kernels, which vLLM's attention in float32 is one of, multiply in float32 and not in TF32."""


@dataclass(frozen=True, slots=True)
class ActorSpec:
    """What an actor needs to make its plain class."""

    name: str
    """For messages and its log: `rollout worker 0`."""
    config: Config
    source: str
    """The Hugging Face directory to start from."""
    device: str
    """`cpu` or `cuda`."""
    threads: int
    log: str
    """File for everything the process prints, in the run directory."""
    rank: int
    search_path: str
    """Folder of the command, where a user's own modules are."""
    loads_weights: bool = False
    """Whether pushed weights are loaded, again and again: by a rollout worker."""
    mask: str = ""
    """Of a rollout worker: the Hugging Face directory of the mask policy; empty: there is none."""
    mask_version: int = 0
    """Version of the policy that this mask goes with: 0, or that of the checkpoint resumed from."""


def enter(spec: ActorSpec) -> None:
    """Send this process's output to its log file, so that engines do not print over the user's screen."""
    path = Path(spec.log)
    path.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    leave_signs(spec.name, path)
    print_any_text(sys.stdout, sys.stderr, encoding="utf-8")
    if spec.search_path not in sys.path:
        sys.path.append(spec.search_path)  # last: a file there must not hide a library


def environment(spec: ActorSpec) -> dict[str, str]:
    """OpenMP reads its settings when torch is imported, which is before any code of ours runs in the actor.

    UTF-8 whatever the locale: torch reads files of its own without naming an encoding.
    """
    variables = {"OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONUTF8": "1"}
    wanted = {}
    if spec.device == "cpu":
        # Threads that wait for each other spin for microseconds, then sleep. Sleeping at once makes decoding slower;
        # spinning for longer takes the core from the thread that is waited for, where others use the cores too.
        variables["GOMP_SPINCOUNT"] = "2000"
        variables["KMP_BLOCKTIME"] = "1"
        if spec.loads_weights:
            wanted[TUNABLES] = ENGINE_MALLOC
    else:
        wanted[CUDNN_LAST] = "1"
        if spec.config.model.dtype == "float32":
            wanted[TRITON_FLOAT32] = "ieee"
    return variables | {name: value for name, value in wanted.items() if name not in os.environ}  # the user's stay
