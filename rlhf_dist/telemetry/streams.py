"""Standard output and error that take every text."""

from __future__ import annotations

import io
from typing import TextIO


def print_any_text(*streams: TextIO, encoding: str | None = None) -> None:
    r"""Write what a stream's encoding lacks as `\xe9` instead of raising UnicodeEncodeError.

    A terminal may be ASCII or Latin-1, and an answer may be in any script: no run may end because of a print.
    `encoding`: another one from here on; None keeps the stream's own.
    """
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding or stream.encoding, errors="backslashreplace")
