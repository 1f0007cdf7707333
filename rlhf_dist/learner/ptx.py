"""The pre-training mix: a language-model batch beside each of the policy's optimizer steps (InstructGPT's PPO-ptx)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_dist.config.schema import PtxConfig
from rlhf_dist.data.order import RowOrder
from rlhf_dist.data.rows import Demonstration
from rlhf_dist.learner.micro_batch_rows import Row
from rlhf_dist.learner.supervised import batch_share, demonstration_rows


@dataclass(frozen=True, slots=True)
class Mixed:
    """One rank's share of a batch."""

    micro_batches: Sequence[Sequence[Row]]
    """As many on every rank; one may be empty."""
    tokens: int
    """Response tokens of the whole batch, all ranks."""
    dropped: int
    """Sequences of the whole batch that were too long."""


class PtxMix:
    """Every rank draws the same sequences from the same seed and takes its own share of them."""

    def __init__(
        self,
        config: PtxConfig,
        source: Sequence[Demonstration],
        tokenizer: Any,
        *,
        chat: bool,
        seed: int,
        share: int,
        shares: int,
        micro_batch_tokens: int,
        shuffle: bool = True,
    ) -> None:
        self.coef = config.coef
        self._config = config
        self._source = source
        self._tokenizer = tokenizer
        self._chat = chat
        self._order = RowOrder(len(source), seed, shuffle)
        self._share = share
        self._shares = shares
        self._budget = micro_batch_tokens

    def batch(self, number: int) -> Mixed:
        """The batch of optimizer step `number`, from 0. Raises `DataError` when all of it is too long."""
        chosen = self._order.batch(number, self._config.batch_size)
        rows, dropped = demonstration_rows(
            self._source, chosen, self._tokenizer, self._chat, self._config.max_tokens, "ptx.max_tokens"
        )
        return Mixed(
            batch_share(rows, self._share, self._shares, self._budget), sum(row.length for row in rows), dropped
        )
