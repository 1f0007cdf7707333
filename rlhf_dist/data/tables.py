"""Rows of parquet files and of directories written by `datasets.save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_dist.data.records import Row, listed
from rlhf_dist.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


def parquet_rows(path: str, source_key: str) -> list[Row]:
    """Every row. `source_key`: the config key of the file's kind, for messages. Raises one DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # ParquetFile, not read_table: that one invents columns from directories named key=value.
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError, ValueError) as error:
        hint = f"; it looks like JSON lines: set {source_key}=jsonl" if _begins_as_lines(path) else ""
        raise DataError(f"{path}: cannot be read as parquet: {one_line(error)}{hint}") from error
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: has the column {twice[0]!r} twice; rename one of them")
    try:
        rows = _shortest(table).to_pylist()
    except Exception:  # text that is not UTF-8, dates beyond Python's: whatever it is, the rows are found one by one
        raise DataError(listed(list(_unreadable(path, table)), table.num_rows)) from None
    return [Row(f"{path}: row {number}", fields) for number, fields in enumerate(rows, 1)]


def _shortest(table: pa.Table) -> pa.Table:
    """The table with 32-bit numbers as they were written: 0.1, which as 64 bits is 0.10000000149."""
    import pyarrow as pa

    for at, field in enumerate(table.schema):
        if pa.types.is_float32(field.type):
            texts = table.column(at).cast(pa.string())
            table = table.set_column(at, field.name, texts.cast(pa.float64()))
    return table


def _begins_as_lines(path: str) -> bool:
    try:
        with Path(path).open("rb") as raw:
            return raw.read(64).lstrip().startswith(b"{")
    except OSError:
        return False


def _unreadable(path: str, table: pa.Table) -> Iterator[str]:
    """A sentence for each value that Python cannot hold."""
    for name in table.column_names:
        column = table.column(name)
        for number in range(table.num_rows):
            try:
                column[number].as_py()
            except UnicodeDecodeError as error:
                yield (
                    f"{path}: row {number + 1}: {name!r} is not UTF-8 text ({error.reason} at byte {error.start}); "
                    "write the column as UTF-8"
                )
            except Exception as error:
                yield f"{path}: row {number + 1}: {name!r} cannot be read: {one_line(error)}"


def dataset_rows(path: str) -> list[Row]:
    """Every row of one split. Raises DataError for a directory that is damaged, or holds several."""
    import datasets

    try:
        data = datasets.load_from_disk(path)
        if isinstance(data, datasets.DatasetDict):
            splits = ", ".join(str(Path(path) / str(name)) for name in data)
            raise DataError(f"{path}: holds several splits; name one of {splits}")
        rows: list[Any] = _shortest(data.with_format("arrow")[:]).to_pylist()
    except DataError:
        raise
    except Exception as error:  # whatever the library meets, the user's directory is the cause
        raise DataError(
            f"{path}: is not a directory written by datasets.save_to_disk, or is damaged: {one_line(error)}"
        ) from error
    return [Row(f"{path}: row {number}", fields) for number, fields in enumerate(rows, 1)]


def one_line(error: Exception) -> str:
    """A library's message on one line, at most 300 characters, with its kind where it says little."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if " " in text else f"{type(error).__name__} {text}"
    return text if len(text) <= 300 else text[:297] + "..."
