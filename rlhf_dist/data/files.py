"""Rows of a data file, each with its place, so that every complaint can name file and line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rlhf_dist.config.paths import lookup_problem, short, special_kind
from rlhf_dist.config.schema import DataConfig
from rlhf_dist.data.jsonl import jsonl_rows
from rlhf_dist.data.numeric_answers import whole_answers
from rlhf_dist.data.records import Row
from rlhf_dist.data.tables import dataset_rows, parquet_rows
from rlhf_dist.errors import ConfigError, DataError

Source = Literal["task", "jsonl", "parquet", "dataset", "gsm8k"]
"""What `data.source` may be; `task` has no rows."""


def training_rows(config: DataConfig, held_out: int) -> Sequence[Row]:
    """The rows of `data.path`; without an `eval_path`, the last `held_out` of them are left out.

    Raises DataError for a missing, empty or unreadable file, or when nothing would be left to train on.
    """
    rows = _data_rows(config, config.path, "data.path")
    if config.eval_path or held_out == 0:
        return rows
    check_enough(config.path, len(rows), held_out, "eval.prompts", "data.eval_path")
    return rows[:-held_out]


def held_out_rows(config: DataConfig, n: int) -> Sequence[Row]:
    """The first n rows of `data.eval_path`, or the last n of `data.path` when it is empty.

    Raises DataError when there are fewer (the last n of `path` have to leave one row to train on).
    """
    if n == 0:
        return []
    if config.eval_path:
        rows = _data_rows(config, config.eval_path, "data.eval_path")
        check_enough(config.eval_path, len(rows), n, "eval.prompts")
        return rows[:n]
    rows = _data_rows(config, config.path, "data.path")
    check_enough(config.path, len(rows), n, "eval.prompts", "data.eval_path")
    return rows[-n:]


def used_rows(config: DataConfig, held_out: int) -> list[Row]:
    """The rows of both, each once, from one reading of each file. Raises as they do."""
    if config.eval_path or not held_out:
        return [*training_rows(config, held_out), *held_out_rows(config, held_out)]
    rows = _data_rows(config, config.path, "data.path")
    check_enough(config.path, len(rows), held_out, "eval.prompts", "data.eval_path")
    return list(rows)


def _data_rows(config: DataConfig, path: str, key: str) -> Sequence[Row]:
    rows = read_rows(config.source, path, key)
    return rows if config.source == "gsm8k" else whole_answers(rows, config.answer_key)


def check_enough(path: str, available: int, asked: int, count_key: str, eval_key: str = "") -> None:
    """Raises DataError when `count_key` (its value: asked) holds out more than there are.

    `eval_key`: the key that could name a file for the held-out rows; then they come off the training file, which has to
    keep one.
    """
    most = available - 1 if eval_key else available
    if asked <= most:
        return
    ways = [f"set {count_key} to at most {most}"] if most > 0 else []
    ways.append(f"name a separate {eval_key}" if eval_key else "give more rows")
    raise DataError(
        f"{path}: has {available} rows, too few to hold out {count_key}={asked}"
        + (" and keep one to train on" if eval_key else "")
        + f"; {' or '.join(ways)}"
    )


def read_rows(source: Source, path: str, key: str) -> list[Row]:
    """Every row of a file (JSON lines whose name ends in `.gz` are unpacked) or directory, read and checked whole.

    `key`: the config key that named the path, as in `data.path`, for messages.
    Raises ConfigError for an empty path, DataError for a missing, empty or unreadable file.
    """
    if not path:
        raise ConfigError(f"{key} is empty: {key.partition('.')[0]}.source={source} needs a path")
    directory = source == "dataset"
    _check_exists(Path(path), key, directory)
    source_key = f"{key.partition('.')[0]}.source"
    if source in ("jsonl", "gsm8k"):
        rows = jsonl_rows(path, source_key)
    elif source == "parquet":
        rows = parquet_rows(path, source_key)
    else:
        assert directory, source
        rows = dataset_rows(path)
    if not rows:
        raise DataError(f"{path}: is empty; at least one row is needed ({key})")
    return rows


def _check_exists(path: Path, key: str, directory: bool) -> None:
    kind = "directory" if directory else "file"
    reason = lookup_problem(path)
    if reason:
        raise DataError(f"{short(str(path))}: cannot be looked up: {reason} ({key})")
    if not path.exists():
        raise DataError(f"{path}: no such {kind} ({key}){_hint(path)}")
    if path.is_dir() != directory:
        right = "a directory written by datasets.save_to_disk" if directory else "one file"
        raise DataError(f"{path}: is a {'file' if directory else 'directory'}; {key} has to name {right} here")
    if special_kind(path):
        raise DataError(f"{path}: is {special_kind(path)}; data is read more than once: write it to a file ({key})")


def _hint(path: Path) -> str:
    """Where a missing path might be."""
    if not path.parent.is_dir():
        return f"; there is no directory {path.parent} either (relative paths start at {Path.cwd()})"
    try:
        siblings = [p.name for p in path.parent.iterdir()]
    except OSError:  # a directory that may be entered but not listed
        return ""
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
