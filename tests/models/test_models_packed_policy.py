"""PackedPolicy and segmented attention against the plain model, one sequence at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.errors import ModelError
from rlhf_dist.models import attention
from rlhf_dist.models.attention import choose_attention, register_attention, segmented, varlen
from rlhf_dist.models.hf import load_model
from rlhf_dist.models.packed_policy import PackedPolicy, check_head
from rlhf_dist.models.tiny import make_tiny

SMALL = TinyConfig(hidden_size=128, intermediate_size=192, layers=2, heads=4, kv_heads=2, max_positions=64)
LENGTHS = (5, 1, 17, 17, 3)
SIZES = {
    "vocab_size": 64,
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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(SMALL, tmp_path_factory.mktemp("cache"))


def packed_row() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 102, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    predict = torch.cat([torch.arange(stop - n, stop - 1) for n, stop in zip(LENGTHS, boundaries[1:], strict=True)])
    return tokens, boundaries, predict, tokens[predict + 1]


def plain_logprobs(model: Any, tokens: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs, entropies = [], []
    for sequence in tokens.split(LENGTHS):
        log_softmax = (model(input_ids=sequence[None]).logits[0, :-1] / temperature).log_softmax(-1)
        logprobs.append(log_softmax.gather(1, sequence[1:, None])[:, 0])
        entropies.append(-(log_softmax.exp() * log_softmax).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logprobs_and_gradients_are_those_of_each_sequence_alone(
    small: Path, checkpointing: bool, temperature: float
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(small, attn_implementation="eager")
    policy = PackedPolicy(load_model(small, "float32", "segmented"), checkpointing)
    tokens, boundaries, predict, targets = packed_row()
    weights = torch.linspace(-1, 1, len(predict))

    logprobs, entropy = policy(tokens, boundaries, predict, targets, temperature, 10)
    (logprobs * weights).sum().backward()
    expected, expected_entropy = plain_logprobs(plain, tokens, temperature)
    (expected * weights).sum().backward()

    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=0)
    gradients = {name: parameter.grad for name, parameter in policy.model.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_computes_each_layer_again_as_it_comes_from_loading(small: Path, checkpointing: bool) -> None:
    policy = PackedPolicy(load_model(small, "float32", "segmented"), checkpointing)
    runs = [0, 0]
    for number, layer in enumerate(policy.model.base_model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: runs.__setitem__(number, runs[number] + 1))
    tokens, boundaries, predict, targets = packed_row()
    policy(tokens, boundaries, predict, targets, 1.0, 10)[0].sum().backward()
    assert runs == ([2, 2] if checkpointing else [1, 1])


def test_bfloat16_is_close(small: Path) -> None:
    policy = PackedPolicy(load_model(small, "bfloat16", "segmented"))
    tokens, boundaries, predict, targets = packed_row()
    logprobs, _ = policy(tokens, boundaries, predict, targets, 1.0, 100)
    assert logprobs.dtype == torch.float32
    expected, _ = plain_logprobs(AutoModelForCausalLM.from_pretrained(small), tokens, 1.0)
    torch.testing.assert_close(logprobs, expected, atol=0.05, rtol=0)


def test_a_sequence_sees_nothing_of_its_neighbours(small: Path) -> None:
    policy = PackedPolicy(load_model(small, "float32", "segmented"))
    tokens, boundaries, _, _ = packed_row()
    changed = tokens.clone()
    changed[boundaries[2] : boundaries[3]] = (changed[boundaries[2] : boundaries[3]] + 1) % 102
    with torch.no_grad():
        difference = (policy.hidden(tokens, boundaries) - policy.hidden(changed, boundaries)).abs().amax(-1)
    assert difference[boundaries[2] : boundaries[3]].min() > 0
    difference[boundaries[2] : boundaries[3]] = 0
    assert difference.max() == 0


def test_check_head_passes_plain_models(small: Path) -> None:
    check_head(PackedPolicy(load_model(small, "float32", "segmented")))
    check_head(PackedPolicy(load_model(small, "bfloat16", "segmented")))


def test_scaled_logits_are_reproduced_and_a_scale_that_is_not_known_is_refused() -> None:
    register_attention()
    torch.manual_seed(0)
    model = CohereForCausalLM._from_config(CohereConfig(**SIZES, logit_scale=0.1), attn_implementation="segmented")
    policy = PackedPolicy(model)
    check_head(policy)
    policy.scale = 1.0
    with pytest.raises(ModelError, match="of its own to its logits"):
        check_head(policy)


def test_capped_logits_are_reproduced_and_capped_attention_refused() -> None:
    register_attention()
    torch.manual_seed(0)
    shape = {**SIZES, "head_dim": 32, "layer_types": ["full_attention"] * 2, "final_logit_softcapping": 0.2}
    model = Gemma2ForCausalLM._from_config(
        Gemma2Config(**shape, attn_logit_softcapping=None), attn_implementation="segmented"
    )
    policy = PackedPolicy(model)
    check_head(policy)
    policy.softcap = None
    with pytest.raises(ModelError, match="differ from the model's own"):
        check_head(policy)
    capped = Gemma2ForCausalLM._from_config(Gemma2Config(**shape), attn_implementation="segmented")
    with pytest.raises(ModelError, match="softcap"):
        check_head(PackedPolicy(capped))


def test_a_sliding_window_shorter_than_a_sequence_is_refused() -> None:
    register_attention()
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=0)
    policy = PackedPolicy(Qwen2ForCausalLM._from_config(config, attn_implementation="segmented"))
    boundaries = torch.tensor([0, 16, 20], dtype=torch.int32)
    assert policy.hidden(torch.zeros(20, dtype=torch.int64), boundaries).shape == (20, 64)
    with pytest.raises(ModelError, match="sliding window of 16 tokens, shorter than a sequence of 17"):
        policy.hidden(torch.zeros(20, dtype=torch.int64), torch.tensor([0, 17, 20], dtype=torch.int32))


def test_segmented_refuses_a_cache_and_a_mask() -> None:
    query, short = torch.zeros(1, 2, 4, 32), torch.zeros(1, 2, 3, 32)
    module = torch.nn.Identity()
    with pytest.raises(ModelError, match="no key-value cache"):
        segmented(module, short, query, query, None)
    with pytest.raises(ModelError, match="no mask"):
        segmented(module, query, query, query, torch.ones(1, 1, 4, 4))


def test_dropout_is_off_even_in_training() -> None:
    register_attention()
    config = Qwen2Config(**SIZES, attention_dropout=0.5)
    policy = PackedPolicy(Qwen2ForCausalLM._from_config(config, attn_implementation="segmented")).train()
    tokens, boundaries = torch.arange(9), torch.tensor([0, 9], dtype=torch.int32)
    assert torch.equal(policy.hidden(tokens, boundaries), policy.hidden(tokens, boundaries))
    assert all(layer.self_attn.attention_dropout == 0 for layer in policy.model.base_model.layers)


def test_dropout_that_a_model_keeps_as_a_plain_number_is_off_too() -> None:
    register_attention()
    torch.manual_seed(0)
    config = OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=64, dropout=0.5, layerdrop=0.5)
    policy = PackedPolicy(OPTForCausalLM._from_config(config, attn_implementation="segmented"))
    tokens, boundaries = torch.arange(9), torch.tensor([0, 9], dtype=torch.int32)
    assert torch.equal(policy.hidden(tokens, boundaries), policy.hidden(tokens, boundaries))


def by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    boundaries: torch.Tensor,
    same: torch.Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What PyTorch's documentation says of `varlen_attn`, whose kernel runs on a GPU only."""
    assert same is boundaries and boundaries.dtype == torch.int32 and longest == longest_key
    assert longest == int(boundaries.diff().max()) and window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    pieces = []
    for q, k, v in zip(*(x.split(boundaries.diff().tolist()) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        back = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] == -1))
        pieces.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(pieces)


