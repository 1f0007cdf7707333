"""A model whose weights are read one by one: the same one as when it is loaded whole, or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config, Qwen2ForCausalLM

from rlhf_dist.errors import ModelError
from rlhf_dist.models.by_parameter import Scatter, load_by_parameter
from rlhf_dist.models.hf import load_model
from rlhf_dist.models.model_config import load_config
from rlhf_dist.models.scalar import load_scalar


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small model in several files."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=90,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=request.param,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return tmp_path / "model"


class Kept:
    """Takes parameters over, as ranks would, and gives them back."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.values: list[torch.Tensor] = []
        self.rooms: set[int] = set()

    def take(self, parameter: nn.Parameter) -> None:
        self.rooms.add(parameter.untyped_storage().data_ptr())
        self.parameters.append(parameter)
        self.values.append(parameter.detach().clone())
        parameter.data = torch.empty(0, dtype=parameter.dtype)

    def give_back(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.data = value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_by_parameter_is_the_whole_one(saved: Path, dtype: str) -> None:
    kept, tokens = Kept(), torch.arange(12)[None]
    found = load_model(saved, dtype, "segmented", Scatter(kept.take, reads=True))
    assert len(kept.rooms) == 1, "one after the other in the same memory"
    assert sum(p.numel() for p in found.parameters()) == 0, "nothing is left behind"
    kept.give_back()
    whole = load_model(saved, dtype, "segmented")
    assert found.training == whole.training and found.dtype == whole.dtype
    assert dict(found.named_parameters()).keys() == dict(whole.named_parameters()).keys()
    with torch.no_grad():
        assert torch.equal(found(input_ids=tokens).logits, whole(input_ids=tokens).logits)
    head, embedding = found.get_output_embeddings(), found.get_input_embeddings()
    assert isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)
    assert (head.weight is embedding.weight) == whole.config.tie_word_embeddings


def test_only_one_rank_reads_and_all_know_the_names(saved: Path) -> None:
    kept = Kept()
    load_model(saved, "float32", "segmented", Scatter(kept.take, reads=False))
    assert all(not value.any() for value in kept.values), "what it has comes from the other"


def test_a_new_head_is_zero_and_what_else_is_lacking_is_refused(saved: Path) -> None:
    kept = Kept()
    found = load_scalar(saved, "float32", "segmented", Scatter(kept.take, reads=True))
    kept.give_back()
    assert not found.get_submodule("score").get_parameter("weight").any()
    file = next(file for file in saved.glob("*.safetensors") if "model.norm.weight" in load_file(file))
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, {"format": "pt"})
    index = saved / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(f'"model.norm.weight": "{file.name}"', f'"model.x": "{file.name}"'))
    with pytest.raises(ModelError, match=r"model\.x|model\.norm\.weight"):
        load_model(saved, "float32", "segmented", Scatter(kept.take, reads=True))


def test_a_trunk_alone_is_found_and_other_names_are_left_to_transformers(saved: Path, tmp_path: Path) -> None:
    weights = {name: tensor for file in saved.glob("*.safetensors") for name, tensor in load_file(file).items()}
    trunk = tmp_path / "trunk"
    trunk.mkdir()
    (trunk / "config.json").write_text((saved / "config.json").read_text())
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items() if "lm_head" not in name}
    save_file(bare, trunk / "model.safetensors", {"format": "pt"})
    config, kept = load_config(trunk), Kept()
    scatter = Scatter(kept.take, reads=True)
    found = load_by_parameter(
        AutoModelForSequenceClassification, trunk, _one_label(config), "float32", "segmented", scatter
    )
    assert found is not None and (found[1], found[2]) == ({"score.weight"}, set())
    save_file({f"old.{name}": x for name, x in bare.items()}, trunk / "model.safetensors", {"format": "pt"})
    assert load_by_parameter(AutoModelForCausalLM, trunk, config, "float32", "segmented", scatter) is None


@pytest.mark.parametrize("both", [True, False], ids=["both stored", "only the head stored"])
@pytest.mark.parametrize("saved", [True], indirect=True, ids=["tied"])
def test_a_stored_weight_that_is_tied_is_left_to_transformers(saved: Path, tmp_path: Path, both: bool) -> None:
    weights = {name: tensor for file in saved.glob("*.safetensors") for name, tensor in load_file(file).items()}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((saved / "config.json").read_text())
    embedding = weights.pop("model.embed_tokens.weight")
    weights |= {"lm_head.weight": embedding + 1} | ({"model.embed_tokens.weight": embedding} if both else {})
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    kept, tokens = Kept(), torch.arange(12)[None]
    scatter = Scatter(kept.take, reads=True)
    assert load_by_parameter(AutoModelForCausalLM, other, load_config(other), "float32", "segmented", scatter) is None
    assert not kept.values, "nothing was given away"
    found, whole = load_model(other, "float32", "segmented", scatter), load_model(other, "float32", "segmented")
    with torch.no_grad():
        assert torch.equal(found(input_ids=tokens).logits, whole(input_ids=tokens).logits)


def _one_label(config: Qwen2Config) -> Qwen2Config:
    config.num_labels = 1
    return config
