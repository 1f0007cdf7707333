"""The batch of a training step as a file, for `rlhf-dist replay`: safetensors with JSON beside them, nothing else.

Imports without torch: who has the tokens, the collator, writes it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_dist.errors import DataError, DiskError
from rlhf_dist.learner.rank_batch import RankBatch

FORMAT = 1
KEY = "rlhf_dist"
"""Of the JSON in the file's header."""
ARRAYS = (
    "advantages",
    "scores",
    "weights",
    "tokens",
    "loss_mask",
    "starts",
    "offsets",
    "sampled",
    "cache_versions",
    "reference",
)
"""Of a `RankBatch`; the rest is JSON, but for the micro-batches."""
CREDIT = ("advantages", "returns", "values")
"""Of an `Estimate`."""


@dataclass(frozen=True, slots=True)
class StepFile:
    """What a file holds."""

    batches: tuple[RankBatch, ...]
    """Of each share."""
    credit: tuple[Mapping[str, np.ndarray], ...]
    """The fields of each share's `Estimate`; none where credit is by response."""
    facts: Mapping[str, Any]
    """About the step: `step`, `fault`, `run`, `checkpoint`, `config` (YAML), `updates`, `uids`, `whitening`."""


def write_step(path: Path, batches: Sequence[RankBatch], credit: Sequence[Any], facts: Mapping[str, Any]) -> None:
    """`credit`: the `Estimate` of each batch, or none. Raises DiskError; then there is no file."""
    tensors: dict[str, np.ndarray] = {}
    plans = []
    for i, batch in enumerate(batches):
        tensors |= {f"{i}.{name}": np.ascontiguousarray(getattr(batch, name)) for name in ARRAYS}
        for u, micro_batches in enumerate(batch.updates):
            tensors |= {f"{i}.updates.{u}.{m}": np.asarray(rows, np.int64) for m, rows in enumerate(micro_batches)}
        names = [one.name for one in fields(RankBatch) if one.name not in (*ARRAYS, "updates")]
        plans.append(
            {name: getattr(batch, name) for name in names} | {"updates": [len(each) for each in batch.updates]}
        )
    for i, estimate in enumerate(credit):
        tensors |= {f"{i}.credit.{name}": np.ascontiguousarray(getattr(estimate, name)) for name in CREDIT}
    told = json.dumps({"format": FORMAT, "facts": dict(facts), "plans": plans, "credit": bool(credit)})
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        save_file(tensors, unfinished, {KEY: told})
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            unfinished.unlink()
        raise DiskError(f"{path}: cannot be written: {error}") from None


def read_step(path: Path) -> StepFile:
    """What `write_step` wrote. Raises DataError for what is no such file, and for one that is damaged."""
    try:
        if not path.is_file():
            raise DataError(f"{path}: {'is a directory, not a file' if path.is_dir() else 'there is no such file'}")
        with safe_open(path, "np") as file:
            told = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if told["format"] != FORMAT:
            raise DataError(f"{path}: is of format {told['format']}, and this version reads format {FORMAT}")
        batches = tuple(_batch(tensors, i, plan) for i, plan in enumerate(told["plans"]))
        count = len(batches) if told["credit"] else 0
        credit = tuple({name: tensors[f"{i}.credit.{name}"] for name in CREDIT} for i in range(count))
        found = StepFile(batches, credit, told["facts"])
        _check(found)
    except DataError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError(
            f"{path}: is damaged, or not the batch of a step as `rlhf-dist train` saves it below faults/ "
            f"({type(error).__name__}: {str(error)[:100]})"
        ) from None
    return found


def _batch(tensors: Mapping[str, np.ndarray], i: int, plan: Mapping[str, Any]) -> RankBatch:
    plan = dict(plan)
    updates = tuple(
        tuple(tensors[f"{i}.updates.{u}.{m}"] for m in range(count)) for u, count in enumerate(plan.pop("updates"))
    )
    plan |= {name: tuple(plan[name]) for name in ("learning_rates", "critic_rates")}
    plan["origins"] = tuple((str(key), int(sample)) for key, sample in plan["origins"])
    arrays: dict[str, Any] = {name: tensors[f"{i}.{name}"] for name in ARRAYS}
    return RankBatch(**plan, updates=updates, **arrays)


def _check(found: StepFile) -> None:
    """That sizes and numbers belong together. Raises ValueError."""
    facts = found.facts
    for name, kind in {"step": int, "fault": str, "run": str, "checkpoint": str, "config": str, "uids": dict}.items():
        if not isinstance(facts[name], kind):
            raise ValueError(f"`{name}` is not what it can be")
    if not all(isinstance(facts["whitening"][name], (int, float)) for name in ("mean", "deviation")):
        raise ValueError("`whitening` is not what it can be")
    for batch in found.batches:
        rows = len(batch.origins)
        whole, sampled = len(batch.tokens), int(batch.loss_mask.sum())
        sizes = [(batch.advantages, rows), (batch.scores, rows), (batch.weights, rows), (batch.loss_mask, whole)]
        sizes += [(batch.sampled, sampled), (batch.cache_versions, sampled), (batch.starts, rows + 1)]
        sizes += [(batch.offsets, rows + 1)] + ([(batch.reference, sampled)] if len(batch.reference) else [])
        edges = [batch.starts, batch.offsets]
        right = all(len(array) == size for array, size in sizes) and all((np.diff(edge) > 0).all() for edge in edges)
        if not right or batch.starts[0] or batch.starts[-1] != whole or batch.offsets[-1] != sampled:
            raise ValueError("the sizes of its parts do not fit each other")
        if (batch.offsets != np.concatenate([[0], np.cumsum(batch.loss_mask)])[batch.starts]).any():
            raise ValueError("its mask does not fit its rows")
        chosen = np.concatenate([np.array([], np.int64), *(rows for each in batch.updates for rows in each)])
        if (len(chosen) and not (chosen.min() >= 0 and chosen.max() < rows)) or (whole and batch.tokens.min() < 0):
            raise ValueError("it names rows or tokens that cannot be")
        if not math.isfinite(batch.temperature) or batch.temperature <= 0:
            raise ValueError(f"its temperature is {batch.temperature}")
    for batch, credit in zip(found.batches, found.credit, strict=bool(found.credit)):
        if any(len(array) != len(batch.sampled) for array in credit.values()):
            raise ValueError("its credit does not fit its tokens")
