"""Pushes by changed words on real DeepSpeed: bit for bit what the learner holds, on its node and on another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from delta_ranks import MANY
from forks import ForkServer
from hypothesis import given, settings, strategies as st
from rank_processes import run_ranks

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.learner import changed_words
from rlhf_dist.learner.changed_words import ChangedWords, Part, Run
from rlhf_dist.models.tiny import make_tiny
from rlhf_dist.weights.changes import apply

STAGES, WORLDS = (1, 2, 3), (1, 2)
# Its largest matrices have more than 100,000 elements: ZeRO-3 leaves smaller ones whole on every rank.
MODEL = TinyConfig(hidden_size=192, intermediate_size=640, layers=2, heads=2, kv_heads=1, max_positions=128)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> dict[tuple[int, int], dict[Any, Any]]:
    """(world size, rank) -> what `delta_ranks.py` found."""
    folder = tmp_path_factory.mktemp("delta")
    return run_ranks(forks, "delta_ranks.py", folder, make_tiny(MODEL, folder), folder)


@pytest.mark.engines
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_push_is_the_learners_weights_bit_for_bit(results: dict, stage: int, world: int) -> None:
    found = results[world, 0][stage]
    pushes = [
        found["first"],
        *found["small"],
        *(found[key] for key in ("four steps", "not moved", "large", "after it")),
    ]
    assert all(push["learner"] and push["node"] for push in pushes)
    assert all(push["share"] is not None and 0 < push["share"] < 0.2 for push in found["small"])
    assert found["first"]["share"] is None, "there was nothing to change"
    assert found["four steps"]["share"] > max(push["share"] for push in found["small"]), "marks of all four add up"
    assert found["not moved"]["share"] == found["four steps"]["share"], "the same bytes under another number"
    assert found["large"]["share"] is None, "more than a quarter changed"
    assert found["after it"]["share"] < 0.2, "and then by changes again"


@pytest.mark.engines
@pytest.mark.timeout(600)
def test_a_hundred_pushes_on_end(results: dict) -> None:
    assert len(results[1, 0][1]["small"]) == MANY


@pytest.mark.engines
@pytest.mark.timeout(600)
def test_a_change_that_was_not_marked_is_found(results: dict) -> None:
    assert "in shared memory is not what the learner holds, so a change was not marked" in results[1, 0]["missed"]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_marks_are_the_words_that_rounding_changes(data: st.DataObject) -> None:
    """Runs begin and end anywhere in a part, chunks too; steps add up until they are taken."""
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    count = sum(sizes)
    chance = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    master = torch.nn.Parameter(torch.randn(count + 3, generator=chance))
    words = master.detach().bfloat16()
    starts, runs, places = 0, [], {}
    for index, size in enumerate(sizes):
        runs.append(Run(f"p{index}", 0, starts, size))
        places[f"p{index}"] = starts + 7
        starts += size
    optimizer = torch.optim.SGD([master], lr=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changed_words, "CHUNK", 16)
        marks = ChangedWords(optimizer, [Part(master, words, tuple(runs))])
        before = np.concatenate([np.full(7, 9, np.uint16), words.view(torch.int16).numpy().view(np.uint16)])
        for _ in range(data.draw(st.integers(1, 3))):
            master.grad = torch.randn(count + 3, generator=chance) * 2e-3
            optimizer.step()
            words.copy_(master.detach())
        now = np.concatenate([before[:7], words.view(torch.int16).numpy().view(np.uint16)])
        pieces = list(marks.pieces(places))
        assert marks.count() >= int((before != now).sum())
        apply(pieces, before)
        assert np.array_equal(before[: 7 + count], now[: 7 + count])
        marks.clear()
        assert marks.count() == 0 and not list(marks.pieces(places))
