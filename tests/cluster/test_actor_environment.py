"""What an actor's process is started with."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_dist.cluster.spec import CUDNN_LAST, LARGE_PAGES, TRITON_FLOAT32, TUNABLES, ActorSpec, environment
from rlhf_dist.config.schema import Config, ModelConfig

SPEC = ActorSpec("rollout worker 0", Config(), "", "cpu", 2, "", 0, "", large_pages=True)
SCRIPT = """
import resource, torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(2**24).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 4 * 2**24 // resource.getpagesize()
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_rollout_workers_on_a_cpu_ask_for_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TUNABLES, raising=False)
    assert environment(SPEC)[TUNABLES] == LARGE_PAGES
    assert TUNABLES not in environment(replace(SPEC, large_pages=False))
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


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="the kernel gives no large pages")
def test_and_get_them() -> None:
    """Faults of a tensor of 64 MiB; by itself one for each page."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {TUNABLES: LARGE_PAGES},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert int(done.stdout) < PAGES / 8
