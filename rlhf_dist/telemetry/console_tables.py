"""Tables for a terminal, a log or a file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAIN_WIDTH = 110
"""Characters of a line in files and logs."""

Parts = Callable[[Any], "Iterable[RenderableType]"]
"""Rich's box for the frames of tables -> what is shown, in order."""


def as_text(parts: Parts) -> str:
    """In plain text, for logs and files."""
    from rich import box
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=PLAIN_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    for part in parts(box.ASCII2):
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def show(parts: Parts, stream: TextIO) -> None:
    """With colours where `stream` is a terminal, plain text elsewhere."""
    if not stream.isatty():
        print(as_text(parts), file=stream)
        return
    from rich import box
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    for part in parts(box.ROUNDED):
        console.print(part)


def printable(text: str) -> str:
    """Escape what could move a terminal's cursor or cannot be encoded; line breaks stay."""
    kept = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(kept)
