"""A rollout worker over a stand-in engine: which prompts reach the engine, and how the others come back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sample_groups import group_of, request_of
from small_tokenizers import small_tokenizer

from rlhf_dist.config.schema import RolloutConfig
from rlhf_dist.models.hf import load_tokenizer
from rlhf_dist.rollout.vllm_engine import VllmEngine, decoded, sampling_params
from rlhf_dist.rollout.worker import RolloutWorker
from rlhf_dist.types import DroppedPrompt, Group, GroupHead, Message, Prompt, Receipt, Request, Sampling
from rlhf_dist.weights.receipts import Announcement

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4, stop=())


class Engine:
    """Answers every prompt with one token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def generate(self, asked: Sequence[tuple[Request, list[int]]]) -> Iterator[Group]:
        for request, tokens in asked:
            assert tokens, "an engine refuses a prompt without tokens"
            yield group_of(tokens, [5], [1], prompt=request.prompt, texts=["a"])

    def load_weights(self, announcement: Announcement) -> Receipt:
        raise AssertionError("not asked for here")


def test_prompts_without_tokens_and_too_long_ones_are_dropped_and_the_others_answered(tiny_model: Path) -> None:
    worker = RolloutWorker("w", Engine(load_tokenizer(tiny_model)), chat=False, max_prompt_tokens=4)
    texts = ["abc", "äöü", "abcde", "b"]
    asked = [Prompt(f"0/{i}", (Message("user", text),), "", "test") for i, text in enumerate(texts)]
    found = list(worker.generate([request_of(prompt) for prompt in asked]))
    assert [(drop.uid, drop.reason) for drop in found if isinstance(drop, DroppedPrompt)] == [
        ("0/1", "prompt_empty"),
        ("0/2", "prompt_too_long"),
    ]
    assert [head.uid for head in found if isinstance(head, GroupHead)] == ["0/0", "0/3"]


@pytest.mark.parametrize(("parallel", "executor"), [(1, "uni"), (4, "mp")])
def test_vllm_never_asks_ray_for_gpus_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, parallel: int, executor: str
) -> None:
    import vllm

    class Seen(Exception):
        pass

    settings: dict[str, Any] = {}

    def arguments(**found: Any) -> Any:
        settings.update(found)
        raise Seen

    monkeypatch.setattr(vllm, "EngineArgs", arguments)
    config = RolloutConfig(tensor_parallel=parallel)
    with pytest.raises(Seen):
        VllmEngine(tiny_model, config, dtype="float32", device="cpu", threads=1, seed=1, name="w", chat=True)
    assert (settings["tensor_parallel_size"], settings["distributed_executor_backend"]) == (parallel, executor)


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
    assert decoded(tokenizer, [sample], special=False) == (plain,)
    assert decoded(tokenizer, [sample], special=True) == (special,)


def test_tokens_that_end_a_turn_end_a_sample() -> None:
    assert sampling_params(SAMPLING, 1, (7, 2)).stop_token_ids == [7, 2]
