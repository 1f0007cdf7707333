"""Whether wandb would find a key, and so whether a run is online: as the installed wandb itself looks it up.

Where wandb looks changes with its versions: variables, netrc, settings files, and which server it asks by default. No
network is used for that, and the key is not kept.
"""

from __future__ import annotations

import netrc
import os
import socket
import threading
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from rlhf_dist.config.paths import expanded
from rlhf_dist.config.schema import TelemetryConfig
from rlhf_dist.errors import ConfigError

WAY_OUT = "correct it, or set telemetry.wandb=offline"

MODES = ("online", "offline", "disabled", "dryrun", "run", "shared")
"""What wandb takes as WANDB_MODE."""
OFFLINE_MODES = ("offline", "disabled", "dryrun")
REACH_LIMIT_S = 5.0
"""For wandb's server to take a connection."""


def wandb_mode(config: TelemetryConfig) -> str:
    """`online`, `offline` or `off`. auto follows WANDB_MODE where it is set, else asks whether there is a key.

    Raises ConfigError when online is asked for and there is no key, or WANDB_MODE is none of wandb's.
    """
    asked = os.environ.get("WANDB_MODE", "")
    if not asked:
        os.environ.pop("WANDB_MODE", None)  # empty is not a mode for wandb, and not the same as unset
    elif asked not in MODES:
        raise ConfigError(f"WANDB_MODE is {asked!r}; it must be {', '.join(MODES[:-1])} or {MODES[-1]}, or not set")
    if config.wandb == "auto":
        if asked in OFFLINE_MODES:
            return "off" if asked == "disabled" else "offline"
        return "online" if has_wandb_key() else "offline"
    if config.wandb == "online" and not has_wandb_key():
        raise ConfigError(
            "telemetry.wandb is online, but there is no wandb key: run `wandb login`, or set it to offline"
        )
    return config.wandb


def has_wandb_key() -> bool:
    """Whether wandb finds credentials for the server that it is set to, which may be one of your own.

    Raises ConfigError when a key, a netrc file or the server's address is malformed; no contents are in the message.
    """
    check_netrc()
    os.environ.setdefault("WANDB_SILENT", "true")
    from wandb.errors import AuthenticationError
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth

    try:
        server = wandb_setup.singleton().settings.base_url
        found = wbauth.authenticate_session(host=server, source="rlhf-dist", prompt=False, update_session=False)
    except AuthenticationError as error:
        raise ConfigError(f"{error} {WAY_OUT.capitalize()}") from None
    except RuntimeError as error:  # pathlib's: a user of a container may have no home, and then no key
        if "home directory" not in str(error):
            raise
        return False
    except ValueError as error:
        raise ConfigError(
            f"WANDB_BASE_URL, or base_url in a settings file of wandb: {reason(error)}; {WAY_OUT}"
        ) from None
    return found is not None


def why_offline(config: TelemetryConfig, mode: str) -> str:
    """Why a run is offline that could be online, as the rest of a sentence; empty where it is as was asked for.

    `mode`: what `wandb_mode` says.
    """
    if mode == "online":
        return unreachable()
    asked = mode == "off" or config.wandb == "offline" or os.environ.get("WANDB_MODE") in OFFLINE_MODES
    return "" if asked else "there is no wandb key"


def unreachable(limit_s: float = REACH_LIMIT_S) -> str:
    """Why wandb's server cannot be reached, as the rest of a sentence; empty where it can, or a proxy is in between.

    wandb itself tries for half a minute. Looking a name up has no limit of its own, so it is done in a thread.
    """
    from wandb.sdk import wandb_setup

    if getproxies().keys() & {"http", "https", "all"}:
        return ""
    parts = urlsplit(wandb_setup.singleton().settings.base_url)
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    found = [f"{host} did not answer within {limit_s:g} s"]

    def reach() -> None:
        try:
            socket.create_connection((host, port), limit_s).close()
            found.append("")
        except OSError as error:
            found.append(f"{host} cannot be reached ({error.strerror or error})")

    thread = threading.Thread(target=reach, name="reach wandb", daemon=True)
    thread.start()
    thread.join(limit_s)
    return found[-1]


def reason(error: Any) -> str:
    """What wandb says of an address; the address itself may hold a password."""
    told = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
    return "not the address of a server" if "@" in told else told


def check_netrc() -> None:
    """Refuse a netrc file that cannot be read: wandb would ignore it, and quote from it. Raises ConfigError."""
    named = os.environ.get("NETRC")
    candidates = [expanded(named)] if named else [expanded("~/.netrc"), expanded("~/_netrc")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        return
    try:
        netrc.netrc(path)
    except netrc.NetrcParseError as error:
        raise ConfigError(f"{path}:{error.lineno}: not a valid netrc line; {WAY_OUT}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8; {WAY_OUT}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {WAY_OUT}") from None
