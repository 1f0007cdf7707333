"""Addresses of reward servers in a config."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at `host`, a name or an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


EXAMPLES = {"http": "http://127.0.0.1:8070/score", "judge": "http://127.0.0.1:8000/v1/chat/completions"}
"""Kind of a reward -> an address."""


def address_problem(url: str, kind: str, has_token: bool) -> str:
    """What is wrong with the address, as the rest of a sentence; empty where nothing is."""
    parts = _split(url)
    if parts is None:
        return f"is {url!r}; kind {kind} needs a whole address, as in {EXAMPLES[kind]}"
    if parts.username is not None or parts.password is not None:
        return "holds a user or a password; take it out and name a variable with a token in token_env"
    if not is_loopback(parts.hostname or "") and not has_token:
        return (
            f"is {url!r}, another machine, without a token; start that server with --token-env and name the variable "
            "that holds its token in token_env"
        )
    return ""


def _split(url: str) -> SplitResult | None:
    """The address's parts; None when it is none."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
    except ValueError:  # the port is no number, or a bracket is left open
        return None
    return parts if whole and " " not in url else None
