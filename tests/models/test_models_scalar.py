"""Reward models and critics: loaded from every kind of directory, read on packed rows, saved for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.errors import ModelError
from rlhf_dist.models.attention import register_attention
from rlhf_dist.models.hf import load_model, load_tokenizer
from rlhf_dist.models.scalar import (
    NO_SCALE,
    PackedScalar,
    PackedScalarWithLM,
    ScoreScale,
    check_scalar,
    inspect_scalar,
    load_lm_head,
    load_scalar,
    read_scale,
    require_lm_head,
    save_scalar,
)
from rlhf_dist.models.tiny import make_tiny

SMALL = TinyConfig(hidden_size=64, intermediate_size=96, layers=2, heads=2, kv_heads=1, max_positions=64)
SIZES: dict[str, Any] = {
    "vocab_size": 102,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 1,
}
ENDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "num_labels")
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, **{n: SIZES[n] for n in ENDS}}
THREE_LABELS: dict[str, Any] = {**SIZES, "num_labels": 3}
PUBLIC = {
    "qwen2": lambda: Qwen2ForSequenceClassification(Qwen2Config(**SIZES)),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForSequenceClassification(MistralConfig(**SIZES)),
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2)),
}
LENGTHS = (5, 1, 17, 3)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(SMALL, tmp_path_factory.mktemp("cache"))


def packed_row() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(6, 102, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    return tokens, torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)


def write(model: Any, folder: Path, small: Path) -> Path:
    """A model as one finds it on the hub, with a tokenizer."""
    model.save_pretrained(folder)
    load_tokenizer(small).save_pretrained(folder)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", sorted(PUBLIC))
@torch.no_grad()
def test_public_reward_models_score_packed_rows_as_transformers_scores_each_alone(
    kind: str, small: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    folder = write(PUBLIC[kind](), tmp_path / kind, small)
    inspect_scalar(folder, 64)
    scalar = PackedScalar(load_scalar(folder, "float32", "segmented"))
    check_scalar(scalar)
    tokens, boundaries = packed_row()
    scores = scalar(tokens, boundaries, boundaries[1:].long() - 1)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    alone = torch.stack([plain(input_ids=row[None]).logits[0, 0] for row in tokens.split(LENGTHS)])
    assert alone.abs().max() > 0.01
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_any_position_can_be_read(small: Path, tmp_path: Path) -> None:
    """A critic's values: position i of a sequence has the score of what it begins with."""
    scalar = PackedScalar(load_scalar(write(PUBLIC["qwen2"](), tmp_path / "m", small), "float32", "segmented"))
    tokens, boundaries = packed_row()
    values = scalar(tokens, boundaries, torch.tensor([2, 8, 25]))
    one = torch.cat([tokens[:3], tokens[6:9], tokens[23:26]])
    ends = torch.tensor([0, 3, 6, 9], dtype=torch.int32)
    torch.testing.assert_close(values, scalar(one, ends, ends[1:].long() - 1), atol=1e-5, rtol=0)
    assert values.dtype == torch.float32 and values.shape == (3,)


@torch.no_grad()
def test_a_causal_model_gets_a_head_of_zeros_on_its_own_trunk(small: Path) -> None:
    loaded = load_scalar(small, "float32", "segmented")
    scalar, causal = PackedScalar(loaded), load_model(small, "float32", "segmented")
    check_scalar(scalar)
    tokens, boundaries = packed_row()
    assert torch.equal(scalar(tokens, boundaries, torch.arange(len(tokens))), torch.zeros(len(tokens)))
    for name, tensor in causal.base_model.state_dict().items():
        assert torch.equal(loaded.base_model.state_dict()[name], tensor), name
    with pytest.raises(ModelError, match="differ from the model's own"):
        scalar.hidden = lambda *_: torch.zeros(19, 64)  # type: ignore[method-assign]
        check_scalar(scalar)


def test_the_language_model_head_beside_it_is_the_causal_models(small: Path) -> None:
    scalar = PackedScalarWithLM(load_scalar(small, "float32", "segmented"), load_lm_head(small, "float32"))
    tokens, boundaries = packed_row()
    predict = torch.tensor([0, 1, 7, 8])
    scores, logprobs = scalar(tokens, boundaries, torch.tensor([4]), predict, tokens[predict + 1], 3)
    causal = load_model(small, "float32", "segmented")
    first, third = tokens[:5], tokens[6:23]
    expected = [causal(input_ids=row[None]).logits[0].log_softmax(-1) for row in (first, third)]
    wanted = [expected[0][i, tokens[i + 1]] for i in (0, 1)] + [expected[1][i, tokens[i + 7]] for i in (1, 2)]
    torch.testing.assert_close(logprobs, torch.stack(wanted), atol=1e-5, rtol=0)
    (scores.sum() + logprobs.sum()).backward()
    assert float(scalar.lm_head.weight.grad.abs().sum()) > 0, "a head of its own, that learns"  # pyright: ignore
    assert "lm_head.weight" in dict(scalar.named_parameters())


