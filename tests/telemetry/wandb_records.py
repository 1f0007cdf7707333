"""Reads a `.wandb` file: blocks of 32 KiB with records in pieces, as LevelDB's log has them; each is a protobuf."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as proto

BLOCK = 32 * 1024
HEADER = struct.Struct("<IHB")
"""Checksum, length, kind of a piece."""
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path, limit_s: float = 20.0) -> list[Any]:
    """All records of a run that has finished; a wrong checksum is an error.

    wandb's own process writes, and may be a moment behind the end of `finish`: so the last record is waited for.
    """
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found = read(path)
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.02)
    raise AssertionError(f"{path} has no exit record after {limit_s:g} s")


def read(path: Path) -> list[Any]:
    data, found = path.read_bytes(), []
    assert data[:4] in (b":W&B", b"")
    for piece in whole(data):
        record = proto.Record()
        record.ParseFromString(piece)
        found.append(record)
    return found


def whole(data: bytes) -> Iterator[bytes]:
    position, begun = 7, b""
    while position + HEADER.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:
            position += left
            continue
        checksum, length, kind = HEADER.unpack_from(data, position)
        body = data[position + HEADER.size : position + HEADER.size + length]
        if len(body) < length:
            return  # still being written
        assert zlib.crc32(bytes([kind]) + body) == checksum and kind in (WHOLE, FIRST, MIDDLE, LAST)
        position += HEADER.size + length
        begun = body if kind in (WHOLE, FIRST) else begun + body
        if kind in (WHOLE, LAST):
            yield begun


def of_kind(found: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def history(found: list[Any]) -> list[dict[str, Any]]:
    """Rows as they were logged; what is nested is a dict."""
    rows = []
    for row in of_kind(found, "history"):
        values: dict[str, Any] = {}
        for item in row.item:
            place = values
            for key in item.nested_key[:-1]:
                place = place.setdefault(key, {})
            place[item.nested_key[-1]] = json.loads(item.value_json)
        rows.append(values)
    return rows


def config(found: list[Any]) -> dict[str, Any]:
    """That of the run's first record."""
    return {item.key: json.loads(item.value_json) for item in of_kind(found, "run")[0].config.update}
