"""What tests of the real vLLM engine share: a learner in plain torch to compare with, and how groups are sampled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from pumping import answered, groups_of, pumped
from sample_groups import flat_logprobs, rows_of

from rlhf_dist.algo.algorithm import LaggingMask
from rlhf_dist.config.schema import RolloutConfig
from rlhf_dist.learner.micro_batch_rows import pack_rows
from rlhf_dist.loop.requests import make_requests
from rlhf_dist.models.hf import load_model
from rlhf_dist.models.packed_policy import PackedPolicy
from rlhf_dist.rollout.masked_sampling import MaskStart
from rlhf_dist.rollout.vllm_engine import VllmEngine
from rlhf_dist.rollout.worker import RolloutWorker, Submit
from rlhf_dist.types import Group, Message, Prompt, Request, Sampling, Trajectory
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.receipts import Announcement
from rlhf_dist.weights.shared_memory import WeightWriter

CONFIG = RolloutConfig(
    max_prompt_tokens=300, max_response_tokens=24, kv_cache_gib=0.1, max_concurrent=32, kv_after_push="keep"
)
"""A block of the cache holds 128 tokens, so a prompt must be longer than that to be shared."""
PROMPT_TOKENS = 24
"""Of the worker, for all but those tests that have one of their own."""
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=16, stop=())
PROMPTS = [Prompt(f"0/{i}", (Message("user", text),), "", "test") for i, text in enumerate(["abc", "b", "zyxwv"])]
LAG = LaggingMask(top_p=0.6, every=20)
"""Of the pushes below, version 20 is the only one that the mask follows."""


class Learner:
    """The learner's side in plain torch: a policy, the mask policy, and the writer of its weights."""

    def __init__(self, source: Path) -> None:
        self.earlier = PackedPolicy(load_model(source, "float32", "segmented"))
        self.policy = PackedPolicy(load_model(source, "float32", "segmented"))
        self._first = [tensor.detach().clone() for _, tensor in self.weights()]
        shapes = [(name, tuple(tensor.shape), "float32") for name, tensor in self.weights()]
        # Small buckets, so that a push has several.
        self.writer = WeightWriter(make_plan(shapes, 64 * 1024))

    def weights(self) -> list[tuple[str, torch.Tensor]]:
        return list(self.policy.model.named_parameters())

    def publish(self, version: int) -> Announcement:
        return self.writer.write(version, ((name, tensor.detach()) for name, tensor in self.weights()))

    @torch.no_grad()
    def put_back(self) -> None:
        """The weights that it began with: many moves make the logits large, and rounding with them."""
        for (_, tensor), first in zip(self.weights(), self._first, strict=True):
            tensor.copy_(first)

    @torch.no_grad()
    def move(self, seed: int) -> None:
        """Change every weight."""
        generator = torch.Generator().manual_seed(seed)
        for _, tensor in self.weights():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)

    @torch.no_grad()
    def logprobs(
        self, group: Group, temperature: float = 1.0, masked: bool = False, earlier: bool = False
    ) -> np.ndarray:
        """float32 [N], of the group's sampled tokens; `earlier`: by the mask policy's weights."""
        packed = pack_rows(rows_of(group), torch.device("cpu"))
        where = (packed.tokens, packed.cu_seqlens, packed.predict)
        mask = self.earlier.action_mask(*where, LAG.top_p) if masked else None
        policy = self.earlier if earlier else self.policy
        return policy(*where, packed.targets, temperature, 64, "none", mask)[0].numpy()


def requests(sampling: Sampling = SAMPLING, n: int = 4, prompts: Sequence[Prompt] = PROMPTS) -> list[Request]:
    return make_requests(prompts, "train", n, sampling, seed=1)


def groups(worker: RolloutWorker, asked: Sequence[Request]) -> list[Group]:
    """What the worker samples, in the order of the uids; each must come with its head."""
    events = pumped(worker, Submit(tuple(asked)))
    for event, group in zip(answered(events), groups_of(events), strict=True):
        assert (event.key, event.head.uid) == (group.request.key, group.prompt.uid)
        assert event.head.lengths.tolist() == [sample.length for sample in group.trajectories]
    return sorted(groups_of(events), key=lambda group: group.prompt.uid)


def samples(found: Sequence[Group]) -> list[Trajectory]:
    return [sample for group in found for sample in group.trajectories]


def responses(found: Sequence[Group]) -> list[list[int]]:
    """The sampled tokens of every sample."""
    return [sample.tokens[sample.loss_mask].tolist() for sample in samples(found)]


def versions(found: Sequence[Group]) -> set[int]:
    """Of the sampled tokens."""
    return {version for sample in samples(found) for version in sample.versions[sample.loss_mask].tolist()}


def largest_difference(learner: Learner, found: Sequence[Group], temperature: float = 1.0) -> float:
    return max(float(np.abs(learner.logprobs(g, temperature) - flat_logprobs(g)).max()) for g in found)


GREEDY = replace(SAMPLING, temperature=0.0)


# Fixtures for the modules of this folder: one engine for all of them, whichever module asks first.


@cache
def longer(model: Path) -> Path:
    """The model with room for long prompts; its weights do not depend on that."""
    folder = model.with_name(f"{model.name}-longer")
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


@cache
def start_learner(model: Path) -> Learner:
    return Learner(longer(model))


@cache
def start_engine(model: Path) -> VllmEngine:
    return VllmEngine(
        longer(model),
        CONFIG,
        dtype="float32",
        device="cpu",
        threads=1,
        name="rollout worker 0",
        chat=True,
        mask=MaskStart(model, 0, LAG),
    )


@pytest.fixture(scope="session")
def learner(tiny_model: Path) -> Iterator[Learner]:
    found = start_learner(tiny_model)
    yield found
    found.writer.close()


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> VllmEngine:
    """With a mask, which requests of their own accord are not under."""
    return start_engine(tiny_model)


@pytest.fixture
def worker(engine: VllmEngine) -> RolloutWorker:
    return RolloutWorker("rollout worker 0", engine, chat=True, max_prompt_tokens=PROMPT_TOKENS)
