"""Facts about the texts of a group that tell of pattern collapse."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import xxhash


def distinct_pairs(texts: Sequence[str]) -> np.ndarray:
    """float32 [n]: share of each text's neighbouring word pairs that differ from each other (distinct-2).

    Li et al. (arXiv:1510.03055), within one response. 1 for a text of less than two words.
    """
    return np.array([_distinct(text.split()) for text in texts], np.float32)


def text_hashes(texts: Sequence[str]) -> np.ndarray:
    """uint64 [n]: equal for equal texts."""
    return np.array([xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass")) for text in texts], np.uint64)


def _distinct(words: Sequence[str]) -> float:
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0
