"""Training of a reward model on human judgements: one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.algo.preference import ranking_losses, rating_loss, thumbs_loss
from rlhf_dist.config.schema import RewardConfig
from rlhf_dist.data.judgement_rows import Comparison, Judgement, Rating
from rlhf_dist.data.order import RowOrder
from rlhf_dist.data.packing import plan
from rlhf_dist.data.render import tokenize_demonstration
from rlhf_dist.data.rows import Demonstration
from rlhf_dist.errors import DataError
from rlhf_dist.learner.learning_rate import learning_rate
from rlhf_dist.learner.micro_batch_rows import Row, pack_rows, response_row
from rlhf_dist.learner.scalar_engine import ScalarEngine, ScalarEngineWithLM
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.metrics import MetricSums

Made = TypeVar("Made")
LM_LOSS = "reward_model/lm_loss"
"""Language-model loss on the better responses, nats per token."""
TRAIN_ACCURACY = "reward_model/train_accuracy"
"""Share of a batch's pairs whose better side scores higher, before the step."""


@dataclass(frozen=True, slots=True)
class Element:
    """A judgement as rows; they stay together, so that a ranking's responses are scored once."""

    rows: tuple[Row, ...]
    """One per response: prompt, response, end token."""
    judgement: Judgement

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """What the model makes of the held-out judgements, or of one rank's share of them."""

    scores: np.ndarray
    """float32 [S]; the raw score of every response."""
    better: np.ndarray
    """int64 [P]; places in `scores` of the better sides of all pairs; none for ratings."""
    worse: np.ndarray
    """int64 [P]; those of the worse sides."""
    values: np.ndarray
    """float32 [S] what people rated; none for comparisons."""
    thumbs: bool
    """Whether those are 1 and 0, learnt by logistic loss."""
    loss: float
    """Sum over judgements; a ranking's is the mean over its pairs."""
    judgements: int
    """How many."""
    dropped: int
    """Judgements left out because they were too long; every rank knows of all."""

    @staticmethod
    def merge(parts: Iterable[HeldOutScores]) -> HeldOutScores:
        """Join the shares of all ranks."""
        parts = list(parts)
        starts = np.cumsum([0, *(len(part.scores) for part in parts[:-1])])
        return HeldOutScores(
            scores=np.concatenate([part.scores for part in parts]),
            better=np.concatenate([part.better + start for part, start in zip(parts, starts, strict=True)]),
            worse=np.concatenate([part.worse + start for part, start in zip(parts, starts, strict=True)]),
            values=np.concatenate([part.values for part in parts]),
            thumbs=any(part.thumbs for part in parts),
            loss=float(sum(part.loss for part in parts)),
            judgements=sum(part.judgements for part in parts),
            dropped=max(part.dropped for part in parts),
        )


@dataclass(frozen=True, slots=True)
class Pairs:
    """All pairs of a micro-batch's comparisons, by row."""

    better: Tensor
    """int64 [P]; rows, counted through the micro-batch."""
    worse: Tensor
    """int64 [P]."""
    margin: Tensor
    """float32 [P]; by how much the better side has to lead."""
    element: Tensor
    """int64 [P]; which comparison the pair is of."""


