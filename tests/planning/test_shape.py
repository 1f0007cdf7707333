"""Sizes of models: from the table, from files, of the tiny model; and what is said where they cannot be known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_dist.config.schema import ModelConfig, TinyConfig
from rlhf_dist.errors import ModelError
from rlhf_dist.models.tiny import make_tiny
from rlhf_dist.models.weight_files import read_headers
from rlhf_dist.planning.shape import described, gated, shape_of


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-32B-Instruct", 32_763_876_352),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_public_models_have_the_parameters_that_their_pages_give(name: str, parameters: int) -> None:
    assert shape_of(ModelConfig(path=name)).parameters == parameters


def test_the_tiny_model_and_its_directory_have_the_same_sizes(tmp_path: Path) -> None:
    tiny = TinyConfig(hidden_size=64, intermediate_size=96, layers=3, heads=2, kv_heads=1)
    directory = make_tiny(tiny, tmp_path)
    assert shape_of(ModelConfig(tiny=tiny)) == shape_of(ModelConfig(path=str(directory)))
    stored = sum(
        tensor.shape[0] * (tensor.shape[1] if len(tensor.shape) > 1 else 1)
        for tensor in read_headers(directory).values()
    )
    assert shape_of(ModelConfig(tiny=tiny)).parameters == stored


def test_what_each_token_is_multiplied_with_leaves_out_an_input_embedding() -> None:
    """With a tied head the one matrix is both; without, the input's is only looked up."""
    tied, apart = gated(2, 8, 16, 2, 1, 100, tied=True), gated(2, 8, 16, 2, 1, 100, tied=False)
    assert apart.parameters - tied.parameters == 800
    assert tied.products == tied.parameters and apart.products == tied.parameters
    # By hand: q and o 64 each, k and v 32 each, three of 128.
    assert tied.of_layers == 2 * (64 + 64 + 32 + 32 + 3 * 128)
    assert tied.kv_elements == 2 * 2 * 1 * 4


def test_a_model_that_is_not_known_is_said_with_one_of_its_size() -> None:
    with pytest.raises(ModelError, match=r"model\.path = some/thing-7B.*download.*such as \S+-7B"):
        shape_of(ModelConfig(path="some/thing-7B"))


def test_a_config_without_a_size_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    whole = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 10}
    assert described(whole, path).kv_heads == 2
    for name in whole:
        raw = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(ModelError, match=f"config.json: has no {name}"):
            described(json.loads(json.dumps(raw)), path)


@pytest.mark.parametrize(("size", "value"), [("num_hidden_layers", -3), ("num_attention_heads", 0), ("vocab_size", 0)])
def test_sizes_that_no_model_has_are_refused(tmp_path: Path, size: str, value: int) -> None:
    whole = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 10}
    with pytest.raises(ModelError, match=f"config.json: {size} is {value}; it must be 1 or more"):
        described(whole | {size: value}, tmp_path / "config.json")
    assert described(whole | {"text_config": None}, tmp_path / "config.json").layers == 1
