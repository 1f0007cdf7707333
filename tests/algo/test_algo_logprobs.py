"""Token log-probabilities and entropies, whole and in chunks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import rlhf_dist.algo.logprobs as module
from rlhf_dist.algo.logprobs import Entropy, chunked_logprobs, token_logprobs
from rlhf_dist.errors import ConfigError

HIDDEN, VOCABULARY = 5, 11
MODES: tuple[Entropy, ...] = ("none", "value", "gradient")


class CountingHead:
    """A linear head that notes how many rows each call was given."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.linear = nn.Linear(HIDDEN, VOCABULARY, dtype=dtype)
        self.rows: list[int] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return self.linear(hidden)


def batch(tokens: int) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(tokens, HIDDEN, dtype=torch.float64).requires_grad_()
    return hidden, torch.randint(VOCABULARY, (tokens,))


def test_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.75), math.log(0.5)]))
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(entropy, torch.tensor([expected, math.log(2.0)]))


def test_temperature_divides_the_logits() -> None:
    logits, targets = torch.randn(4, 7), torch.tensor([0, 3, 6, 2], dtype=torch.int32)
    hot, entropy = token_logprobs(logits, targets, temperature=2.0)
    cold, cold_entropy = token_logprobs(logits / 2.0, targets)
    torch.testing.assert_close(hot, cold)
    torch.testing.assert_close(entropy, cold_entropy)


def test_an_impossible_token_and_a_certain_one() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1000.0]])
    for target, expected in ((0, -math.inf), (1, -1000.0), (2, 0.0)):
        logprobs, entropy = token_logprobs(logits, torch.tensor([target]))
        assert logprobs.item() == expected
        assert entropy.item() == 0.0


def test_bfloat16_logits_are_computed_in_float32() -> None:
    logits = torch.randn(6, 50).bfloat16()
    targets = torch.randint(50, (6,))
    logprobs, entropy = token_logprobs(logits, targets)
    exact, exact_entropy = token_logprobs(logits.double(), targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert exact.dtype == torch.float64
    torch.testing.assert_close(logprobs.double(), exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), exact_entropy, atol=1e-5, rtol=0)


def test_gradient_of_the_logprob_and_none_of_the_entropy() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, targets, 0.7)[0], (logits,))
    assert not token_logprobs(logits, targets)[1].requires_grad


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match=f"temperature is {temperature}"):
        token_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), temperature)


def test_a_chunk_below_one_is_refused() -> None:
    hidden, targets = batch(3)
    with pytest.raises(ConfigError, match="chunk is 0 tokens"):
        chunked_logprobs(hidden, CountingHead(), targets, 1.0, 0)


@settings(deadline=None, max_examples=30)
@given(tokens=st.integers(0, 13), chunk=st.integers(1, 15), temperature=st.sampled_from([0.5, 1.0, 1.7]))
def test_chunks_equal_the_whole_in_value_and_gradient(tokens: int, chunk: int, temperature: float) -> None:
    head = CountingHead()
    hidden, targets = batch(tokens)
    weights = torch.randn(tokens, dtype=torch.float64)
    leaves = (hidden, head.linear.weight, head.linear.bias)

    whole, whole_entropy = token_logprobs(head(hidden), targets, temperature)
    expected = torch.autograd.grad((whole * weights).sum(), leaves)
    head.rows.clear()
    logprobs, entropy = chunked_logprobs(hidden, head, targets, temperature, chunk)
    got = torch.autograd.grad((logprobs * weights).sum(), leaves)

    torch.testing.assert_close(logprobs, whole)
    torch.testing.assert_close(entropy, whole_entropy)
    assert not entropy.requires_grad
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert max(head.rows) <= chunk
    once = max(1, math.ceil(tokens / chunk))
    assert len(head.rows) == (once if once == 1 else 2 * once)  # recomputed in backward, but for a chunk that is alone


@pytest.mark.parametrize("least", [3, 9])
def test_more_chunks_than_needed_change_nothing(least: int) -> None:
    """For ranks that have to call the head as often as another; some chunks are empty then."""
    head = CountingHead()
    hidden, targets = batch(5)
    expected = chunked_logprobs(hidden, head, targets, 0.7, 5, entropy="gradient")
    gradients = torch.autograd.grad(sum(part.sum() for part in expected), [hidden, head.linear.weight])
    head.rows.clear()
    got = chunked_logprobs(hidden, head, targets, 0.7, 5, entropy="gradient", least_chunks=least)
    again = torch.autograd.grad(sum(part.sum() for part in got), [hidden, head.linear.weight])
    torch.testing.assert_close((got, again), (expected, gradients))
    assert len(head.rows) == 2 * least and sum(head.rows) == 2 * 5, "in forward, and again in backward"


def test_without_gradient_every_chunk_is_computed_once() -> None:
    head = CountingHead()
    hidden, targets = batch(10)
    with torch.no_grad():
        logprobs, _ = chunked_logprobs(hidden, head, targets, 1.0, 4)
    assert head.rows == [4, 3, 3]
    torch.testing.assert_close(logprobs, token_logprobs(head(hidden), targets)[0].detach())


def test_gradient_reaches_the_head_when_the_hidden_states_need_none() -> None:
    head = CountingHead()
    hidden, targets = batch(6)
    chunked_logprobs(hidden.detach(), head, targets, 1.0, 2)[0].sum().backward()
    assert head.linear.weight.grad is not None and head.linear.weight.grad.abs().sum() > 0


