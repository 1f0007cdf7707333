"""What an actor's process is started with."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_dist.cluster.spec import CUDNN_LAST, ENGINE_MALLOC, TRITON_FLOAT32, TUNABLES, ActorSpec, environment
from rlhf_dist.config.schema import Config, ModelConfig

SPEC = ActorSpec("rollout worker 0", Config(), "", "cpu", 2, "", 0, "", loads_weights=True)
SCRIPT = """
import resource, threading, torch

def make(count, nbytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    made = [torch.empty(nbytes, dtype=torch.uint8).fill_(1) for _ in range(count)]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

def work():
    make(1, 31 * 2**20)
    make(8, 16 * 2**20)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
"""Page faults of 31 MiB that a thread takes from the kernel and gives back, and of 8 x 16 MiB, which then come from an
arena. By itself one for each page."""
MAPPED, FROM_ARENA = (nbytes // resource.getpagesize() for nbytes in (31 * 2**20, 128 * 2**20))
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_rollout_workers_on_a_cpu_ask_for_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TUNABLES, raising=False)
    assert environment(SPEC)[TUNABLES] == ENGINE_MALLOC
    assert TUNABLES not in environment(replace(SPEC, loads_weights=False))
    assert TUNABLES not in environment(replace(SPEC, device="cuda"))
    monkeypatch.setenv(TUNABLES, "glibc.malloc.check=0")
    assert TUNABLES not in environment(SPEC), "what the user has set stays"


def test_on_a_gpu_cudnn_comes_last_and_float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CUDNN_LAST, TRITON_FLOAT32):
        monkeypatch.delenv(name, raising=False)
    half, single = (Config(model=ModelConfig(dtype=dtype)) for dtype in ("bfloat16", "float32"))
    on_gpu = environment(replace(SPEC, device="cuda", config=single))
    assert on_gpu.items() >= {CUDNN_LAST: "1", TRITON_FLOAT32: "ieee"}.items()
    assert TRITON_FLOAT32 not in environment(replace(SPEC, device="cuda", config=half))
    assert not {CUDNN_LAST, TRITON_FLOAT32} & set(environment(replace(SPEC, config=single)))
    monkeypatch.setenv(CUDNN_LAST, "0")
    monkeypatch.setenv(TRITON_FLOAT32, "tf32")
    found = environment(replace(SPEC, device="cuda", config=single))
    assert not {CUDNN_LAST, TRITON_FLOAT32} & set(found), "what the user has set stays"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="the kernel gives no large pages")
def test_and_get_large_pages_in_a_thread_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {TUNABLES: ENGINE_MALLOC},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    mapped, from_arena = map(int, done.stdout.split())
    assert mapped < MAPPED / 8
    assert from_arena < FROM_ARENA / 8
