"""Training of a policy on human judgements themselves, as DPO does: one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.algo.pair_losses import PAIR_LOSSES, Responses, implicit_rewards, learns_chosen, single_loss
from rlhf_dist.algo.preference import kto_reference_point, pair_weights
from rlhf_dist.config.prefer_keys import PREFER_METHODS, PreferConfig
from rlhf_dist.data.judgement_rows import Comparison, Judgement, Rating
from rlhf_dist.data.order import RowOrder
from rlhf_dist.data.packing import plan
from rlhf_dist.errors import DataError
from rlhf_dist.learner.checkpoint_files import REFERENCE_VALUES_FILE
from rlhf_dist.learner.learning_rate import learning_rate
from rlhf_dist.learner.micro_batch_rows import Packed, Row, pack_rows
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.learner.preference_learner import (
    Element,
    better_rows,
    first_kept,
    pairs_of,
    row_starts,
    tokenize_judgement,
)
from rlhf_dist.learner.reference_values import Key, ReferenceValues
from rlhf_dist.learner.supervised import batch_share
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.metrics import MetricSums

PART = 512
"""Judgements whose reference logprobs are computed by one call."""
NEIGHBOURS = 64
"""How many judgements KTO looks at for one with another prompt."""
LogProbs = Callable[[Packed], Tensor]
"""Packed rows -> logprobs of the tokens with a loss, float32 [N]."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A judgement, ready to be learnt from."""

    key: Key
    element: Element
    other: Row | None
    """KTO: its prompt with the response to another prompt, for the reference point; None where that is too long, or
    where no other prompt is near."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """All that the reference reads."""
        return self.element.rows if self.other is None else (*self.element.rows, self.other)


class PreferLearner:
    """Every rank makes the same batches from the same seed and trains on its own share: no data crosses processes, but
    for sums of logprobs."""

    def __init__(
        self,
        engine: ModelEngine,
        config: PreferConfig,
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
        reference: LogProbs | None = None,
    ) -> None:
        """`reference`: of a new run with a method that has one; it is given up once it has read all judgements."""
        self.engine = engine
        self._config = config
        self._method = PREFER_METHODS[config.method]
        self._sources = {False: train, True: held_out}
        self._tokenizer = tokenizer
        self._chat = chat
        self._max_tokens = max_tokens
        self._order = RowOrder(len(train), seed, shuffle)
        self._shares = shares
        self._budget = micro_batch_tokens
        self._values = ReferenceValues()
        self._reference = reference
        self._unread = self._all_keys() if reference else []
        self._asked: set[Key] = set()
        self._held_out, self._held_out_dropped = self._first_kept(True, [range(len(held_out))])

    def read_reference(self) -> int:
        """The reference's logprobs of the next part of all judgements that the run uses; returns how many are left.

        Every rank computes those of its share, and keeps all.
        """
        part, self._unread = self._unread[:PART], self._unread[PART:]
        self._asked.update(part)
        judged = [
            each
            for held_out in (False, True)
            if (numbers := [number for is_held_out, number in part if is_held_out == held_out])
            for each in self._made(held_out, numbers)
        ]
        # Always called, for an engine that gathers its weights, or for all ranks to meet.
        self._values.keep(self._sums_of_all(judged))
        self._unread = self._unread or self._further_keys()
        if not self._unread:
            self._reference = None
        return len(self._unread)

    def save_reference(self, folder: Path) -> None:
        """Into a checkpoint; rank 0's is enough."""
        if self._method.reference and self.engine.rank == 0:
            self._values.save(folder, self._digest)

    def restore_reference(self, folder: Path) -> None:
        """From a checkpoint. Raises DataError, also where its values are of other judgements than those given now."""
        if self._method.reference and self._values.restore(folder) != self._digest:
            raise DataError(
                f"{folder / REFERENCE_VALUES_FILE}: has the reference's logprobs of other judgements than preferences "
                f"gives now, from {self._sources[False][0].place} on: rows were changed, added, removed or put in "
                "another order; resume with the data that the run began with, or start a new run with another name="
            )

    @cached_property
    def _digest(self) -> bytes:
        """Of the judgements that have values, as a model reads them, and of where they stand."""
        digest = blake2b(repr([len(source) for source in self._sources.values()]).encode(), digest_size=16)
        for held_out, number in self._values.judgements():
            source = self._sources[held_out]
            if number < len(source):  # else the lengths differ
                other = self._neighbour(held_out, number)
                texts = [replace(source[n], place="") for n in (number, other) if n is not None]
                digest.update(repr((held_out, number, texts)).encode(errors="surrogatepass"))
        return digest.digest()

    def train_step(self, step: int) -> MetricSums:
        """Optimizer step `step` (from 1): mean loss over the whole batch's judgements, all ranks."""
        judged, dropped = self._first_kept(False, self._order.batches(step - 1, self._config.batch_size))
        with torch.no_grad():
            point = self._reference_point(judged)
        micro_batches, parts = self._mine(judged), []
        of_judgement, of_token = shares_of(judged)
        for index, batch in enumerate(micro_batches):
            loss, sums = self._losses(batch, point, of_judgement, of_token)
            self.engine.backward(loss, last=index == len(micro_batches) - 1)
            parts.append(train_sums(sums))
        rate = learning_rate(self._config.optimizer, step, self._config.steps)
        norm = self.engine.step(rate)
        whole = {
            "learner/grad_norm": (norm, 1.0),
            "learner/lr": (rate, 1.0),
            "data/tokens": (float(sum(each.element.tokens for each in judged)), 1.0),
            "data/dropped_judgements": (float(dropped), 1.0),
        }
        if self._config.method == "kto":
            whole["prefer/reference_point"] = (point, 1.0)
        return MetricSums.merge([*parts, MetricSums(whole)])

    @torch.no_grad()
    def evaluate(self) -> MetricSums:
        """Loss, implicit rewards and logprobs of this rank's share of the held-out judgements."""
        point = self._reference_point(self._held_out)
        shares = shares_of(self._held_out)
        parts = [self._losses(batch, point, *shares)[1] for batch in self._mine(self._held_out)]
        dropped = {"data/dropped_held_out": (float(self._held_out_dropped), 1.0)} if self._held_out_dropped else {}
        return MetricSums.merge([*parts, MetricSums(dropped)])

    def _losses(
        self, batch: Sequence[Judged], point: float, of_judgement: float, of_token: float
    ) -> tuple[Tensor, MetricSums]:
        """A micro-batch's part of the global loss, and the sums of what is shown."""
        elements = [each.element for each in batch]
        packed = pack_rows([row for element in elements for row in element.rows], self.engine.device)
        logprobs = self.engine.logprobs(packed, 1.0)
        if not batch:
            return logprobs.sum() * 0.0, MetricSums()
        responses = self._responses(batch, row_sums(logprobs, packed.offsets))
        pairs = pairs_of(elements, logprobs.device)
        chosen, rejected = responses.at(pairs.better), responses.at(pairs.worse)
        losses = PAIR_LOSSES[self._config.method](self._config, chosen, rejected, point)
        total = (losses * pair_weights(pairs.element)).sum()
        good = called_good(elements, logprobs.device)
        singles = [start for element, start in zip(elements, row_starts(elements), strict=True) if is_single(element)]
        single = responses.at(torch.tensor(singles, dtype=torch.int64, device=logprobs.device))
        if singles:
            total = total + single_loss(self._config, single, good, point).sum()
        loss = total * of_judgement
        sums: dict[str, tuple[float, float]] = {}
        if learns_chosen(self._config):
            best = {id(row) for element in elements for row in better_rows(element)}
            learnt = [id(row) in best for element in elements for row in element.rows]
            nll = -responses.logprobs[torch.tensor(learnt, device=logprobs.device)].sum()
            loss = loss + nll * of_token
            sums["prefer/held_out_chosen_nll"] = (float(nll.detach()), float(chosen_tokens(elements)))
        sums[names.PREFER_HELD_OUT_LOSS] = (float(loss.detach()) / of_judgement, float(len(batch)))
        with torch.no_grad():
            sums |= pair_figures(self._config, chosen, rejected) if len(pairs.better) else {}
            sums |= single_figures(self._config, single, good) if singles else {}
        return loss, MetricSums(sums)

    def _responses(self, batch: Sequence[Judged], sums: Tensor) -> Responses:
        tokens = [row.length for each in batch for row in each.element.rows]
        reference = torch.zeros_like(sums, requires_grad=False)
        if self._method.reference:
            kept = [self._values.of(each.key)[: len(each.element.rows)] for each in batch]
            reference = torch.from_numpy(np.concatenate(kept)).to(sums.device)
        return Responses(sums, reference, torch.tensor(tokens, dtype=torch.float32, device=sums.device))

    def _reference_point(self, judged: Sequence[Judged]) -> float:
        """KTO's, over the rows of all ranks; 0 for other methods."""
        others = {each.key: each.other for each in judged if each.other is not None}
        if not others:
            return 0.0
        keys, ours = list(others), self._sums(list(others.values()), lambda packed: self.engine.logprobs(packed, 1.0))
        ratios = [value - float(self._values.of(keys[row])[-1]) for row, value in ours.items()]
        everyone = self.engine.of_all_ranks(ratios)[:: self.engine.parts]
        return kto_reference_point(sum(map(sum, everyone)), len(others))

    def _sums_of_all(self, judged: Sequence[Judged]) -> dict[Key, list[float]]:
        """The reference's, of every rank's rows."""
        assert self._reference is not None
        rows = [row for each in judged for row in each.rows]
        with torch.no_grad():
            mine = self._sums(rows, self._reference)
        found = {row: value for one in self.engine.of_all_ranks(mine) for row, value in one.items()}
        values = iter([found[row] for row in range(len(rows))])
        return {each.key: [next(values) for _ in each.rows] for each in judged}

    def _sums(self, rows: Sequence[Row], logprobs: LogProbs) -> dict[int, float]:
        """Place in `rows` -> logprob of the whole response, of this rank's share."""
        places = {id(row): place for place, row in enumerate(rows)}
        found: dict[int, float] = {}
        for batch in batch_share(rows, self.engine.share, self._shares, self._budget):
            packed = pack_rows(batch, self.engine.device)
            sums = row_sums(logprobs(packed), packed.offsets)
            found |= {places[id(row)]: value for row, value in zip(batch, sums.tolist(), strict=False)}
        return found

    def _all_keys(self) -> list[Key]:
        """Every judgement that the run will use, once."""
        size = self._config.batch_size
        used = dict.fromkeys(n for step in range(self._config.steps) for n in self._order.batch(step, size))
        return [*((False, n) for n in used), *((True, n) for n in range(len(self._sources[True])))]

    def _further_keys(self) -> list[Key]:
        """Those that steps will take in place of judgements that are all too long, once; see `first_kept`."""
        found: dict[Key, None] = {}
        for step in range(self._config.steps):
            for numbers in self._order.batches(step, self._config.batch_size):
                keys = [(False, number) for number in numbers]
                if any(key in self._values for key in keys):
                    break
                unread = [key for key in keys if key not in self._asked]
                if unread:
                    found |= dict.fromkeys(unread)
                    break
        return list(found)

    def _first_kept(self, held_out: bool, batches: Iterable[Sequence[int]]) -> tuple[list[Judged], int]:
        """See `first_kept`."""
        return first_kept(lambda numbers: list(self._made(held_out, numbers)), batches, self._max_tokens)

    def _made(self, held_out: bool, numbers: Iterable[int]) -> Iterator[Judged]:
        """Those that are not too long."""
        for number in numbers:
            element = self._tokenized(held_out, number)
            if max(len(row.tokens) for row in element.rows) <= self._max_tokens:
                yield Judged((held_out, number), element, self._other(held_out, number, element))

    def _tokenized(self, held_out: bool, number: int) -> Element:
        return tokenize_judgement(self._tokenizer, self._sources[held_out][number], self._chat)

    def _other(self, held_out: bool, number: int, element: Element) -> Row | None:
        """The prompt of `element` with the first response to the next other prompt of its data; see `Judged.other`."""
        neighbour = self._neighbour(held_out, number)
        if neighbour is None:
            return None
        answer = self._tokenized(held_out, neighbour).rows[0]
        prompt = element.rows[0]
        tokens = np.concatenate([prompt.tokens[~prompt.loss_mask], answer.tokens[answer.loss_mask]])
        made = Row(tokens, np.arange(len(tokens)) >= len(tokens) - answer.length)
        return made if len(tokens) <= self._max_tokens else None

    def _neighbour(self, held_out: bool, number: int) -> int | None:
        """KTO: the next judgement of the same data with another prompt."""
        source = self._sources[held_out]
        if self._config.method != "kto":
            return None
        for further in range(1, min(NEIGHBOURS + 1, len(source))):
            neighbour = (number + further) % len(source)
            if source[neighbour].messages != source[number].messages:
                return neighbour
        return None

    def _mine(self, judged: Sequence[Judged]) -> list[list[Judged]]:
        """This rank's micro-batches."""
        lengths = np.asarray([each.element.tokens for each in judged], dtype=np.int64)
        return [[judged[i] for i in chosen] for chosen in plan(lengths, self._shares, self._budget)[self.engine.share]]


