"""A rollout worker over a stand-in engine: which prompts reach the engine, and how the others come back."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sample_groups import SAMPLING, request_of
from small_tokenizers import small_tokenizer

from rlhf_dist.config.schema import RolloutConfig
from rlhf_dist.models.hf import load_tokenizer
from rlhf_dist.rollout.trajectories import Response, Turn
from rlhf_dist.rollout.vllm_engine import VllmEngine, decoded, sampling_params
from rlhf_dist.rollout.worker import RolloutWorker
from rlhf_dist.types import DroppedPrompt, Group, GroupHead, Message, Prompt, Receipt, Request
from rlhf_dist.weights.receipts import Announcement


class Engine:
    """Answers each turn with its seed as the only token: two a step, the newest first."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.turns: list[Turn] = []
        self.under_way: list[Turn] = []

    def submit(self, turn: Turn) -> None:
        assert turn.context, "an engine refuses a prompt without tokens"
        self.turns.append(turn)
        self.under_way.append(turn)

    def step(self) -> list[Response]:
        ended, self.under_way = self.under_way[:-3:-1], self.under_way[:-2]
        zero = np.zeros(1, np.int32)
        return [Response(turn.key, [turn.seed], zero.astype(np.float32), zero, "stop", "a") for turn in ended]

    def abort(self, keys: Iterable[str]) -> None:
        gone = set(keys)
        self.under_way = [turn for turn in self.under_way if turn.key not in gone]

    def load_weights(self, announcement: Announcement) -> Receipt:
        raise AssertionError("not asked for here")


def asked(*texts: str, n: int = 1) -> list[Request]:
    prompts = [Prompt(f"0/{i}", (Message("user", text),), "", "test") for i, text in enumerate(texts)]
    return [request_of(prompt, n) for prompt in prompts]


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    return Engine(load_tokenizer(tiny_model))


@pytest.fixture
def worker(engine: Engine) -> RolloutWorker:
    return RolloutWorker("w", engine, chat=False, max_prompt_tokens=4)


def test_prompts_without_tokens_and_too_long_ones_are_dropped_and_the_others_answered(worker: RolloutWorker) -> None:
    found = list(worker.generate(asked("abc", "äöü", "abcde", "b")))
    assert [(drop.uid, drop.reason) for drop in found if isinstance(drop, DroppedPrompt)] == [
        ("0/1", "prompt_empty"),
        ("0/2", "prompt_too_long"),
    ]
    assert [head.uid for head in found if isinstance(head, GroupHead)] == ["0/3", "0/0"]


def test_each_sample_is_a_turn_of_its_own_and_its_group_has_it_in_its_place(
    worker: RolloutWorker, engine: Engine
) -> None:
    """The engine ends the last samples first, and groups end in the middle of a step."""
    requests = asked("abc", "b", n=3)
    items = list(worker.generate(requests))
    assert [item.uid for item in items if isinstance(item, GroupHead)] == ["0/1", "0/0"]
    for group in (item for item in items if isinstance(item, Group)):
        assert group.request in requests
        assert [sample.tokens[-1] for sample in group.trajectories] == [0, 1, 2], "sample i has the seed i here"
    assert [turn.seed for turn in engine.turns] == [0, 1, 2] * 2
    assert {turn.sampling for turn in engine.turns} == {requests[0].sampling}


def test_what_is_asked_twice_is_kept_apart(worker: RolloutWorker, engine: Engine) -> None:
    """As an evaluation asks for greedy responses and for sampled ones to the same prompts."""
    (request,) = asked("abc", n=2)
    first, second = worker.generate([request]), worker.generate([request])
    assert [item.uid for item in (*first, *second) if isinstance(item, GroupHead)] == ["0/0", "0/0"]
    assert len({turn.key for turn in engine.turns}) == 4


def test_a_caller_that_goes_away_takes_its_turns_along(worker: RolloutWorker, engine: Engine) -> None:
    stream = worker.generate(asked("abc", "b", "c", n=2))
    next(stream)
    assert len(engine.under_way) == 4
    stream.close()
    assert engine.under_way == []


Settings = dict[str, Any]


class Seen(Exception):
    """The engine would start now."""


@pytest.fixture
def started_with(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What vLLM was to be started with."""
    import vllm

    settings: Settings = {}

    def arguments(**found: Any) -> Any:
        settings.update(found)
        raise Seen

    monkeypatch.setattr(vllm, "EngineArgs", arguments)
    return settings


@pytest.mark.parametrize(("parallel", "executor"), [(1, "uni"), (4, "mp")])
def test_vllm_never_asks_ray_for_gpus_of_its_own(
    started_with: Settings, tiny_model: Path, parallel: int, executor: str
) -> None:
    config = RolloutConfig(tensor_parallel=parallel)
    with pytest.raises(Seen):
        VllmEngine(tiny_model, config, dtype="float32", device="cpu", threads=1, name="w", chat=True)
    assert (started_with["tensor_parallel_size"], started_with["distributed_executor_backend"]) == (parallel, executor)


@pytest.mark.parametrize(
    ("tokens", "reason", "stop", "plain", "special"),
    [
        ("a<think>b</think>c</s>", "stop", None, "abc", "a<think>b</think>c"),
        ("ab<end>", "stop", "<end>", "ab", "ab"),  # closed by a token that is not special
        ("ab<end>c", "length", None, "ab<end>c", "ab<end>c"),
        ("a<think>b##", "stop", "##", "ab", "a<think>b"),  # closed by a stop text
        ("ab", "length", None, "ab", "ab"),
    ],
)
def test_the_text_of_a_response_lacks_what_ended_it(
    tokens: str, reason: str, stop: str | None, plain: str, special: str
) -> None:
    tokenizer = small_tokenizer(plain=["<end>"])
    ids = tokenizer.encode(tokens, add_special_tokens=False)
    by_token = ids[-1] if stop == "<end>" else stop
    unknown = [len(tokenizer) + 3]  # a row of the model that the tokenizer has no token for
    sample = SimpleNamespace(token_ids=[*unknown, *ids], finish_reason=reason, stop_reason=by_token)
    assert decoded(tokenizer, sample, special=False) == plain
    assert decoded(tokenizer, sample, special=True) == special


def test_tokens_that_end_a_turn_end_a_sample_and_chance_has_a_seed() -> None:
    found = sampling_params(SAMPLING, 9, (7, 2))
    assert (found.stop_token_ids, found.seed, found.n) == ([7, 2], 9, 1)
    assert sampling_params(replace(SAMPLING, temperature=0.0), 9, ()).seed is None


@pytest.mark.parametrize(("device", "cut", "split"), [("cpu", False, "0"), ("cuda", None, None)])
def test_on_a_cpu_no_prefill_is_cut_and_no_sequence_split(
    started_with: Settings, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, device: str, cut: bool, split: str
) -> None:
    """A seeded request fails in a prefill that is cut; a sequence that threads share rounds by what else is decoded."""
    monkeypatch.delenv("VLLM_CPU_ATTN_SPLIT_KV", raising=False)
    with pytest.raises(Seen):
        VllmEngine(tiny_model, RolloutConfig(), dtype="float32", device=device, threads=1, name="w", chat=True)
    assert started_with["enable_chunked_prefill"] is cut
    assert os.environ.get("VLLM_CPU_ATTN_SPLIT_KV") == split
