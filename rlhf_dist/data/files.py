"""Rows of a data file, each with its place, so that every complaint can name file and line."""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_dist.config.schema import DataConfig
from rlhf_dist.errors import ConfigError, DataError

Source = Literal["task", "jsonl", "parquet", "dataset", "gsm8k"]
"""What `data.source` may be; `task` has no rows."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file."""

    place: str
    """`file:line` for JSONL, `file: row N` (from 1) for parquet and `datasets` directories."""
    fields: Mapping[str, Any]
    """Column -> value, as stored."""


def training_rows(config: DataConfig, held_out: int) -> list[Row]:
    """The rows of `data.path`; without an `eval_path`, the last `held_out` of them are left out.

    Raises DataError for a missing, empty or unreadable file, or when nothing would be left to train on.
    """
    rows = read_rows(config.source, config.path, "data.path")
    if config.eval_path or held_out == 0:
        return rows
    check_enough(config.path, len(rows), held_out, "eval.prompts", "data.eval_path")
    return rows[:-held_out]


def held_out_rows(config: DataConfig, n: int) -> list[Row]:
    """The first n rows of `data.eval_path`, or the last n of `data.path` when it is empty.

    Raises DataError when there are fewer (the last n of `path` have to leave one row to train on).
    """
    if n == 0:
        return []
    if config.eval_path:
        rows = read_rows(config.source, config.eval_path, "data.eval_path")
        check_enough(config.eval_path, len(rows), n, "eval.prompts")
        return rows[:n]
    rows = read_rows(config.source, config.path, "data.path")
    check_enough(config.path, len(rows), n, "eval.prompts", "data.eval_path")
    return rows[-n:]


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
    if source in ("jsonl", "gsm8k"):
        rows = list(_jsonl(path))
    elif source == "parquet":
        rows = list(_parquet(path))
    else:
        assert directory, source
        rows = list(_dataset(path))
    if not rows:
        raise DataError(f"{path}: is empty; at least one row is needed ({key})")
    return rows


def _check_exists(path: Path, key: str, directory: bool) -> None:
    kind = "directory" if directory else "file"
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        if not path.parent.is_dir():
            hint = f"; there is no directory {path.parent} either (relative paths start at {Path.cwd()})"
        raise DataError(f"{path}: no such {kind} ({key}){hint}")
    if path.is_dir() != directory:
        right = "a directory written by datasets.save_to_disk" if directory else "one file"
        raise DataError(f"{path}: is a {'file' if directory else 'directory'}; {key} has to name {right} here")


def _jsonl(path: str) -> Iterator[Row]:
    blank = 0
    opened = gzip.open if path.endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            # Binary lines end at \n only; text lines would also break at characters that JSON allows inside strings.
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    blank = blank or number
                    continue
                if blank:  # blank lines are fine at the end of a file, nowhere else
                    raise DataError(f"{path}:{blank}: is blank; every line has to be a JSON object")
                yield Row(f"{path}:{number}", _json_object(f"{path}:{number}", raw))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked as gzip: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _json_object(place: str, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: is not JSON ({error.msg} at column {error.colno}); every line has to be a JSON object"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: cannot be parsed as JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: is {shown(value)}; every line has to be a JSON object like {{...}}")
    return value


def _parquet(path: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # ParquetFile, not read_table: that one invents columns from directories named key=value.
        with pq.ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error
    for number, fields in enumerate(rows, 1):
        yield Row(f"{path}: row {number}", fields)


def _dataset(path: str) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_from_disk(path)
    except Exception as error:  # whatever the library meets, the user's directory is the cause
        raise DataError(f"{path}: is not a directory written by datasets.save_to_disk: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        splits = ", ".join(str(Path(path) / str(name)) for name in data)
        raise DataError(f"{path}: holds several splits; name one of {splits}")
    for number, fields in enumerate(data.with_format(None), 1):
        assert isinstance(fields, dict)
        yield Row(f"{path}: row {number}", fields)


def shown(value: object) -> str:
    """A value for a message: its repr, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