def row_sums(logprobs: Tensor, offsets: Tensor) -> Tensor:
    """[S] of each row, float32; added up in float64, so that the order of addition does not show.

    logprobs: [N]; offsets: int64 [S + 1], see `Packed`.
    """
    lengths = offsets.diff()
    rows = torch.repeat_interleave(lengths, output_size=len(logprobs))
    return logprobs.new_zeros(len(lengths), dtype=torch.float64).index_add(0, rows, logprobs.double()).float()


def shares_of(judged: Sequence[Judged]) -> tuple[float, float]:
    """Weight of a judgement and of a token of a better response in the loss of the optimizer step, over all ranks."""
    return 1.0 / len(judged), 1.0 / max(chosen_tokens([each.element for each in judged]), 1)


def chosen_tokens(elements: Iterable[Element]) -> int:
    """Of the better responses."""
    return sum(row.length for element in elements for row in better_rows(element))


def is_single(element: Element) -> bool:
    """A response that was judged by itself."""
    return not isinstance(element.judgement, Comparison)


def called_good(elements: Sequence[Element], device: torch.device) -> Tensor:
    """bool, one for each of the elements that are a thumb up or down."""
    values = [element.judgement.value > 0.5 for element in elements if isinstance(element.judgement, Rating)]
    return torch.tensor(values, dtype=torch.bool, device=device)


