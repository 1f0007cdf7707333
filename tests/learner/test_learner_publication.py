"""What a rank does beside writing, with a stand-in for DeepSpeed and for the GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_dist.config.schema import LearnerConfig, ModelConfig, OptimizerConfig
from rlhf_dist.learner import model_engine
from rlhf_dist.learner.publication import Publication
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.shared_memory import WeightReader, WeightWriter

PLAN = make_plan([("a", (300,), "bfloat16")], 2**20)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order."""
    found: list[str] = []
    write = WeightWriter.write

    def noted(self: WeightWriter, *given: Any) -> Any:
        found.append("write")
        return write(self, *given)

    runtime = SimpleNamespace(cudaHostRegister=lambda *_: found.append("register") or 0, cudaHostUnregister=lambda _: 0)
    monkeypatch.setattr(WeightWriter, "write", noted)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append("empty"))
    return found


def publication(device: str, shared: bool, rank: int = 0) -> Publication:
    def weights(_: Collection[str] | None) -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(300, dtype=torch.bfloat16)

    deepspeed: Any = SimpleNamespace(device=torch.device(device), rank=rank, zero_stage=1)
    return Publication(deepspeed, weights, PLAN, prefix="model.", changes=False, shared=shared)


def test_on_shared_gpus_the_learner_gives_memory_back_before_workers_load(calls: list[str]) -> None:
    with closing(publication("cuda:0", shared=True)) as made:
        made.publish(1)
        assert calls == ["register", "write", "empty"]
        made.publish(2)
        assert calls == ["register", "write", "empty"], "nothing has moved: nobody loads"
        made.moved = True
        made.publish(3)
        assert calls[3:] == ["write", "empty"]


def test_so_do_the_other_ranks(calls: list[str]) -> None:
    with closing(publication("cuda:0", shared=True, rank=1)) as made:
        made.publish(1)
    assert calls == ["empty"]


@pytest.mark.parametrize(("device", "shared"), [("cuda:0", False), ("cpu", True)])
def test_elsewhere_it_keeps_it(calls: list[str], device: str, shared: bool) -> None:
    with closing(publication(device, shared)) as made:
        made.publish(1)
    assert "empty" not in calls and "write" in calls


@pytest.mark.parametrize("shared", [True, False])
def test_a_model_engine_publishes_its_models_weights(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    class OneRank:
        """DeepSpeed's part."""

        rank, zero_stage = 0, 1

        def __init__(self, module: torch.nn.Module, *_: Any, device: str, **__: Any) -> None:
            self.module, self.device = module, torch.device(device)

        def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
            return [(name, tuple(tensor.shape)) for name, tensor in self.module.named_parameters()]

        def named_weights(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in self.module.named_parameters():
                if wanted is None or name in wanted:
                    yield name, tensor.detach()

    monkeypatch.setattr(model_engine, "DeepSpeedEngine", OneRank)
    given = (tiny_model, ModelConfig(), LearnerConfig(), OptimizerConfig())
    made = model_engine.ModelEngine(*given, device="cpu", bucket_mib=1, shared=shared)
    with closing(made):
        announcement = made.publish(1)
        assert announcement is not None
        with closing(WeightReader().take(announcement)) as lease:
            pairs = zip(lease.tensors(), made.weights(), strict=True)
            assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
        assert made.publish(2) == replace(announcement, version=2), "nothing has moved"
        some = announcement.plan.names[1:3]
        assert [name for name, _ in made.weights(some)] == list(some)
