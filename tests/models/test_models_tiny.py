"""The tiny model and its tokenizer: the same from the same seed, and loadable by anyone."""

from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.errors import DiskError
from rlhf_dist.models.tiny import make_tiny
from rlhf_dist.models.tokenizer import CHARACTERS, ROLE_TOKENS, character_tokenizer

SMALL = TinyConfig(hidden_size=64, intermediate_size=96, layers=2, heads=2, kv_heads=1, max_positions=64)
TOKENIZER = character_tokenizer()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(SMALL, tmp_path_factory.mktemp("cache"))


@given(st.text(CHARACTERS, max_size=40))
def test_tokenizer_gives_back_every_ascii_text_one_token_a_character(text: str) -> None:
    assume(not any(special in text for special in TOKENIZER.all_special_tokens))
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


def test_saved_tokenizer_loads_as_the_same_tokenizer(small: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(small)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    text = "A b  c\n" + CHARACTERS
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.eos_token, loaded.pad_token, loaded.unk_token) == ("<|end|>", "<pad>", "<unk>")


def test_chat_template_renders_turns_with_single_token_marks() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi "}]
    text = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|end|><|user|>hi <|end|><|assistant|>"
    ids = TOKENIZER.encode(text)
    assert ids[0] == TOKENIZER.convert_tokens_to_ids("<|system|>")
    assert ids[-1] == TOKENIZER.convert_tokens_to_ids("<|assistant|>")
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "Be brief.hi "
    assert all(len(TOKENIZER.encode(mark)) == 1 for mark in ROLE_TOKENS)


def test_chat_template_refuses_an_unknown_role() -> None:
    with pytest.raises(Exception, match="unknown role tool"):
        TOKENIZER.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_same_seed_same_weights_and_the_global_random_state_is_left_alone(small: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    again = make_tiny(SMALL, tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert again.name == small.name
    assert (again / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()
    other = make_tiny(TinyConfig(**{**vars(SMALL), "seed": 1}), tmp_path)
    assert other.name != small.name
    assert (other / "model.safetensors").read_bytes() != (small / "model.safetensors").read_bytes()


def test_second_call_reuses_the_directory(small: Path) -> None:
    before = (small / "model.safetensors").stat()
    assert make_tiny(SMALL, small.parent) == small
    assert (small / "model.safetensors").stat() == before
    assert [entry.name for entry in small.parent.iterdir()] == [small.name]


def test_vocabulary_is_the_tokenizers_and_generation_stops_at_the_end_token(small: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    assert model.config.vocab_size == model.lm_head.out_features == len(TOKENIZER) == 102
    assert model.generation_config.eos_token_id == TOKENIZER.eos_token_id == 2


def test_default_tiny_model_has_about_three_million_parameters(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny(TinyConfig(), tmp_path))
    assert model.num_parameters() == 3_176_192


def test_a_cache_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DiskError, match="cannot be written"):
        make_tiny(SMALL, tmp_path / "cache")