def pair_figures(config: PreferConfig, chosen: Responses, rejected: Responses) -> dict[str, tuple[float, float]]:
    """Sums over pairs of what is shown."""
    better, worse = implicit_rewards(config, chosen), implicit_rewards(config, rejected)
    count = float(len(better))
    of_pairs = {
        names.PREFER_ACCURACY: 0.5 + 0.5 * torch.sign(better - worse),
        "prefer/margin": better - worse,
        "prefer/chosen_reward": better,
        "prefer/rejected_reward": worse,
        "prefer/chosen_logprob": chosen.logprobs,
        "prefer/rejected_logprob": rejected.logprobs,
    }
    return {name: (float(values.double().sum()), count) for name, values in of_pairs.items()}


def single_figures(config: PreferConfig, responses: Responses, good: Tensor) -> dict[str, tuple[float, float]]:
    """The same of responses that were judged by themselves, of which none is better than a certain other."""
    found: dict[str, tuple[float, float]] = {}
    for kind, rows in (("chosen", good), ("rejected", ~good)):
        own = responses.at(rows)
        for what, values in (("reward", implicit_rewards(config, own)), ("logprob", own.logprobs)):
            found[f"prefer/{kind}_{what}"] = (float(values.double().sum()), float(len(values)))
    return found


def train_sums(sums: MetricSums) -> MetricSums:
    """The figures of a batch in training, before its step, under names of their own."""
    own = {
        names.PREFER_HELD_OUT_LOSS: names.PREFER_LOSS,
        names.PREFER_ACCURACY: "prefer/train_accuracy",
        "prefer/margin": "prefer/train_margin",
        "prefer/held_out_chosen_nll": "prefer/chosen_nll",
    }
    return MetricSums({own[name]: value for name, value in sums.sums.items() if name in own})
