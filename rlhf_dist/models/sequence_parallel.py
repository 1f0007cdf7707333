"""Sequence parallelism as in DeepSpeed-Ulysses (arXiv:2309.14509): ranks that share the tokens of one packed row.

Each rank of a group holds an equal part of the row, whichever sequences lie in it, and all weights that ZeRO lets it.
Layers work on single tokens, but for attention: there one all-to-all gives each rank all tokens of a share of the
heads, and another one gives the tokens back. What is computed of single tokens at the end, such as logprobs, is
gathered, so that every rank of the group has the whole loss, each with the gradient of its own tokens. The gradients
of all ranks are then added up, as those of ranks with other rows are.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed

from rlhf_dist.errors import ModelError

ATTRIBUTE = "sequence_group"
"""Of the modules of a model: the group that shares its rows."""


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The ranks that share a row, as one of them sees it."""

    rank: int = 0
    """Within the group."""
    size: int = 1
    group: Any = None
    """torch's process group; None for a rank that is alone."""

    def padded(self, tokens: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """The row with a number of tokens that can be shared out: a sequence is added for those that lack."""
        lacking = -len(tokens) % self.size
        if not lacking:
            return tokens, cu_seqlens
        return torch.cat([tokens, tokens.new_zeros(lacking)]), torch.cat([cu_seqlens, cu_seqlens[-1:] + lacking])

    def part(self, tokens: int) -> slice:
        """Which of a padded row's tokens are this rank's."""
        size = tokens // self.size
        return slice(self.rank * size, (self.rank + 1) * size)

    def starts(self, own_tokens: int, positions: Tensor) -> list[int]:
        """Of positions in a row, in ascending order: rank r has numbers starts[r] to starts[r + 1]."""
        if self.size == 1:
            return [0, len(positions)]
        edges = torch.arange(self.size + 1, device=positions.device) * own_tokens
        return torch.searchsorted(positions, edges).tolist()

    def own(self, values: Tensor, starts: list[int]) -> Tensor:
        """Those of this rank."""
        return values[starts[self.rank] : starts[self.rank + 1]]

    def read(self, hidden: Tensor, positions: Tensor, starts: list[int]) -> Tensor:
        """Rows of this rank's part [T, ...] of a row at those of `positions` that are its own."""
        own = self.own(positions, starts)
        return hidden.index_select(0, own if self.size == 1 else own - self.rank * len(hidden))

    def whole(self, values: Tensor, starts: list[int]) -> Tensor:
        """What all ranks have of their own positions [n, ...], together [N, ...]; gradients go back to the owner."""
        if self.size == 1 or starts[-1] == 0:
            return values
        found = _Whole.apply(values, self, starts)
        assert isinstance(found, Tensor)
        return found

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[1, heads, T, width] of this rank's tokens -> all tokens' [1, heads / size, T x size, width].

        Where there are fewer key-value heads than ranks, each is given to several.
        """
        if value.shape[1] < self.size:
            times = self.size // value.shape[1]
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        shares = [x[0].unflatten(0, (self.size, -1)) for x in (query, key, value)]
        found = self._exchanged(torch.cat(shares, dim=1))
        parts = found.transpose(0, 1).flatten(1, 2).split([share.shape[1] for share in shares])
        return parts[0][None], parts[1][None], parts[2][None]

    def to_tokens(self, output: Tensor) -> Tensor:
        """All tokens' [1, T x size, heads / size, width] -> [1, T, heads, width] of this rank's."""
        found = self._exchanged(output[0].unflatten(0, (self.size, -1)))
        return found.transpose(0, 1).flatten(1, 2)[None]

    def _exchanged(self, parts: Tensor) -> Tensor:
        """[size, ...]: part r goes to rank r, and what rank r has sent comes in its place."""
        found = _Exchange.apply(parts, self.group)
        assert isinstance(found, Tensor)
        return found


ALONE = SequenceGroup()


def sequence_group(size: int, timeout_s: float) -> SequenceGroup:
    """This rank's group of so many neighbours. Every rank calls it, since each takes part in making all groups.

    `timeout_s`: the longest that a rank waits for the others of its group.
    """
    if size == 1:
        return ALONE
    rank, made, limit = distributed.get_rank(), None, timedelta(seconds=timeout_s)
    for first in range(0, distributed.get_world_size(), size):
        group = distributed.new_group(list(range(first, first + size)), timeout=limit)
        made = group if first <= rank < first + size else made
    return SequenceGroup(rank % size, size, made)


def check_exchange(query: Tensor, value: Tensor, cu_seq_lens: Tensor | None) -> None:
    """Refuse a kind of model whose attention cannot be exchanged. Raises ModelError."""
    if cu_seq_lens is None or query.shape[-1] != value.shape[-1]:
        what = "where sequences begin" if cu_seq_lens is None else "heads of one width"
        raise ModelError(
            f"learner.sequence_parallel: the model does not give its attention {what}; set it to 1, or use another "
            "model, such as Qwen or Llama"
        )


class _Exchange(torch.autograd.Function):
    """An all-to-all, which is its own way back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = parts.contiguous()
        found = torch.empty_like(parts)
        distributed.all_to_all_single(found, parts, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Exchange.forward(ctx, grad_outputs[0], ctx.group), None


class _Whole(torch.autograd.Function):
    """Values of all ranks; of their gradients each takes its own, since each has the same loss."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, sequence: SequenceGroup, starts: list[int]) -> Tensor:
        ctx.own = slice(starts[sequence.rank], starts[sequence.rank + 1])
        counts = [stop - start for start, stop in pairwise(starts)]
        room = own.new_zeros(max(counts), *own.shape[1:])
        room[: len(own)] = own
        parts = [torch.empty_like(room) for _ in counts]
        distributed.all_gather(parts, room, group=sequence.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0][ctx.own], None, None