def test_saved_and_loaded_is_the_same_model_with_tokenizer_and_scale(small: Path, tmp_path: Path) -> None:
    loaded = load_scalar(small, "float32", "segmented")
    torch.manual_seed(2)
    torch.nn.init.normal_(loaded.get_submodule("score").weight)  # pyright: ignore[reportArgumentType]
    target = save_scalar(loaded, small, tmp_path / "out" / "hf", ScoreScale(0.25, 1.5))
    again: Any = AutoModelForSequenceClassification.from_pretrained(target)
    assert again.config.num_labels == 1 and again.config.architectures == ["Qwen2ForSequenceClassification"]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert json.loads((target / "config.json").read_text())["rlhf_dist"] == {"score_mean": 0.25, "score_std": 1.5}
    assert read_scale(target) == ScoreScale(0.25, 1.5) and read_scale(small) == NO_SCALE
    assert load_tokenizer(target).get_vocab() == load_tokenizer(small).get_vocab()
    kept = save_scalar(load_scalar(target, "float32", "segmented"), target, tmp_path / "kept", None)
    assert read_scale(kept) == ScoreScale(0.25, 1.5)


def test_a_model_whose_padding_is_its_end_is_saved_without_padding(small: Path, tmp_path: Path) -> None:
    """Transformers would take the end token for padding and read the score before it."""
    start = write(load_model(small, "float32", "segmented"), tmp_path / "start", small)
    end = load_tokenizer(small).eos_token_id
    change_config(start, pad_token_id=end)
    loaded = load_scalar(start, "float32", "segmented")
    torch.nn.init.ones_(loaded.get_submodule("score").weight)  # pyright: ignore[reportArgumentType]
    target = save_scalar(loaded, start, tmp_path / "hf", None)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(target)
    assert plain.config.pad_token_id is None
    tokens = torch.tensor([7, 8, 9, end])
    with torch.no_grad():
        packed = PackedScalar(loaded)(tokens, torch.tensor([0, 4], dtype=torch.int32), torch.tensor([3]))
        torch.testing.assert_close(plain(input_ids=tokens[None]).logits[0], packed, atol=1e-5, rtol=0)


def test_more_labels_are_refused_with_their_number(small: Path, tmp_path: Path) -> None:
    folder = write(Qwen2ForSequenceClassification(Qwen2Config(**THREE_LABELS)), tmp_path / "three", small)
    for look in (lambda: inspect_scalar(folder, 64), lambda: load_scalar(folder, "float32", "segmented")):
        with pytest.raises(ModelError, match="has 3 labels; a reward model has exactly 1"):
            look()


def test_models_without_a_score_layer_are_refused_with_what_works(small: Path, tmp_path: Path) -> None:
    encoder = write(BertForSequenceClassification(BertConfig(**SIZES)), tmp_path / "bert", small)
    with pytest.raises(ModelError, match=r"cannot give one score per position; .* Qwen, Llama, Mistral, GPT-2"):
        load_scalar(encoder, "float32", "segmented")
    tagger = write(Qwen2ForTokenClassification(Qwen2Config(**SIZES)), tmp_path / "tagger", small)
    with pytest.raises(ModelError, match=r"is Qwen2ForTokenClassification; neither a reward model"):
        inspect_scalar(tagger, 64)


def test_pickles_missing_weights_short_models_and_bad_scales_are_refused(small: Path, tmp_path: Path) -> None:
    folder = write(PUBLIC["qwen2"](), tmp_path / "good", small)
    with pytest.raises(ModelError, match="is 65 tokens, and the model has 64 positions"):
        inspect_scalar(folder, 65)
    for scale in ({"score_mean": 0.0, "score_std": 0.0}, {"score_mean": 1.0}, "large"):
        change_config(folder, rlhf_dist=scale)
        with pytest.raises(ModelError, match=r"config\.json: rlhf_dist is .* score_std, a number above 0"):
            read_scale(folder)
    change_config(folder, rlhf_dist=None, num_hidden_layers=3)
    with pytest.raises(ModelError, match="its config cannot be loaded"):
        load_scalar(folder, "float32", "segmented")
    change_config(folder, layer_types=["full_attention"] * 3)
    with pytest.raises(ModelError, match=r"12 weights of the model are missing, the first is model\.layers\.2\."):
        load_scalar(folder, "float32", "segmented")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"\.bin files only"):
        inspect_scalar(folder, 64)


def test_a_reward_model_has_no_language_model_head(small: Path, tmp_path: Path) -> None:
    folder = write(PUBLIC["qwen2"](), tmp_path / "reward", small)
    with pytest.raises(ModelError, match=r"is a reward model, .* set reward\.lm_coef=0"):
        require_lm_head(folder)
    require_lm_head(small)


def test_check_scalar_passes_bfloat16(small: Path) -> None:
    check_scalar(PackedScalar(load_scalar(small, "bfloat16", "segmented")))


def test_check_scalar_refuses_a_head_that_does_more(small: Path, tmp_path: Path) -> None:
    register_attention()
    scalar = PackedScalar(load_scalar(write(PUBLIC["qwen2"](), tmp_path / "m", small), "float32", "segmented"))
    model: Any = scalar.model
    forward = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 2 + 1
        return output

    model.forward = doubled
    with pytest.raises(ModelError, match="scores of packed sequences differ from the model's own"):
        check_scalar(scalar)
