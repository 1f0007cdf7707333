"""The checks of `bench gpu` that need no model: the machine, what is installed, a compiled function."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from _gpu_side import Checks, LeftOut, Verdict, Work, run_side

from rlhf_dist.cluster.node_probe import wrong_pins
from rlhf_dist.planning.device_memory import shared_memory
from rlhf_dist.planning.shape import shape_of

LEAST_DRIVER = 580
"""For CUDA 13."""
LEAST_SHARED = 8 * 10**9
"""Bytes of /dev/shm on a machine with a GPU: two copies of a small model, and Ray's object store."""
SHARED_MEMORY = Path("/dev/shm")
QUERY = ("name", "driver_version", "compute_mode", "memory.free", "memory.total")
LIBRARIES = ("torch", "transformers", "deepspeed", "ray", "vllm")
GPU_LIMIT_S = 10.0


def checks(work: Work) -> Checks:
    """By name."""
    found = {"machine": machine, "imports": imports, "compile": compiled}
    return {name: partial(check, work) for name, check in found.items()}


def machine(work: Work) -> Verdict:
    """The facts that GPUs, vLLM, Triton and a push rest on."""
    config = work.read_config()
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, shared_memory(config, shape_of(config.model))
    needed = max(needed, LEAST_SHARED) if work.on_gpu else needed
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    compiler = shutil.which("cc") or shutil.which("gcc")
    asked = {f"{SHARED_MEMORY} has {free / 1e9:.1f} GB free (at least {needed / 1e9:.1f})": free >= needed}
    figures: dict[str, Any] = {
        "shared_memory_free": free,
        "python_header": str(header) if header.exists() else None,
        "compiler": compiler,
        "disk_free": shutil.disk_usage(Path.cwd()).free,
    }
    if not work.on_gpu:
        return Verdict(asked, figures, ("driver, compute mode, free memory of the GPU: they need a GPU",))
    asked[f"{header} {'is there' if header.exists() else 'is missing'}"] = header.exists()
    asked[f"C compiler: {compiler or 'none'}"] = compiler is not None
    gpus: list[dict[str, str]] = [dict(zip(QUERY, line.split(", "), strict=True)) for line in asked_of_driver()]
    unknown = tuple(
        f"GPU {number}: {name}, of which nvidia-smi says {said}"
        for number, gpu in enumerate(gpus)
        for name, said in gpu.items()
        if is_unknown(said)
    )
    for number, gpu in enumerate(gpus):
        asked |= {f"GPU {number}: {text}": met for text, met in asked_of_gpu(gpu).items()}
    return Verdict(asked, figures | {"gpus": gpus}, unknown)


def is_unknown(said: str) -> bool:
    """Such as [N/A], for the memory of a GPU that is divided (MIG)."""
    return said.startswith("[")


def asked_of_gpu(gpu: Mapping[str, str]) -> dict[str, bool]:
    """`gpu`: `QUERY` and what nvidia-smi says; what it does not know is not asked."""
    driver, mode, free, total = (gpu[name] for name in QUERY[1:])
    asked = dict[str, bool]()
    if not is_unknown(driver):
        asked[f"driver {driver} (at least {LEAST_DRIVER})"] = int(driver.split(".")[0]) >= LEAST_DRIVER
    if not is_unknown(mode):
        asked[f"compute mode {mode} (Default)"] = mode == "Default"
    if not (is_unknown(free) or is_unknown(total)):
        share = float(free.split()[0]) / float(total.split()[0])
        asked[f"{share:.0%} of {total} free (at least 95%)"] = share >= 0.95
    return asked


def asked_of_driver() -> list[str]:
    """`QUERY` of each GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GPU_LIMIT_S).stdout.splitlines()


def imports(work: Work) -> Verdict:
    """Each library imports, in the version that is pinned, for this device."""
    seconds, versions = dict[str, float](), dict[str, str]()
    for name in LIBRARIES:
        begun = time.perf_counter()
        versions[name] = str(importlib.import_module(name).__version__)
        seconds[name] = time.perf_counter() - begun
    wrong = wrong_pins(metadata.requires("rlhf-dist") or [], versions)
    asked = {"; ".join(wrong) or ", ".join(f"{name} {version}" for name, version in versions.items()): not wrong}
    import torch
    from vllm.platforms import current_platform

    asked |= loaded_kernels()
    kind = str(current_platform.device_type)
    asked[f"vLLM computes on {kind} (asked: {work.device})"] = kind == work.device
    figures = {
        "seconds": seconds,
        "versions": versions,
        "cuda": torch.version.cuda,
    }
    if work.on_gpu:
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        asked[f"torch finds {found}, CUDA {torch.version.cuda}"] = torch.cuda.is_available()
    return Verdict(asked, figures)


def loaded_kernels() -> dict[str, bool]:
    """Whether vLLM's compiled part has registered its functions: where it cannot be loaded, vLLM only warns.

    A function is looked for, and not a file, whose name depends on the device and on the kind of CPU.
    """
    import torch

    importlib.import_module("vllm._custom_ops")  # which loads it
    loaded = hasattr(torch.ops._C, "rms_norm")
    return {f"vLLM's compiled part {'is' if loaded else 'could not be'} loaded": loaded}


def compiled(work: Work) -> Verdict:
    """A small function through torch.compile: on a GPU by Triton, which compiles against Python.h."""
    if not work.on_gpu and shutil.which("g++") is None:
        raise LeftOut("torch.compile on a CPU needs g++, which is not here")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # nothing that was compiled before
        os.environ[name] = str(Path(work.folder, "compiled"))
    import torch

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x.sin() + 1

    given = torch.linspace(-3, 3, 1000, device=work.device)
    begun = time.perf_counter()
    difference = float((torch.compile(plain)(given) - plain(given)).abs().max())
    seconds = time.perf_counter() - begun
    text = f"compiled in {seconds:.1f} s, differs by {difference:.1e} (at most 1e-05)"
    return Verdict({text: difference <= 1e-5}, {"seconds": seconds, "difference": difference})


if __name__ == "__main__":
    run_side(checks)
