"""Who may come in: labellers and the owner, each with a token."""

from __future__ import annotations

import hmac
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.errors import InputError

OWNER = "owner"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
TOKEN = re.compile(r"[A-Za-z0-9_-]{16,200}")
"""May stand in an address as it is; 16 characters cannot be guessed over a network."""


@dataclass(frozen=True, slots=True)
class Guest:
    """Somebody with a token."""

    name: str
    owner: bool
    """May see the overview, too, which names models."""


class Guests:
    """Those who may come in."""

    def __init__(self, tokens: dict[str, str]) -> None:
        """`tokens`: name -> token; the name `owner` is the owner's."""
        self._tokens = tokens

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(self._tokens)

    def who(self, token: str) -> Guest | None:
        """Whose token it is. Takes the same time whatever the token has in common with a right one."""
        given = token.encode("utf-8", errors="replace")
        found = [name for name, right in self._tokens.items() if hmac.compare_digest(given, right.encode())]
        return Guest(found[0], found[0] == OWNER) if found else None

    def links(self, address: str) -> list[str]:
        """For each, the address that lets them in. The token is behind #: no request and no log has it."""
        return [f"{name:<12} {address}/#{token}" for name, token in self._tokens.items()]


def new_guests(labellers: Sequence[str]) -> Guests:
    """The owner and these, with tokens made now. Raises InputError for names that do not work."""
    names = [OWNER, *labellers]
    for name in names:
        _require_name(name, "--labellers")
    if len(set(names)) < len(names):
        raise InputError(f"--labellers: {', '.join(labellers)}: each name once, and not `{OWNER}`")
    return Guests({name: secrets.token_urlsafe(24) for name in names})


def guests_of(path: Path) -> Guests:
    """Those of a file with `NAME TOKEN` in each line. Raises InputError, which never says what a token is."""
    try:
        text = path.read_text(encoding="utf-8")
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--tokens {path}: cannot be read: {error}") from error
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        raise InputError(f"--tokens {path}: other users can read it; `chmod 600 {path}` first")
    tokens: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        place = f"--tokens {path}:{number}"
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:
            raise InputError(f"{place}: has {len(words)} words; it has to be a name and a token")
        _require_name(words[0], place)
        if not TOKEN.fullmatch(words[1]):
            raise InputError(
                f"{place}: a token has 16 to 200 letters, digits, - or _; `openssl rand -hex 16` makes one"
            )
        if words[0] in tokens or words[1] in tokens.values():
            raise InputError(f"{place}: this name or token is there already; each has its own")
        tokens[words[0]] = words[1]
    if not tokens:
        raise InputError(f"--tokens {path}: has no line with a name and a token, as in `ann 4f1c...`")
    return Guests(tokens)


def _require_name(name: str, place: str) -> None:
    if not NAME.fullmatch(name):
        raise InputError(f"{place}: {name!r} is no name; it has to be up to 40 letters, digits, '.', '_' or '-'")
