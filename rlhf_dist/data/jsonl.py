"""JSON lines, plain or packed with gzip; a file of another kind is named for what it is."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from rlhf_dist.data.records import Row, listed, shown
from rlhf_dist.errors import DataError

HEAD_BYTES = 512
UNPACK = "unpack it, or pack it with gzip and end its name in .gz"
UTF8 = "convert it to UTF-8 without a change of its lines"
KINDS = (
    (0, b"PK\x03\x04", f"a zip archive; {UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"packed with zstd; {UNPACK}"),
    (0, b"\xfd7zXZ\x00", f"packed with xz; {UNPACK}"),
    (0, b"BZh", f"packed with bzip2; {UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z archive; {UNPACK}"),
    (257, b"ustar", "a tar archive; take the file out of it"),
    (0, b"PAR1", "a parquet file; set {source}=parquet"),
    (0, b"ARROW1", "an Arrow file; write JSON lines or parquet"),
    (0, b"SQLite format 3\x00", "an SQLite database; write JSON lines or parquet"),
    (0, b"\xff\xfe\x00\x00", f"UTF-32 text; {UTF8}"),
    (0, b"\xff\xfe", f"UTF-16 text; {UTF8}"),
    (0, b"\xfe\xff", f"UTF-16 text; {UTF8}"),
    (0, b"{\x00", f"UTF-16 text; {UTF8}"),
    (0, b"\x00{", f"UTF-16 text; {UTF8}"),
)
"""Where a file has which bytes -> what it is, and the way out."""
GZIP = b"\x1f\x8b"


def jsonl_rows(path: str, source_key: str) -> list[Row]:
    """Every line as a row; a name that ends in `.gz` is unpacked. `source_key`: the config key of the file's kind.

    Raises one DataError for a file of another kind, or for all lines that are not a JSON object.
    """
    packed = path.endswith(".gz")
    try:
        with Path(path).open("rb") as raw:
            head = raw.read(HEAD_BYTES)
        _require_kind(path, head, source_key)
        if head.startswith(GZIP) and not packed:
            raise DataError(f"{path}: is packed with gzip; end its name in .gz, or unpack it")
        with gzip.open(path) if packed else Path(path).open("rb") as file:
            if packed:
                _require_kind(path, file.read(HEAD_BYTES), source_key)
                file.seek(0)
            return _rows(path, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked as gzip: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _require_kind(path: str, head: bytes, source_key: str) -> None:
    """Refuse what begins as no JSON lines do."""
    for place, magic, kind in KINDS:
        if head[place:].startswith(magic):
            raise DataError(f"{path}: is {kind.format(source=source_key)}")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise DataError(
            f"{path}: begins with [, as one JSON array; every line has to be a JSON object: `jq -c '.[]'` writes it so"
        )


def _rows(path: str, file: IO[bytes] | gzip.GzipFile) -> list[Row]:
    rows: list[Row] = []
    problems: list[str] = []
    number, blank = 0, 0
    # Binary lines end at \n only; text lines would also break at characters that JSON allows inside strings.
    for number, raw in enumerate(file, 1):
        if not raw.strip():
            blank = blank or number
            continue
        if blank:  # blank lines are fine at the end of a file, nowhere else
            problems.append(f"{path}:{blank}: is blank; every line has to be a JSON object")
            blank = 0
        try:
            rows.append(Row(f"{path}:{number}", _json_object(f"{path}:{number}", raw)))
        except DataError as error:
            if number == 1 and "is not JSON (" in str(error) and (hint := _whole_file(raw)):
                raise DataError(f"{error}; {hint}") from error
            problems.append(str(error))
    if problems:
        raise DataError(listed(problems, number))
    return rows


def _whole_file(first: bytes) -> str:
    """What the whole file seems to be, from a first line that is no JSON object; empty where nothing is certain."""
    text = first.strip()
    if text.startswith(b"{") and text.endswith((b"{", b"[", b",")):
        return "an object over several lines is not JSON lines: `jq -c .` writes it on one"
    if b"\r" in text and text.startswith(b"{"):
        return "its lines seem to end with CR alone: end them with LF or CRLF"
    if not text.startswith(b"{") and any(mark in text for mark in (b",", b"\t", b";")):
        return "the file looks like CSV: write JSON lines or parquet"
    return ""


def _json_object(place: str, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: is not JSON ({error.msg} at column {error.colno}); every line has to be a JSON object"
        ) from error
    except _KeyTwice as error:
        raise DataError(f"{place}: has the key {shown(error.key)} twice; keep one of them") from error
    except RecursionError as error:
        raise DataError(f"{place}: cannot be parsed as JSON: {error}") from error
    except ValueError as error:  # Python's limit of 4,300 digits; its own advice is about Python
        raise DataError(f"{place}: has a whole number of thousands of digits; write it as text, in quotes") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: is {shown(value)}; every line has to be a JSON object like {{...}}")
    return value


class _KeyTwice(Exception):
    """An object of which one value would be lost."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _KeyTwice(key)
            seen.add(key)
    return made
