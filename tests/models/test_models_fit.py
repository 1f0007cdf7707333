"""Weights that are not the config's, read from headers alone; and which kinds of models can be trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.errors import ModelError
from rlhf_dist.models.capabilities import check_positions, positions
from rlhf_dist.models.fit import check_fit, refuse_unknown
from rlhf_dist.models.hf import load_model, load_tokenizer
from rlhf_dist.models.inspect import inspect, inspect_causal
from rlhf_dist.models.packed_policy import PackedPolicy, check_head
from rlhf_dist.models.scalar import inspect_scalar, load_scalar, save_scalar
from rlhf_dist.models.tiny import make_tiny

SMALL = TinyConfig(hidden_size=64, intermediate_size=96, layers=2, heads=2, kv_heads=1, max_positions=64)
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM: dict[str, Any] = {"hidden_size": 64, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(SMALL, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "model"))


def written(config: Any, folder: Path, small: Path) -> Path:
    """A model as one finds it, with a tokenizer."""
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    load_tokenizer(small).save_pretrained(folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file(change(tensors), path / "model.safetensors", {"format": "pt"})


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "fewer layers": (
        lambda path: edit(path / "config.json", num_hidden_layers=1, layer_types=["full_attention"]),
        r"12 weights in its files are none of the model's, the first is model\.layers\.1\..*"
        r"\(config\.json says 1 layers, the weights have 2\)",
    ),
    "more layers": (
        lambda path: edit(path / "config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3),
        r"12 weights of the model are missing, the first is model\.layers\.2",
    ),
    "vocabulary": (
        lambda path: edit(path / "config.json", vocab_size=300),
        r"have another shape: model\.embed_tokens\.weight is \(\d+, 64\), by config\.json \(300, 64\)",
    ),
    "width": (
        lambda path: edit(path / "config.json", intermediate_size=128),
        r"have another shape: model\.layers\.0\.mlp\.\w+\.weight is .*96.*128",
    ),
    "another kind": (
        lambda path: edit(path / "config.json", model_type="llama"),
        r"\(LlamaForCausalLM\): 6 weights in its files are none of the model's, .*bias",
    ),
    "a stray": (
        lambda path: change_weights(path, lambda weights: weights | {"model.extra.weight": torch.zeros(3)}),
        r"1 weights in its files are none of the model's, the first is model\.extra\.weight",
    ),
    "one lost": (
        lambda path: change_weights(path, lambda w: {n: t for n, t in w.items() if n != "model.norm.weight"}),
        r"1 weights of the model are missing, the first is model\.norm\.weight",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("look", ["policy", "reference", "critic or reward start"])
def test_weights_that_are_not_the_configs(case: str, look: str, copy: Path) -> None:
    spoil, message = WRONG[case]
    spoil(copy)
    looks: dict[str, Callable[[], Any]] = {
        "policy": lambda: inspect(copy, True, "cpu", 40),
        "reference": lambda: inspect_causal(copy, 40, "segmented", "keys"),
        "critic or reward start": lambda: inspect_scalar(copy, 40),
    }
    with pytest.raises(ModelError, match=message) as caught:
        looks[look]()
    assert str(copy) in str(caught.value)


def test_weights_that_loading_left_out_are_refused_too(copy: Path) -> None:
    WRONG["fewer layers"][0](copy)
    with pytest.raises(ModelError, match=r"12 weights in its files are none of the model's"):
        load_model(copy, "float32", "segmented")


def test_a_reward_model_is_compared_as_one(small: Path, tmp_path: Path) -> None:
    path = save_scalar(load_scalar(small, "float32", "segmented"), small, tmp_path / "judge", None)
    inspect_scalar(path, 40)
    change_weights(path, lambda w: {n: t for n, t in w.items() if n != "score.weight"})
    with pytest.raises(ModelError, match=r"missing, the first is score\.weight"):
        inspect_scalar(path, 40)


HARMLESS: dict[str, dict[str, torch.Tensor]] = {
    "rotary": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)},
    "value head": {"v_head.summary.weight": torch.zeros(1, 64), "v_head.summary.bias": torch.zeros(1)},
    "score": {"score.weight": torch.zeros(1, 64)},
    "masks": {"model.layers.0.attn.masked_bias": torch.tensor(-1e4), "h.0.attn.bias": torch.ones(1, 1, 64, 64)},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_known_extras_are_let_pass(case: str, copy: Path) -> None:
    change_weights(copy, lambda weights: weights | HARMLESS[case])
    inspect(copy, True, "cpu", 40)
    inspect_scalar(copy, 40)
    load_model(copy, "float32", "segmented")


def test_a_head_stored_beside_tied_embeddings_is_let_pass(small: Path, tmp_path: Path) -> None:
    path = written(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True), tmp_path / "tied", small)
    change_weights(path, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    inspect(path, True, "cpu", 40)


def test_a_bias_of_a_model_is_not_taken_for_gpt2s_constant(copy: Path) -> None:
    change_weights(copy, lambda weights: weights | {"model.layers.0.attn.bias": torch.zeros(64)})
    with pytest.raises(ModelError, match=r"model\.layers\.0\.attn\.bias"):
        check_fit(copy, AutoConfig.from_pretrained(copy), AutoModelForCausalLM)
    refuse_unknown(copy, ["h.0.attn.bias"])


KINDS: dict[str, Callable[[], Any]] = {
    "falcon": lambda: transformers.FalconConfig(
        **{name: size for name, size in SIZES.items() if not name.startswith(("intermediate", "num_key"))}
    ),
    "falcon with groups": lambda: transformers.FalconConfig(
        **{name: size for name, size in SIZES.items() if not name.startswith(("intermediate", "num_key"))},
        new_decoder_architecture=True,
        num_kv_heads=1,
    ),
    "stablelm": lambda: transformers.StableLmConfig(**SIZES),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0, embedding_multiplier=2.0),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=128, hidden_size=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32,
        do_layer_norm_before=False, max_position_embeddings=64,
    ),
}  # fmt: skip
"""Kinds that need something of their own; the plain ones are in test_models_packed_policy.py."""


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_kinds_whose_packed_rows_are_read_as_each_sequence_alone(kind: str, small: Path, tmp_path: Path) -> None:
    path = written(KINDS[kind](), tmp_path / "model", small)
    inspect(path, True, "cpu", 64)
    policy = PackedPolicy(load_model(path, "float32", "segmented"))
    check_head(policy)
    lengths = (5, 1, 17, 9)
    tokens = torch.randint(6, 128, (sum(lengths),), generator=torch.Generator().manual_seed(3))
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    everywhere = torch.arange(len(tokens))
    targets = torch.roll(tokens, -1)
    packed, _ = policy(tokens, ends, everywhere, targets, 1.0, 8)
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    alone = [plain(input_ids=row[None]).logits[0].log_softmax(-1) for row in tokens.split(lengths)]
    expected = torch.cat(alone).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(packed, expected, atol=2e-5, rtol=0)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bloom": (lambda: transformers.BloomConfig(vocab_size=128, **BLOOM), r"\(bloom\).*bias by distance \(ALiBi\)"),
    "falcon": (lambda: transformers.FalconConfig(**KINDS["falcon"]().to_diff_dict() | {"alibi": True}), "ALiBi"),
    "gptj": (
        lambda: transformers.GPTJConfig(vocab_size=128, n_embd=64, n_layer=1, n_head=2, rotary_dim=8),
        r"\(gptj\): transformers computes its attention, .* in the model's own code",
    ),
    "mamba": (
        lambda: transformers.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1),
        r"\(mamba\): transformers computes its attention, or what it has instead",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_are_refused_are_told_why_before_anything_starts(kind: str, small: Path, tmp_path: Path) -> None:
    made, message = REFUSED[kind]
    path = written(made(), tmp_path / "model", small)
    with pytest.raises(ModelError, match=message):
        inspect(path, True, "cpu", 64)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (transformers.LlamaConfig(**SIZES), (64, "max_position_embeddings")),
        (transformers.GPT2Config(**GPT2), (64, "n_positions")),
        (transformers.LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
         (64, "max_position_embeddings")),
        (transformers.MptConfig(max_seq_len=32), (32, "max_seq_len")),
        (transformers.BloomConfig(), None),
        (transformers.FalconConfig(alibi=True), None),
        (transformers.MambaConfig(), None),
    ],
    ids=["llama", "gpt2", "stretched rotary", "mpt", "bloom", "falcon with alibi", "mamba"],
)  # fmt: skip
def test_positions(config: Any, found: tuple[int, str] | None) -> None:
    assert positions(config) == found
    check_positions("model", config, 32, "sft.max_tokens")
    if found is None:
        check_positions("model", config, 10**9, "sft.max_tokens")
        return
    with pytest.raises(
        ModelError, match=rf"sft\.max_tokens is 65 tokens, and the model has \d\d positions \({found[1]}"
    ):
        check_positions("model", config, 65, "sft.max_tokens")
