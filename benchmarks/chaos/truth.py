"""What members come to: functions of what they are asked, so that it is the same in every life and at every try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import xxhash

from rlhf_dist.types import GroupHead, NonFinite, Request, Scores

REFUSED, NAN, RIGHT = 0.04, 0.03, 0.5
"""Shares of prompts that no worker samples, of responses whose reward is NaN, and of those that are right."""


def digest(*parts: object) -> str:
    """Of anything that has a repr of its own."""
    return xxhash.xxh3_128_hexdigest(repr(parts).encode())


def number(*parts: object) -> float:
    """From 0 to 1, 1 excluded."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode()) / 2**64


@dataclass(frozen=True, slots=True)
class Truth:
    """What a request comes to."""

    refused: bool
    lengths: np.ndarray
    """int64 [n]"""
    scores: Scores
    digest: str
    """Of the samples."""


def truth_of(request: Request, longest: int) -> Truth:
    """By uid and seeds; the attempt, the part and the worker have no say. `longest`: tokens of a response."""
    return _truth(request.purpose, request.uid, request.seeds, longest)


@lru_cache(4096)
def _truth(purpose: str, uid: str, seeds: tuple[int, ...], longest: int) -> Truth:
    lengths = np.array([1 + int(number("length", purpose, seed) * longest) for seed in seeds])
    total = np.array([float(number("right", purpose, seed) < RIGHT) for seed in seeds], np.float32)
    measured = purpose in ("eval", "eval_greedy")  # an evaluation of which nothing is left would end the run
    bad = [i for i, seed in enumerate(seeds) if not measured and number("nan", purpose, seed) < NAN]
    total[bad] = np.nan
    hashes = np.array([xxhash.xxh3_64_intdigest(str(seed).encode()) for seed in seeds], np.uint64)
    found = tuple(NonFinite(uid, i, {"exact": float("nan")}, "'...'") for i in bad)
    scores = Scores(total, {"exact": total}, np.ones(len(seeds), np.float32), hashes, found)
    refused = uid == "eval/1" if measured else number("refused", purpose, uid) < REFUSED
    return Truth(refused, lengths, scores, digest(purpose, uid, seeds, lengths))


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a group's tokens that one version sampled."""

    seconds: float
    version: int
    weights: str


@dataclass(slots=True)
class Body:
    """A group's tokens, where a worker made them."""

    key: str
    uid: str
    truth: Truth
    spans: tuple[Span, ...]
    lost: bool = False
    """Nobody can get at it any more, but for the collator where it has it."""

    @property
    def oldest(self) -> int:
        """Version."""
        return min(span.version for span in self.spans)


@dataclass(slots=True)
class Logprobs:
    """A reference's answer, where a server made it."""

    word: str
    lost: bool = False
    """Nobody can get at it any more, but for the collator where it has it."""


@dataclass(slots=True)
class Sampled:
    """As far as a group was sampled by workers before."""

    seconds: float
    of: float
    """Seconds for all of it."""
    spans: tuple[Span, ...] = ()
    bodies: list[Body] = field(default_factory=list)
    """What was made so far; it is lost with its maker."""


def head_of(request: Request, truth: Truth, spans: Sequence[Span]) -> GroupHead:
    """What the controller is told."""
    versions = [span.version for span in spans]
    seconds = sum(span.seconds for span in spans)
    # Rounded: the product adds up whole versions of whole tokens, and has no last digit that is off.
    mean = round(sum(span.seconds * span.version for span in spans) / seconds, 9) if seconds else float(versions[0])
    lengths = truth.lengths
    reasons = ("stop",) * len(lengths)
    return GroupHead(
        request.uid, lengths + 3, lengths, lengths, reasons, min(versions), max(versions), versions[0], mean
    )
