"""Prompts -> requests, with the seed of every sample. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from rlhf_dist.types import Prompt, Purpose, Request, Sampling


def make_requests(prompts: Sequence[Prompt], purpose: Purpose, n: int, sampling: Sampling, seed: int) -> list[Request]:
    """First requests for `n` samples of each prompt; `seed` is the run's."""
    return [make_request(prompt, purpose, n, sampling, seed) for prompt in prompts]


def make_request(
    prompt: Prompt, purpose: Purpose, n: int, sampling: Sampling, seed: int, attempt: int = 0, life: int = 0
) -> Request:
    """A request for `n` samples of a prompt; `seed` is the run's."""
    seeds = tuple(sample_seed(seed, prompt.uid, i) for i in range(n))
    return Request(prompt, attempt, purpose, sampling, seeds, life=life)


def sample_seed(seed: int, uid: str, sample: int) -> int:
    """Of one sample: 63 bits from the run's seed, the prompt's uid and the sample's number."""
    digest = hashlib.blake2b(f"{seed}/{uid}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def greedy(sampling: Sampling) -> Sampling:
    """The same without chance."""
    return replace(sampling, temperature=0.0, top_p=1.0, top_k=0)
