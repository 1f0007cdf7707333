"""The moving average of the weights: by hand, and through a checkpoint of a real model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_dist.learner.checkpoint_files import EMA_FOLDER
from rlhf_dist.learner.ema import Ema
from rlhf_dist.models.hf import load_model, read_companions


def weights(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


def saved(folder: Path) -> dict[str, Tensor]:
    return dict(weights(AutoModelForCausalLM.from_pretrained(folder / EMA_FOLDER)))


def fill(model: torch.nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_the_first_weights_are_taken_whole_and_the_others_by_their_share(tiny_model: Path, tmp_path: Path) -> None:
    """1, then 0.75 x 1 + 0.25 x 5 = 2, then 0.75 x 2 + 0.25 x 6 = 3."""
    model, ema = load_model(tiny_model, "float32", "segmented"), Ema(0.75, rank=0)
    for step, (value, expected) in enumerate([(1.0, 1.0), (5.0, 2.0), (6.0, 3.0)]):
        fill(model, value)
        ema.update(weights(model))
        ema.save(read_companions(tiny_model), tmp_path / str(step))
        found = saved(tmp_path / str(step))
        assert found.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(tensor, torch.full_like(tensor, expected)) for tensor in found.values())
    assert all((parameter == 6.0).all() for parameter in model.parameters()), "the weights themselves stay"


@pytest.mark.parametrize(("dtype", "decay"), [("float32", 0.9), ("bfloat16", 0.999)])
def test_a_restored_average_goes_on_bit_for_bit(tiny_model: Path, tmp_path: Path, dtype: str, decay: float) -> None:
    """Also one whose steps are smaller than what the model's own dtype tells apart."""
    model, whole, again = load_model(tiny_model, dtype, "segmented"), Ema(decay, 0), Ema(decay, 0)
    whole.update(weights(model))
    fill(model, 0.5)
    whole.update(weights(model))
    whole.save(read_companions(tiny_model), tmp_path)
    again.restore(tmp_path)
    fill(model, -2.0)
    for ema, name in ((whole, "whole"), (again, "again")):
        ema.update(weights(model))
        ema.save(read_companions(tiny_model), tmp_path / name)
    expected, found = saved(tmp_path / "whole"), saved(tmp_path / "again")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not any((tensor == -2.0).all() for tensor in expected.values())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in expected.values())


def test_one_that_was_switched_on_after_the_checkpoint_begins_there(tiny_model: Path, tmp_path: Path) -> None:
    model, ema = load_model(tiny_model, "float32", "segmented"), Ema(0.9, 0)
    ema.restore(tmp_path)
    ema.save(read_companions(tiny_model), tmp_path)
    assert not (tmp_path / EMA_FOLDER).exists(), "nothing is known yet"
    fill(model, 3.0)
    ema.update(weights(model))
    ema.save(read_companions(tiny_model), tmp_path)
    assert all((tensor == 3.0).all() for tensor in saved(tmp_path).values())


@pytest.mark.parametrize("rank", [1, 3])
def test_the_other_ranks_read_to_the_end_and_keep_nothing(tiny_model: Path, tmp_path: Path, rank: int) -> None:
    """Under ZeRO-3 gathering is collective: one that stopped early would leave the others waiting."""
    read: list[str] = []

    def noting() -> Iterator[tuple[str, Tensor]]:
        for name in ("a", "b", "c"):
            read.append(name)
            yield name, torch.ones(2)

    ema = Ema(0.9, rank)
    ema.update(noting())
    ema.save(read_companions(tiny_model), tmp_path)
    assert read == ["a", "b", "c"] and list(tmp_path.iterdir()) == []


def test_a_half_precision_model_has_a_float32_average(tiny_model: Path, tmp_path: Path) -> None:
    """Steps of 0.001 x the difference are lost among bfloat16's 8 bits."""
    model, ema = load_model(tiny_model, "bfloat16", "segmented"), Ema(0.999, 0)
    for value in (1.0, 2.0):
        fill(model, value)
        ema.update(weights(model))
    ema.save(read_companions(tiny_model), tmp_path)
    found = dict(load_model(tmp_path / EMA_FOLDER, "float32", "eager").named_parameters())
    assert all((tensor - 1.001).abs().max() < 1e-6 for tensor in found.values())