class PreferenceLearner:
    """Every rank makes the same batches from the same seed and trains on its own share: no data crosses processes."""

    def __init__(
        self,
        engine: ScalarEngine,
        config: RewardConfig,
        train: Sequence[Judgement],
        held_out: Sequence[Judgement],
        tokenizer: Any,
        *,
        chat: bool,
        max_tokens: int,
        seed: int,
        shares: int,
        micro_batch_tokens: int,
        shuffle: bool = True,
    ) -> None:
        """`engine` is a ScalarEngineWithLM if `config.lm_coef` is above 0; it gives raw scores."""
        self.engine = engine
        self._config = config
        self._train = train
        self._tokenizer = tokenizer
        self._chat = chat
        self._max_tokens = max_tokens
        self._order = RowOrder(len(train), seed, shuffle)
        self._shares = shares
        self._budget = micro_batch_tokens
        self._held_out, self._held_out_dropped = first_kept(
            lambda numbers: self._fitting(held_out, numbers), [range(len(held_out))], max_tokens
        )

    def train_step(self, step: int) -> MetricSums:
        """Optimizer step `step` (from 1): mean loss over the whole batch's judgements, all ranks."""
        elements, dropped = first_kept(
            lambda numbers: self._fitting(self._train, numbers),
            self._order.batches(step - 1, self._config.batch_size),
            self._max_tokens,
        )
        learnt = sum(row.length for element in elements for row in better_rows(element))
        micro_batches = self._mine(elements)
        parts = []
        for index, batch in enumerate(micro_batches):
            loss, sums = self._losses(batch, 1.0 / len(elements), self._config.lm_coef / max(learnt, 1))
            self.engine.backward(loss, last=index == len(micro_batches) - 1)
            parts.append(sums)
        rate = learning_rate(self._config.optimizer, step, self._config.steps)
        norm = self.engine.step(rate)
        whole = {
            "learner/grad_norm": (norm, 1.0),
            "learner/lr": (rate, 1.0),
            "data/tokens": (float(sum(element.tokens for element in elements)), 1.0),
            "data/dropped_judgements": (float(dropped), 1.0),
        }
        return MetricSums.merge([*parts, MetricSums(whole)])

    @torch.no_grad()
    def evaluate(self) -> HeldOutScores:
        """Scores and loss of this rank's share of the held-out judgements."""
        empty = np.empty(0, np.float32)
        nothing = HeldOutScores(empty, empty.astype(np.int64), empty.astype(np.int64), empty, False, 0.0, 0, 0)
        parts = [nothing]
        for batch in self._mine(self._held_out):
            rows = [row for element in batch for row in element.rows]
            scores = self.engine.scores(pack_rows(rows, self.engine.device))
            if batch:
                loss, pairs = judgement_loss(scores, batch)
                parts.append(
                    HeldOutScores(
                        scores=scores.float().cpu().numpy(),
                        better=pairs.better.cpu().numpy(),
                        worse=pairs.worse.cpu().numpy(),
                        values=np.asarray(ratings(batch), np.float32),
                        thumbs=any(isinstance(e.judgement, Rating) and e.judgement.kind == "logistic" for e in batch),
                        loss=float(loss),
                        judgements=len(batch),
                        dropped=self._held_out_dropped,
                    )
                )
        return HeldOutScores.merge(parts)

    def _losses(self, batch: Sequence[Element], share: float, lm_share: float) -> tuple[Tensor, MetricSums]:
        """A micro-batch's part of the global loss (`share` of a judgement, `lm_share` of a token), and its metrics."""
        rows = [row for element in batch for row in element.rows]
        packed = pack_rows(rows, self.engine.device)
        best = {id(row) for element in batch for row in better_rows(element)}
        nll: Tensor | float = 0.0
        if self._config.lm_coef > 0:
            assert isinstance(self.engine, ScalarEngineWithLM)
            # One token at least, so that the head takes part in every backward pass, as ZeRO wants it.
            scores, logprobs = self.engine.scores_and_logprobs(packed, [id(row) in best for row in rows] or [True])
            nll = -logprobs.sum()
        else:
            scores = self.engine.scores(packed)
        if not batch:
            return (scores.sum() + nll) * 0.0, MetricSums()
        loss, pairs = judgement_loss(scores, batch)
        sums = {names.REWARD_MODEL_LOSS: (float(loss.detach()), float(len(batch)))}
        if len(pairs.better):
            led = torch.sign(scores[pairs.better] - scores[pairs.worse])
            sums[TRAIN_ACCURACY] = (float((0.5 + 0.5 * led).sum()), float(len(led)))
        if isinstance(nll, Tensor):
            learnt = sum(row.length for element in batch for row in better_rows(element))
            sums[LM_LOSS] = (float(nll.detach()), float(learnt))
        return loss * share + nll * lm_share, MetricSums(sums)

    def _fitting(self, source: Sequence[Judgement], numbers: Sequence[int]) -> list[Element]:
        """Tokenised judgements, without those that are too long."""
        made = [tokenize_judgement(self._tokenizer, source[number], self._chat) for number in numbers]
        return [e for e in made if max(len(row.tokens) for row in e.rows) <= self._max_tokens]

    def _mine(self, elements: Sequence[Element]) -> list[list[Element]]:
        """This rank's micro-batches."""
        lengths = np.asarray([element.tokens for element in elements], dtype=np.int64)
        return [
            [elements[i] for i in chosen] for chosen in plan(lengths, self._shares, self._budget)[self.engine.share]
        ]


