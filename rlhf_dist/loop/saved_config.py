"""The config that a run keeps, and what a resume may change in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rlhf_dist.config.load import from_yaml
from rlhf_dist.config.yaml_text import parse
from rlhf_dist.errors import ConfigError, DataError, InputError
from rlhf_dist.models.guarded_files import read_text

CHANGEABLE = (
    "name",
    "output",
    "telemetry",
    "cluster",
    "faults",
    "numbers",
    "learner.ranks",
    "learner.sequence_parallel",
    "learner.zero_stage",
    "learner.offload",
    "loop.steps",
    "loop.checkpoint_every",
    "loop.keep_checkpoints",
    "loop.keep_best",
    "loop.best_metric",
    "loop.best_is",
    "loop.witness",
    "eval.every",
    "compare",
    "scoring.non_finite",
    "scoring.on_failure",
    "scoring.max_failed_share",
    "weights.give_up_after",
)
"""Keys and sections that a resume may change, besides `ENDINGS`; anything else would make it another run."""
WAY_OUT = "restore it from a backup, or start a new run with another name="
ABSENT = "(absent)"
SHOWN = 8
"""Changes that are listed; of another run there may be hundreds."""
ENDINGS = (".timeout_s", ".retries", ".hedge_s", ".sandbox", ".memory_mib")
"""How long something may take, how often and with whom it is tried, and what a reward's process may use."""


def require_same_config(saved: Path, config_text: str) -> None:
    """Raise ConfigError when the config changed in a way that makes it another run, DataError when it is damaged."""
    changes = config_changes(saved, config_text)
    absent = [change for change in changes if f" from {ABSENT} to " in change]
    if len(absent) > SHOWN:
        raise DataError(
            f"{saved}: {len(absent)} keys of a run's config are missing, as {absent[0].split()[0]}, so it is truncated "
            f"or another file; {WAY_OUT}"
        )
    if changes:
        more = f"; and {len(changes) - SHOWN} more keys" if len(changes) > SHOWN else ""
        raise ConfigError(
            f"{saved}: a resume cannot change {'; '.join(changes[:SHOWN])}{more}. "
            "Give the saved values, or start a new run with another name="
        )


def saved_config(saved: Path) -> dict[str, Any]:
    """Key -> value of a run's config.yaml. Raises DataError, with the way out, for any damage."""
    try:
        found = parse(read_text(saved), str(saved), has_lines=True)
    except InputError as error:
        raise DataError(f"{error}; {WAY_OUT}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        what = "empty" if found is None else "not a mapping of keys"
        raise DataError(f"{saved}: is not the config of a run: it is {what}; {WAY_OUT}")
    return flat(found)


def config_changes(saved: Path, config_text: str) -> list[str]:
    """`KEY from OLD to NEW` for every key that differs and that a resume must not change, in order.

    Raises DataError when the saved config is missing or damaged.
    """
    old, new = saved_config(saved), flat(parse(config_text, "the new config", has_lines=True))
    return [change for key, change in key_changes(old, new).items() if not _is_changeable(key)]


def key_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Key -> `KEY from OLD to NEW`, in order.

    A key that the version which wrote `old` did not have, and that is at its default, is no change.
    """
    defaults = _defaults_beside(old) if new.keys() - old.keys() else {}
    pairs = [(key, old.get(key, defaults.get(key, ABSENT)), new.get(key, ABSENT)) for key in sorted({*old, *new})]
    return {key: f"{key} from {before} to {after}" for key, before, after in pairs if before != after}


def _defaults_beside(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> default of those that are missing in the sections of `keys`; nothing where these are not of this version.

    Not of whole sections: a reward of which nothing is there is another one, and not the default.
    """
    try:
        full = flat(asdict(from_yaml(yaml.safe_dump(nested(keys), allow_unicode=True))))
    except (InputError, yaml.YAMLError, TypeError, AttributeError):  # of another version, or damaged
        return {}
    sections = {key.rpartition(".")[0] for key in keys}
    return {key: value for key, value in full.items() if key not in keys and key.rpartition(".")[0] in sections}


def _is_changeable(key: str) -> bool:
    listed = any(key == allowed or key.startswith(allowed + ".") for allowed in CHANGEABLE)
    return listed or key.endswith(ENDINGS)


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> `section.key` names; lists are values."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        section = tree
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return tree
