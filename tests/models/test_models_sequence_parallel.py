"""A packed row among ranks, by pure arithmetic: what a rank holds, reads, and gets of the heads."""

from __future__ import annotations

import pytest
import torch

from rlhf_dist.errors import ModelError
from rlhf_dist.models.attention import segmented, shared
from rlhf_dist.models.sequence_parallel import ALONE, ATTRIBUTE, SequenceGroup


@pytest.mark.parametrize(
    ("tokens", "size", "boundaries"), [(10, 4, [0, 3, 10, 12]), (8, 4, [0, 3, 8]), (2, 3, [0, 2, 3])]
)
def test_every_rank_has_as_many_tokens_and_every_position_one_owner(
    tokens: int, size: int, boundaries: list[int]
) -> None:
    groups = [SequenceGroup(rank, size) for rank in range(size)]
    row, cu_seqlens = torch.arange(tokens), torch.tensor([0, *([3] if tokens > 3 else []), tokens], dtype=torch.int32)
    padded, edges = groups[0].padded(row, cu_seqlens)
    assert edges.tolist() == boundaries and edges.dtype == torch.int32
    parts = [padded[group.part(len(padded))] for group in groups]
    assert {len(part) for part in parts} == {len(padded) // size}
    positions = torch.arange(0, tokens, 2)
    starts = groups[0].starts(len(parts[0]), positions)
    read = [group.read(part, positions, starts) for group, part in zip(groups, parts, strict=True)]
    assert torch.cat(read).tolist() == positions.tolist()


def test_alone_a_row_stays_as_it_is() -> None:
    row, cu_seqlens, positions = torch.arange(7), torch.tensor([0, 7]), torch.tensor([2, 5])
    assert ALONE.padded(row, cu_seqlens) == (row, cu_seqlens)
    assert ALONE.part(7) == slice(0, 7) and ALONE.starts(7, positions) == [0, 2]
    values = torch.ones(2)
    assert ALONE.whole(values, [0, 2]) is values


def test_attention_that_is_not_told_where_sequences_begin_is_refused() -> None:
    """As StableLM's and Falcon's, which would attend within a rank's own part."""
    module = torch.nn.Module()
    setattr(module, ATTRIBUTE, SequenceGroup(0, 2))
    query = torch.ones(1, 2, 4, 8)
    with pytest.raises(ModelError, match=r"learner\.sequence_parallel: .* where sequences begin; set it to 1"):
        shared(segmented, module, query, query, query, None, position_ids=torch.arange(4)[None])
