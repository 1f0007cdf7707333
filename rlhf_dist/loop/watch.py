"""Watching for pattern collapse: a policy that finds what the reward model likes instead of what people do.

And for its opposite, a policy that finds nothing: groups whose responses all score alike teach nothing.

Numbers of each step, and warnings when several steps together look bad. Pure: no processes, no clock.

Source: Gao et al., Scaling Laws for Reward Model Overoptimization (arXiv:2210.10760), for the course of proxy and gold
over KL; Zheng et al., Secrets of RLHF part I (arXiv:2307.04964), for length, perplexity and KL as signs of collapse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.alerts import AlertKind
from rlhf_dist.types import Experience

WINDOW = 10
"""Steps whose mean is looked at; single steps are too noisy."""
NOISE_MARGIN = 5.0
"""Proxy and gold have moved when the means of two windows differ by so many of their standard errors. Gold is held
against its best window of the whole run, and the best of many is far out by chance alone: 3 would warn of that."""
KL_FACTOR = 4.0
"""The KL explodes when it is so many times that of the window before (a factor of 1.15 a step) ..."""
KL_FLOOR = 20.0
"""... and more than so many nats per response. Every run starts at 0 and multiplies; 20 nats is as far as the best of
10^9 samples lies from the start, and beyond where gold rewards were seen to peak."""
DISTINCT_SHARE = 0.2
"""Different responses have become few when they fall below this share of those at the start ..."""
DISTINCT_PER_PROMPT = 0.5
"""... and below so many for each prompt: one each is what a task with one right answer leads to."""
PERPLEXITY_RISE = 1.0
"""Perplexity under the reference has risen too far when it is by this share above that at the start: twice."""
CUT_LIMIT = 0.5
"""Lengths run away when more than this share of responses reaches the limit."""
NO_SIGNAL = "reward/groups_without_signal"
"""Share of groups whose responses all score alike; absent where credit comes from a critic."""
RECOVERED = 0.5
"""A sign is over, and may be warned of anew, when it has fallen to this share of what was warned of."""

REWARD_LOST = 0.5
"""The reward has collapsed when it has lost, against its best window, this share of what it had gained since the start,
or of the deviation of single responses at the start where that is more; and `NOISE_MARGIN` standard errors."""
REWARD_STD = "reward/std"

WATCHED = (
    names.REWARD_MEAN,
    REWARD_STD,
    names.REWARD_PROXY,
    names.REWARD_GOLD,
    names.KL_REFERENCE,
    names.DISTINCT_RESPONSES,
    names.REFERENCE_PERPLEXITY,
    names.CUT_SHARE,
    names.RESPONSE_LENGTH,
    NO_SIGNAL,
)
"""Metrics that `CollapseWatch` remembers; a run may lack any of them."""


def watch_metrics(experiences: Sequence[Experience], gold: str) -> dict[str, float]:
    """Signs of collapse in one step; see `telemetry.names` for their units.

    `gold`: name of the reward that is the truth; empty: there is none, nor are reward/proxy and reward/gold. kl/* and
    the perplexity are there in a run with a reference model.
    """
    total = np.concatenate([e.scores.total for e in experiences])
    hashes = np.concatenate([e.scores.hashes for e in experiences])
    metrics = {
        names.DISTINCT_PAIRS: float(np.concatenate([e.scores.distinct for e in experiences]).mean()),
        names.DISTINCT_RESPONSES: len(np.unique(hashes)) / len(hashes),
        names.LENGTH_REWARD_CORRELATION: correlation(np.concatenate([e.head.lengths for e in experiences]), total),
    }
    if gold:
        metrics[names.REWARD_PROXY] = float(total.mean())
        metrics[names.REWARD_GOLD] = float(np.concatenate([e.scores.components[gold] for e in experiences]).mean())
    references = [(e.head.lengths, e.reference) for e in experiences if e.reference is not None]
    if references:
        tokens = float(sum(lengths.sum() for lengths, _ in references))
        kl = np.concatenate([head.kl for _, head in references]).astype(np.float64)
        logprob = np.concatenate([head.logprob for _, head in references]).astype(np.float64)
        with np.errstate(over="ignore"):  # Infinite is what it then is.
            metrics[names.REFERENCE_PERPLEXITY] = float(np.exp(-logprob.sum() / tokens))
        metrics[names.KL_REFERENCE] = float(kl.mean())
        metrics[names.KL_REFERENCE_PER_TOKEN] = float(kl.sum() / tokens)
        metrics[names.KL_REFERENCE_MAX] = float(kl.max())
    return metrics


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's, of two arrays [n]; 0 where either is all the same."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    x, y = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (first, second))
    return float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


@dataclass(frozen=True, slots=True)
class Window:
    """Mean and noise of proxy and gold over `WINDOW` steps."""

    last: int
    """Its last step."""
    proxy: float
    gold: float
    proxy_error: float
    """Standard error of the mean."""
    gold_error: float

    @staticmethod
    def of(last: int, proxy: Sequence[float], gold: Sequence[float]) -> Window:
        errors = [float(np.std(values, ddof=1)) / math.sqrt(len(values)) for values in (proxy, gold)]
        return Window(last, float(np.mean(proxy)), float(np.mean(gold)), *errors)

    @property
    def steps(self) -> str:
        return f"{self.last - WINDOW + 1} to {self.last}"


@dataclass(frozen=True, slots=True)
class Level:
    """Mean and noise of one metric over `WINDOW` steps."""

    last: int
    """Its last step."""
    mean: float
    error: float
    """Standard error of the mean."""

    @staticmethod
    def of(last: int, values: Sequence[float]) -> Level:
        return Level(last, float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values)))


@dataclass(frozen=True, slots=True)
class WatchState:
    """What `CollapseWatch.state` holds."""

    step: int
    recent: dict[str, list[float]]
    first: dict[str, float]
    best: Window | None
    active: list[str]
    highest: Level | None = None


@dataclass(frozen=True, slots=True)
class Sign:
    """One kind of trouble, as it stands."""

    kind: AlertKind
    strength: float
    """1: what is warned of."""
    sentence: Callable[[], str]
    """Says it with its numbers, and what one could do."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A sign that has appeared."""

    kind: AlertKind
    sentence: str


class CollapseWatch:
    """Warns once when a sign of collapse appears, and again only if it had gone. Fed every training step, in order."""

    def __init__(self, group_size: int) -> None:
        """`group_size`: responses per prompt."""
        self._group_size = group_size
        self._step = 0
        self._recent: dict[str, list[float]] = {}
        self._first: dict[str, float] = {}
        self._best: Window | None = None
        self._highest: Level | None = None
        self._active: set[str] = set()

    def step(self, metrics: Mapping[str, float]) -> list[Seen]:
        """Take in one step's metrics; returns what is to be warned of."""
        self._step += 1
        for name in WATCHED:
            if name in metrics:
                recent = self._recent.setdefault(name, [])
                recent.append(metrics[name])
                del recent[: -2 * WINDOW]
                if name not in self._first and len(recent) == WINDOW:
                    self._first[name] = float(np.mean(recent))
        warnings = []
        for sign in self._signs():
            if sign.kind not in self._active and sign.strength >= 1.0:
                self._active.add(sign.kind)
                warnings.append(Seen(sign.kind, sign.sentence()))
            elif sign.strength < RECOVERED:
                self._active.discard(sign.kind)
        return warnings

    def state(self) -> dict[str, Any]:
        """All it remembers, for a checkpoint's JSON."""
        return {
            "step": self._step,
            "recent": {name: list(values) for name, values in self._recent.items()},
            "first": dict(self._first),
            "best": None if self._best is None else asdict(self._best),
            "active": sorted(self._active),
            "highest": None if self._highest is None else asdict(self._highest),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._step = state["step"]
        self._recent = {name: list(values) for name, values in state["recent"].items()}
        self._first = dict(state["first"])
        self._best = None if state["best"] is None else Window(**state["best"])
        self._active = set(state["active"])
        highest = state.get("highest")  # not in checkpoints of earlier versions
        self._highest = None if highest is None else Level(**highest)

    def _signs(self) -> Iterator[Sign]:
        yield from self._overoptimized()
        yield from self._reward()
        yield from self._kl()
        yield from self._distinct()
        yield from self._perplexity()
        yield from self._length()
        yield from self._no_signal()

    def _means(self, name: str) -> tuple[float, float] | None:
        """(over the window before the last, over the last); None before there are two."""
        recent = self._recent.get(name, ())
        if len(recent) < 2 * WINDOW:
            return None
        return float(np.mean(recent[:WINDOW])), float(np.mean(recent[WINDOW:]))

    def _overoptimized(self) -> Iterator[Sign]:
        """The proxy is above what it was in gold's best window so far, and gold is below it."""
        proxy, gold = (self._recent.get(name, ()) for name in (names.REWARD_PROXY, names.REWARD_GOLD))
        if len(proxy) < 2 * WINDOW or len(gold) < 2 * WINDOW:
            return
        before = Window.of(self._step - WINDOW, proxy[:WINDOW], gold[:WINDOW])
        best = before if self._best is None or before.gold > self._best.gold else self._best
        self._best = best
        now = Window.of(self._step, proxy[WINDOW:], gold[WINDOW:])
        rise = standard_errors(now.proxy - best.proxy, best.proxy_error, now.proxy_error)
        fall = standard_errors(best.gold - now.gold, best.gold_error, now.gold_error)
        yield Sign(
            "overoptimized",
            min(rise, fall) / NOISE_MARGIN,
            lambda: (
                f"the proxy reward rose from {best.proxy:.3g} to {now.proxy:.3g} while the gold reward fell from "
                f"{best.gold:.3g} to {now.gold:.3g} (means of steps {best.steps} and {now.steps}): the reward is "
                f"over-optimised; raise algo.kl.coef, or stop at the checkpoint of step {best.last} or the nearest one"
            ),
        )

    def _reward(self) -> Iterator[Sign]:
        """The reward is far below its best window so far."""
        recent = self._recent.get(names.REWARD_MEAN, ())
        means, first = self._means(names.REWARD_MEAN), self._first.get(names.REWARD_MEAN)
        if means is None or first is None:
            return
        before = Level.of(self._step - WINDOW, recent[:WINDOW])
        if self._highest is None or before.mean > self._highest.mean:
            self._highest = before
        best, now = self._highest, Level.of(self._step, recent[WINDOW:])
        fall = best.mean - now.mean
        lost = max(best.mean - first, self._first.get(REWARD_STD, 0.0)) * REWARD_LOST
        noise = standard_errors(fall, best.error, now.error) / NOISE_MARGIN
        yield Sign(
            "reward",
            min(noise, fall / lost if lost > 0 else noise),
            lambda: (
                f"the reward collapsed: from {best.mean:.3g} (mean of {WINDOW} steps up to step {best.last}) to "
                f"{now.mean:.3g}, and it began at {first:.3g}; lower learner.optimizer.lr or raise algo.kl.coef, and "
                f"start again from the checkpoint of step {best.last} or the nearest one before"
            ),
        )

    def _kl(self) -> Iterator[Sign]:
        means = self._means(names.KL_REFERENCE)
        if means is None:
            return
        before, now = means
        growth = now / (KL_FACTOR * before) if before > 0 else math.inf
        yield Sign(
            "kl",
            min(now / KL_FLOOR, growth),
            lambda: (
                f"the KL to the reference explodes: from {before:.3g} to {now:.3g} nats per response (means of "
                f"{WINDOW} steps each); raise algo.kl.coef, lower learner.optimizer.lr, or stop at the checkpoint of "
                f"step {self._step - WINDOW} or the nearest one"
            ),
        )

    def _distinct(self) -> Iterator[Sign]:
        means = self._means(names.DISTINCT_RESPONSES)
        if means is None:
            return
        first, now = self._first[names.DISTINCT_RESPONSES], means[1]
        limit = min(DISTINCT_SHARE * first, DISTINCT_PER_PROMPT / self._group_size)
        yield Sign(
            "distinct",
            limit / now,
            lambda: (
                f"only {now:.1%} of a step's responses differ from each other, {first:.1%} did at the start, so "
                "different prompts get the same response; raise algo.entropy_coef or algo.kl.coef, or check what the "
                "rewards give for that response"
            ),
        )

    def _perplexity(self) -> Iterator[Sign]:
        means = self._means(names.REFERENCE_PERPLEXITY)
        if means is None:
            return
        first, now = self._first[names.REFERENCE_PERPLEXITY], means[1]
        yield Sign(
            "perplexity",
            (now / first - 1.0) / PERPLEXITY_RISE,
            lambda: (
                f"the responses' perplexity under the reference rose from {first:.3g} at the start to {now:.3g}: they "
                "become text that the reference would hardly write; raise algo.kl.coef, or look at the samples"
            ),
        )

    def _length(self) -> Iterator[Sign]:
        means, lengths = self._means(names.CUT_SHARE), self._means(names.RESPONSE_LENGTH)
        if means is None or lengths is None:
            return
        yield Sign(
            "length",
            means[1] / CUT_LIMIT,
            lambda: (
                f"{means[1]:.0%} of the responses are cut at rollout.max_response_tokens (mean length {lengths[1]:.3g} "
                f"tokens, {self._first[names.RESPONSE_LENGTH]:.3g} at the start); set "
                "algo.shaping.missing_end_penalty, raise algo.kl.coef, or allow more tokens"
            ),
        )

    def _no_signal(self) -> Iterator[Sign]:
        recent = self._recent.get(NO_SIGNAL, [])[-WINDOW:]
        if len(recent) < WINDOW:
            return
        yield Sign(
            "no signal",
            float(np.mean(recent)),
            lambda: (
                f"for {WINDOW} steps the responses of each group have all scored alike, so nothing is learnt; look at "
                "rollouts/*.parquet: the start has to succeed sometimes, and to fail sometimes. Give easier or harder "
                "prompts, a supervised start (rlhf-dist sft), or a reward with more than two values"
            ),
        )


def standard_errors(difference: float, first_error: float, second_error: float) -> float:
    """A difference of two means in units of its own standard error; without any noise every difference is infinite."""
    error = math.hypot(first_error, second_error)
    if error == 0.0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / error