def test_varlen_gives_its_kernel_what_segmented_computes(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the lengths given, with positions alone, and with neither, as one sequence."""
    monkeypatch.setattr(attention, "varlen_attn", by_hand)
    plain = PackedPolicy(load_model(small, "float32", "segmented"))
    policy = PackedPolicy(load_model(small, "float32", "varlen"))
    tokens, boundaries, _, _ = packed_row()
    torch.testing.assert_close(policy.hidden(tokens, boundaries), plain.hidden(tokens, boundaries))
    check_head(policy)
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    for where in ({}, {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])}):
        found, _ = varlen(torch.nn.Identity(), query, key, value, None, scaling=0.3, **where)
        expected, _ = segmented(torch.nn.Identity(), query, key, value, None, scaling=0.3, **where)
        torch.testing.assert_close(found, expected)


def test_varlen_has_the_window_of_the_models_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_attn", by_hand)
    register_attention()
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0)
    own = Qwen2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    policy = PackedPolicy(Qwen2ForCausalLM._from_config(config, attn_implementation="varlen"))
    policy.model.load_state_dict(own.state_dict())
    tokens, boundaries, _, _ = packed_row()
    tokens = tokens % 64
    with torch.no_grad():
        found = policy.hidden(tokens, boundaries).split(LENGTHS)
        alone = [own.base_model(input_ids=row[None]).last_hidden_state[0] for row in tokens.split(LENGTHS)]
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_pytorch_takes_the_call_of_varlen() -> None:
    """Shapes and arguments alone: tensors without memory."""
    query, key = (torch.empty(1, heads, 9, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    boundaries = torch.empty(3, dtype=torch.int32, device="meta")
    found, _ = varlen(torch.nn.Identity(), query, key, key, None, cu_seq_lens_q=boundaries, max_length_q=5, scaling=0.1)
    assert found.shape == (1, 9, 4, 64) and found.dtype == torch.bfloat16


def test_choose_attention() -> None:
    assert choose_attention("auto", "cpu") == "segmented"
    with pytest.raises(ModelError, match=r"model\.attention = varlen: it needs a GPU, and the device is cpu; set"):
        choose_attention("varlen", "cpu")
    with pytest.raises(ModelError, match="does not compute in float32"):
        choose_attention("varlen", "cuda:1", "float32")
    for device in ("cuda", "cuda:3"):
        assert choose_attention("auto", device) == choose_attention("varlen", device) == "varlen"
        assert choose_attention("auto", device, "float32") == "segmented"
        assert choose_attention("segmented", device) == "segmented"
