"""The mask policy's reader: whatever comes and goes, each sequence gets the mask that a plain forward pass gives."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_dist.algo.action_mask import likeliest
from rlhf_dist.algo.algorithm import LaggingMask
from rlhf_dist.errors import WeightSyncError
from rlhf_dist.models.hf import load_model
from rlhf_dist.rollout import masked_sampling
from rlhf_dist.rollout.masked_sampling import MaskReader, Reading

TOP_P = 0.8


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    found = load_model(tiny_model, "float32", "sdpa")
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(3.0)  # far from uniform, so that the edge of a set is never a matter of rounding
    return found


@torch.no_grad()
def alone(model: PreTrainedModel, reading: Reading) -> Tensor:
    tokens = torch.tensor([[*reading.prompt, *reading.response]])
    return likeliest(model(tokens).logits[0, -1] / reading.temperature, TOP_P)


def check(model: PreTrainedModel, reader: MaskReader, readings: Sequence[Reading]) -> None:
    for reading, allowed in zip(readings, reader.allowed(readings), strict=True):
        assert torch.equal(allowed, alone(model, reading)), (reading.prompt, reading.response)
        assert 0 < allowed.sum() < len(allowed)


@pytest.mark.parametrize("prefill", [8192, 20])
def test_sequences_come_go_wait_and_change_places(
    model: PreTrainedModel, prefill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked_sampling, "PREFILL_TOKENS", prefill)
    reader, chance = MaskReader(model, LaggingMask(TOP_P, 1), 0), random.Random(0)
    live: list[Reading] = []
    most = 0
    for _ in range(40):
        while len(live) < 6 and chance.random() < 0.5:
            prompt = [chance.randrange(90) for _ in range(chance.randrange(1, 12))]
            live += [Reading(prompt, [], chance.choice([1.0, 0.7])) for _ in range(chance.randrange(1, 4))]
        chance.shuffle(live)
        live = [reading for reading in live if chance.random() > 0.1]
        if not live:
            continue
        check(model, reader, live)
        assert len(reader._rows) <= len(live), "what has gone leaves the cache"
        most = max(most, len(live))
        for reading in live:
            if chance.random() < 0.9:  # the others are asked again before they have grown
                assert isinstance(reading.response, list)
                reading.response.append(chance.randrange(90))
    assert most >= 4
    assert reader._filled.shape[1] < 40, "columns that nobody fills any more are cut off"


def test_a_step_reads_one_token_a_sequence_and_a_prompt_is_read_once(model: PreTrainedModel) -> None:
    widths: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    reader = MaskReader(model, LaggingMask(TOP_P, 1), 0)
    readings = [Reading([5, 6, 7], [], 1.0) for _ in range(4)] + [Reading([8], [], 1.0)]
    reader.allowed(readings)
    assert widths == [(2, 3)], "four of the five are alike"
    for reading in readings:
        assert isinstance(reading.response, list)
        reading.response.append(9)
    reader.allowed(readings)
    assert widths[1:] == [(5, 1)]


def test_it_follows_every_so_many_versions_and_forgets_what_it_read(model: PreTrainedModel) -> None:
    reader = MaskReader(model, LaggingMask(TOP_P, 3), 4)
    newer = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    older, reading = copy.deepcopy(model), Reading([5, 6, 7], [11], 1.0)
    before = reader.allowed([reading])
    reader.follow(4, iter(newer.named_parameters()))
    check(older, reader, [reading])
    reader.follow(6, iter(newer.named_parameters()))
    assert isinstance(reading.response, list)
    reading.response.append(12)
    check(newer, reader, [reading])
    reading.response.pop()
    assert not torch.equal(alone(newer, reading), before[0])


def test_a_publication_that_it_missed_is_told_until_the_next_comes(model: PreTrainedModel) -> None:
    reader = MaskReader(model, LaggingMask(TOP_P, 3), 4)
    weights = dict(copy.deepcopy(model).named_parameters())
    reader.follow(5, iter(weights.items()))
    for version in (7, 8):
        with pytest.raises(
            WeightSyncError, match=f"version {version} goes with the mask of version 6, .* brings one is 9"
        ):
            reader.follow(version, iter(weights.items()))
    reader.follow(9, iter(weights.items()))
    reader.follow(10, iter(weights.items()))