def first_kept(
    fitting: Callable[[Sequence[int]], list[Made]], batches: Iterable[Sequence[int]], max_tokens: int
) -> tuple[list[Made], int]:
    """What fits of the first of `batches` in which something does, and how many judgements were left out as too long.

    So a step whose judgements are all too long learns from those of the next one. Raises DataError if none fits at all.
    """
    looked = 0
    for numbers in batches:
        looked += len(numbers)
        kept = fitting(numbers)
        if kept:
            return kept, looked - len(kept)
    raise DataError(
        f"none of {looked} judgements fits in preferences.max_tokens {max_tokens} with prompt and response; raise it, "
        "or give shorter ones"
    )


def tokenize_judgement(tokenizer: Any, judgement: Judgement, chat: bool) -> Element:
    """One row per response, as a policy would have produced it."""
    responses = judgement.responses if isinstance(judgement, Comparison) else (judgement.response,)
    rows = []
    for response in responses:
        prompt, tokens = tokenize_demonstration(tokenizer, Demonstration(judgement.messages, response), chat)
        if not tokens:
            raise DataError(f"{judgement.place}: the model's tokenizer knows no character of the prompt and a response")
        rows.append(response_row(prompt, tokens))
    return Element(tuple(rows), judgement)


def judgement_loss(scores: Tensor, batch: Sequence[Element]) -> tuple[Tensor, Pairs]:
    """(sum over judgements of their losses, scalar; the pairs of the comparisons among them).

    `scores`: float32 [S], of all rows of `batch` in order. Every comparison counts as the mean over its pairs.
    """
    pairs = pairs_of(batch, scores.device)
    losses, weights = ranking_losses(scores, pairs.better, pairs.worse, pairs.margin, pairs.element)
    loss = (losses * weights).sum()
    starts = row_starts(batch)
    for kind, of_kind in (("regression", rating_loss), ("logistic", thumbs_loss)):
        chosen = [i for i, e in enumerate(batch) if isinstance(e.judgement, Rating) and e.judgement.kind == kind]
        if chosen:
            values = torch.tensor(ratings([batch[i] for i in chosen]), dtype=torch.float32, device=scores.device)
            loss = loss + of_kind(scores[[starts[i] for i in chosen]], values).sum()
    return loss, pairs


def pairs_of(batch: Sequence[Element], device: torch.device) -> Pairs:
    """All pairs of the comparisons in `batch`; ratings have none."""
    found = [
        (start + pair.better, start + pair.worse, pair.margin, number)
        for number, (element, start) in enumerate(zip(batch, row_starts(batch), strict=True))
        if isinstance(element.judgement, Comparison)
        for pair in element.judgement.pairs
    ]
    columns = list(zip(*found, strict=True)) or [(), (), (), ()]
    return Pairs(
        better=torch.tensor(columns[0], dtype=torch.int64, device=device),
        worse=torch.tensor(columns[1], dtype=torch.int64, device=device),
        margin=torch.tensor(columns[2], dtype=torch.float32, device=device),
        element=torch.tensor(columns[3], dtype=torch.int64, device=device),
    )


def row_starts(batch: Sequence[Element]) -> list[int]:
    """The first row of each element, counted through the batch."""
    return np.cumsum([0, *(len(element.rows) for element in batch)])[:-1].tolist()


def ratings(batch: Sequence[Element]) -> list[float]:
    """What people rated, of the ratings among `batch`."""
    return [element.judgement.value for element in batch if isinstance(element.judgement, Rating)]


def better_rows(element: Element) -> list[Row]:
    """The responses of a comparison that are better than some other and worse than none."""
    if not isinstance(element.judgement, Comparison):
        return []
    best = {pair.better for pair in element.judgement.pairs} - {pair.worse for pair in element.judgement.pairs}
    return [element.rows[place] for place in sorted(best)]
