"""The pre-training mix: which rows each optimizer step gets, and that ranks share them out without loss."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from rlhf_dist.config.schema import PtxConfig, TinyConfig
from rlhf_dist.data.rows import Demonstration
from rlhf_dist.errors import DataError
from rlhf_dist.learner.ptx import PtxMix
from rlhf_dist.models.hf import load_tokenizer
from rlhf_dist.models.tiny import make_tiny

TEXTS = ["abc", "ab", "hello", "x" * 30, "hello you"]
SIZES = TinyConfig(hidden_size=64, intermediate_size=64, layers=1, heads=2, kv_heads=1, max_positions=64)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    return load_tokenizer(make_tiny(SIZES, tmp_path_factory.mktemp("ptx")))


def mix(
    tokenizer: object,
    rank: int = 0,
    ranks: int = 1,
    size: int = 3,
    max_tokens: int = 20,
    seed: int = 0,
    shuffle: bool = True,
) -> PtxMix:
    texts = [Demonstration((), text) for text in TEXTS]
    config = PtxConfig(coef=0.5, batch_size=size, max_tokens=max_tokens)
    return PtxMix(
        config, texts, tokenizer, chat=True, seed=seed, share=rank, shares=ranks, micro_batch_tokens=12, shuffle=shuffle
    )


def tokens(batches: list[PtxMix], number: int) -> list[tuple[int, ...]]:
    return sorted(tuple(row.tokens.tolist()) for m in batches for rows in m.batch(number).micro_batches for row in rows)


@settings(max_examples=30)
@given(st.integers(0, 50), st.integers(1, 7), st.integers(1, 4))
def test_ranks_share_a_batch_out_and_count_all_of_it(tokenizer: object, number: int, size: int, ranks: int) -> None:
    alone = mix(tokenizer, size=size, max_tokens=60)
    shares = [mix(tokenizer, rank, ranks, size, 60) for rank in range(ranks)]
    found = [share.batch(number) for share in shares]
    assert tokens(shares, number) == tokens([alone], number)
    assert len({len(share.micro_batches) for share in found}) == 1, "collectives need as many on every rank"
    whole = alone.batch(number)
    learnt = sum(row.length for rows in whole.micro_batches for row in rows)
    assert {share.tokens for share in found} == {whole.tokens} == {learnt}
    for share in found:
        for rows in share.micro_batches:
            assert len(rows) <= 1 or sum(len(row.tokens) for row in rows) <= 12


def test_optimizer_steps_pass_over_all_texts_and_repeat_with_their_number(tokenizer: object) -> None:
    """5 texts of which one is too long: 5 steps of 3 are 3 epochs."""
    made = mix(tokenizer)
    batches = [made.batch(number) for number in range(5)]
    assert sum(batch.dropped for batch in batches) == 3
    lengths = sorted(row.length for b in batches for rows in b.micro_batches for row in rows)
    assert lengths == sorted([len(text) for text in TEXTS if len(text) < 20] * 3), "letters but the first, and an end"
    # A resumed run goes on where it was.
    assert tokens([mix(tokenizer)], 4) == tokens([made], 4)
    assert any(tokens([mix(tokenizer, seed=1)], n) != tokens([made], n) for n in range(5))


def test_a_batch_of_which_nothing_fits_is_an_error(tokenizer: object) -> None:
    with pytest.raises(DataError, match=r"none of 3 demonstrations has a token to learn within ptx\.max_tokens 1;"):
        mix(tokenizer, max_tokens=1).batch(0)


def test_texts_come_in_the_files_own_order_without_shuffle(tokenizer: object) -> None:
    made = mix(tokenizer, size=1, max_tokens=60, shuffle=False)
    assert [made.batch(number).tokens for number in range(10)] == [len(text) for text in TEXTS] * 2