def test_entropy_that_nobody_wants_is_not_there() -> None:
    hidden, targets = batch(6)
    head = CountingHead()
    for chunk in (2, 6):
        logprobs, entropy = chunked_logprobs(hidden, head, targets, 0.7, chunk, "none")
        assert entropy is None
        torch.testing.assert_close(logprobs, token_logprobs(head(hidden), targets, 0.7)[0])
    assert token_logprobs(head(hidden), targets, entropy="none")[1] is None


@pytest.mark.parametrize("chunk", [2, 6])
def test_a_graph_that_is_kept_gives_the_same_gradient_again(chunk: int) -> None:
    """The gradient overwrites logits only where they are made anew for each backward."""
    head = CountingHead()
    hidden, targets = batch(6)
    logprobs, entropy = chunked_logprobs(hidden, head, targets, 0.7, chunk, "gradient")
    assert entropy is not None
    total = (logprobs + 0.5 * entropy).sum()
    first, second = (torch.autograd.grad(total, [hidden, head.linear.weight], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_logits_that_the_heads_backward_needs_are_not_overwritten() -> None:
    head = CountingHead()
    hidden, targets = batch(6)
    with pytest.raises(AssertionError, match="the head's own backward needs its logits"):
        chunked_logprobs(hidden, lambda part: torch.tanh(head(part)), targets, 1.0, 2)
    chunked_logprobs(hidden, lambda part: torch.tanh(head(part)), targets, 1.0, 6)[0].sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_blocks_equal_the_whole(mode: Entropy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row at a time, two, and all at once."""
    logits, targets = torch.randn(7, 11, dtype=torch.float64), torch.randint(11, (7,))
    found = []
    for elements in (1, 25, 1000):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = token_logprobs(leaf, targets, 0.7, mode)
        total = (logprobs * torch.arange(7)).sum()
        total = total if mode != "gradient" or entropy is None else total + 3 * entropy.sum()
        found.append((logprobs, entropy, *torch.autograd.grad(total, leaf)))
    for pieces in found[:2]:
        for ours, whole in zip(pieces, found[2], strict=True):
            assert (ours is None) == (whole is None)
            if ours is not None:
                torch.testing.assert_close(ours, whole)


@pytest.mark.parametrize("chunk", [2, 6])
def test_bfloat16_logits_have_their_gradient_in_bfloat16(chunk: int) -> None:
    head = nn.Linear(HIDDEN, VOCABULARY).bfloat16()
    hidden, targets = torch.randn(6, HIDDEN).bfloat16().requires_grad_(), torch.randint(VOCABULARY, (6,))
    logprobs, entropy = chunked_logprobs(hidden, head, targets, 0.7, chunk, "gradient")
    assert logprobs.dtype == torch.float32 and entropy is not None
    exact = torch.log_softmax(head(hidden).float() / 0.7, -1)
    own = -(exact.exp() * exact).sum(-1)
    found = torch.autograd.grad((logprobs + entropy).sum(), [hidden, head.weight])
    expected = torch.autograd.grad((exact[torch.arange(6), targets] + own).sum(), [hidden, head.weight])
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert found[1].dtype == torch.bfloat16


def test_no_logits_are_kept_for_backward() -> None:
    """Nothing that autograd saves is larger than a chunk's logits; without chunks the whole [N, V] is kept."""
    head = nn.Linear(HIDDEN, 1000)
    hidden, targets = torch.randn(64, HIDDEN, requires_grad=True), torch.randint(1000, (64,))

    def saved(chunk: int, entropy: Entropy) -> dict[int, int]:
        """Address -> size of each storage that is held for backward."""
        storages: dict[int, int] = {}
        held: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            held.append(tensor)
            storages[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            chunked_logprobs(hidden, head, targets, 1.0, chunk, entropy)
        return storages

    for entropy in MODES:
        assert max(saved(8, entropy).values()) <= 8 * 1000
        assert list(saved(64, entropy).values()).count(64 * 1000) == 1  # the logits, held once


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_entropy_gradient_is_that_of_finite_differences(temperature: float) -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, targets, temperature, "gradient"), (logits,))
    for ours, theirs in zip(
        token_logprobs(logits, targets, temperature, "gradient"),
        token_logprobs(logits, targets, temperature),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_entropy_gradient_of_even_certain_and_impossible_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf], [0.0, -1000.0, -math.inf]], requires_grad=True)
    _, entropy = token_logprobs(logits, torch.tensor([0, 0]), entropy="gradient")
    assert entropy.tolist() == pytest.approx([math.log(2.0), 0.0])
    (gradient,) = torch.autograd.grad(1e4 * entropy.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(2, 3), atol=1e-2, rtol=0)  # the even one is the highest there is


@settings(deadline=None, max_examples=20)
@given(tokens=st.integers(1, 13), chunk=st.integers(1, 15), temperature=st.sampled_from([0.5, 1.0]))
def test_chunks_equal_the_whole_in_the_gradient_of_the_entropy(tokens: int, chunk: int, temperature: float) -> None:
    head = CountingHead()
    hidden, targets = batch(tokens)
    weights = torch.randn(2, tokens, dtype=torch.float64)
    leaves = (hidden, head.linear.weight, head.linear.bias)

    def gradient(logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((logprobs * weights[0] + entropy * weights[1]).sum(), leaves)

    log_softmax = torch.log_softmax(head(hidden) / temperature, -1)
    expected = gradient(log_softmax[torch.arange(tokens), targets], -(log_softmax.exp() * log_softmax).sum(-1))
    for size in (chunk, tokens):
        got = gradient(*chunked_logprobs(hidden, head, targets, temperature, size, entropy="gradient"))
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
