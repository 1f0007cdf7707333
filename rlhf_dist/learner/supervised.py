"""Supervised training on demonstrations: one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlhf_dist.config.schema import SftConfig
from rlhf_dist.data.order import RowOrder
from rlhf_dist.data.packing import plan
from rlhf_dist.data.render import tokenize_demonstration
from rlhf_dist.data.rows import Demonstration
from rlhf_dist.errors import DataError
from rlhf_dist.learner.learning_rate import learning_rate
from rlhf_dist.learner.micro_batch_rows import Row, pack_rows, response_row
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.metrics import MetricSums


class SupervisedLearner:
    """Every rank makes the same batches from the same seed and trains on its own share: no data crosses processes."""

    def __init__(
        self,
        engine: ModelEngine,
        config: SftConfig,
        train: Sequence[Demonstration],
        held_out: Sequence[Demonstration],
        tokenizer: Any,
        *,
        chat: bool,
        seed: int,
        shares: int,
        micro_batch_tokens: int,
        shuffle: bool = True,
    ) -> None:
        self.engine = engine
        self._config = config
        self._train = train
        self._held_out = held_out
        self._tokenizer = tokenizer
        self._chat = chat
        self._order = RowOrder(len(train), seed, shuffle)
        self._shares = shares
        self._budget = micro_batch_tokens

    def train_step(self, step: int) -> MetricSums:
        """Optimizer step `step` (from 1): mean negative logprob over the whole batch's response tokens, all ranks."""
        rows, dropped = self._tokenized(self._train, self._order.batch(step - 1, self._config.batch_size))
        tokens = sum(row.length for row in rows)
        micro_batches = batch_share(rows, self.engine.share, self._shares, self._budget)
        nll = 0.0
        for index, batch in enumerate(micro_batches):
            logprobs = self.engine.logprobs(pack_rows(batch, self.engine.device), 1.0)
            loss = -logprobs.sum() * (1.0 / tokens if batch else 0.0)
            nll -= float(logprobs.detach().double().sum()) if batch else 0.0
            self.engine.backward(loss, last=index == len(micro_batches) - 1)
        rate = learning_rate(self._config.optimizer, step, self._config.steps)
        norm = self.engine.step(rate)
        mine = sum(row.length for batch in micro_batches for row in batch)
        return MetricSums(
            {
                names.SFT_LOSS: (nll, mine),
                "learner/grad_norm": (norm, 1.0),
                "learner/lr": (rate, 1.0),
                "data/tokens": (tokens, 1.0),
                "data/dropped_demonstrations": (dropped, 1.0),
            },
            {},
        )

    def evaluate(self) -> MetricSums:
        """Mean negative logprob over the held-out demonstrations' response tokens."""
        rows, _ = self._tokenized(self._held_out, range(len(self._held_out)))
        nll, tokens = 0.0, 0
        with torch.no_grad():
            for batch in batch_share(rows, self.engine.share, self._shares, self._budget):
                logprobs = self.engine.logprobs(pack_rows(batch, self.engine.device), 1.0)
                nll -= float(logprobs.double().sum()) if batch else 0.0
                tokens += sum(row.length for row in batch)
        return MetricSums({names.SFT_HELD_OUT_LOSS: (nll, tokens)}, {})

    def _tokenized(self, source: Sequence[Demonstration], numbers: Sequence[int]) -> tuple[list[Row], int]:
        return demonstration_rows(
            source, numbers, self._tokenizer, self._chat, self._config.max_tokens, "sft.max_tokens"
        )


def demonstration_rows(
    source: Sequence[Demonstration], numbers: Sequence[int], tokenizer: Any, chat: bool, max_tokens: int, key: str
) -> tuple[list[Row], int]:
    """Tokenised rows, and how many were left out (too long, nothing to learn). Raises `DataError` if all.

    `key` is the config key that `max_tokens` comes from, for the message.
    """
    rows = []
    for number in numbers:
        prompt, response = tokenize_demonstration(tokenizer, source[number], chat)
        if response and len(prompt) + len(response) <= max_tokens:
            rows.append(response_row(prompt, response))
    if not rows:
        raise DataError(
            f"none of {len(numbers)} demonstrations has a token to learn within "
            f"{key} {max_tokens}; raise it, or give shorter demonstrations"
        )
    return rows, len(numbers) - len(rows)


def batch_share(rows: Sequence[Row], share: int, shares: int, budget: int) -> list[list[Row]]:
    """One share's micro-batches of at most `budget` tokens, as many as every other's: `LearnerConfig.shares`."""
    lengths = np.asarray([len(row.tokens) for row in rows], dtype=np.int64)
    return [[rows[i] for i in chosen] for chosen in plan(lengths, shares, budget)[share]]
