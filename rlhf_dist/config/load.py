"""YAML files and `key=value` overrides -> one `Config`, or a `ConfigError` that names every wrong key at once.

Layers, later wins: the defaults of `schema.py`, the files under `include:` in their order, the file itself, the
overrides. The text is read and checked against the schema here, so that each message can name file, key, value and
choice; then the typed, frozen sections are made of it, by OmegaConf where there is a `${...}` to resolve.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_dist.config.paths import lookup_problem, short, special_kind, with_homes
from rlhf_dist.config.schema import Config, ScoringConfig
from rlhf_dist.config.yaml_text import MAX_DEPTH, Dumper, parse
from rlhf_dist.errors import ConfigError

_OVERRIDE = "override "
"""Opens the `where` of a layer that comes from the command line."""
MAX_WHOLE = 2**53
"""Of a whole number: from here on floats, and numbers in JSON, do not hold all of them."""
MAX_BYTES = 8 << 20
"""Of a config file: a data file that is named in its place would be parsed for hours."""
ESCAPE = r"write \${ for the text ${ itself (in YAML in single quotes, or without quotes)"
"""The way out where a text holds `${` by chance."""


class Layer(NamedTuple):
    """One source of values, checked and merged as a whole."""

    where: str
    """The file, or the override as it was typed; opens every message about the layer."""
    values: dict[Any, Any]
    key: tuple[str, ...] = ()
    """Of an override: where its value goes; empty for a file, whose values begin at the top."""


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, what it includes, and the overrides (`learner.optimizer.lr=1e-4`, later wins).

    A `~` at the start of a path becomes the home of this machine's user. Raises `ConfigError` for a missing or
    malformed file, an unknown key, a wrong type or choice, a bad override.
    """
    return with_homes(as_written(path, overrides))


def as_written(path: Path, overrides: Sequence[str] = ()) -> Config:
    """`load` for another machine: paths stay as they are."""
    layers = list(_file_layers(path, ()))
    layers += [_override_layer(text) for text in overrides]
    return _build(layers)


def from_yaml(text: str, where: str = "config", overrides: Sequence[str] = ()) -> Config:
    """The inverse of `to_yaml`; `where` names the text in messages. `overrides`: as for `load`."""
    return _build([Layer(where, _parse_mapping(text, where)), *map(_override_layer, overrides)])


def to_yaml(config: Config) -> str:
    """The whole config, every default written out; `from_yaml` gives back an equal one."""
    return yaml.dump(
        _escaped(dataclasses.asdict(config)), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120
    )


def files_of(path: Path) -> list[Path]:
    """A config and all that it includes. Raises `ConfigError`."""
    return [Path(layer.where) for layer in _file_layers(path, ())]


# ---- files -----------------------------------------------------------------------------------------------------------


def _file_layers(path: Path, including: tuple[Path, ...]) -> Iterator[Layer]:
    """The layers of a file in order of precedence, lowest first: what it includes, then itself."""
    text = _read(path, including)
    real = path.resolve()
    if real in including:
        chain = " -> ".join(str(p) for p in (*including[including.index(real) :], real))
        raise ConfigError(f"{including[-1]}: `include` goes round in a circle: {chain}; take one of them out")
    if len(including) >= MAX_DEPTH:
        raise ConfigError(f"{path}: more than {MAX_DEPTH} files include each other; put some of them together")
    values = _parse_mapping(text, str(path))
    includes = values.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ConfigError(
            f"{path}: `include` is {includes!r}; it must be a list of file names, as in include: [base.yaml]"
        )
    for name in includes:
        yield from _file_layers(path.parent / name, (*including, real))
    yield Layer(str(path), values)


def _read(path: Path, including: tuple[Path, ...]) -> str:
    by = f" (included by {including[-1]})" if including else ""
    reason = lookup_problem(path)
    if reason:
        raise ConfigError(f"{short(str(path))}{by} cannot be looked up: {reason}; give the path of a YAML file")
    if path.is_dir():
        raise ConfigError(f"{path}{by} is a directory; name a YAML file{_suggest_files(path / 'config.yaml')}")
    if not path.exists():
        raise ConfigError(f"{path}{by} does not exist{_suggest_files(path)}")
    if special_kind(path):
        raise ConfigError(f"{path}{by} is {special_kind(path)}; a config is read more than once: write it to a file")
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(
                f"{path}{by} has {size >> 20} MiB; a config has at most {MAX_BYTES >> 20}: name a YAML file"
            )
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}{by} cannot be read as UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}{by} cannot be read: {error.strerror}") from error


def _suggest_files(path: Path) -> str:
    """`; did you mean ...` with files of a similar name, else the configs that lie at hand."""
    beside = sorted(str(p) for pattern in ("*.yaml", "*.yml") for p in path.parent.glob(pattern))
    shipped = sorted(str(p) for p in Path("configs").rglob("*.yaml"))
    names = {Path(p).name: p for p in (*shipped, *beside)}
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.8)
    if close:
        return f"; did you mean {' or '.join(names[name] for name in close)}?"
    return f"; there is {', '.join((beside or shipped)[:8])}" if beside or shipped else ""


# ---- YAML ------------------------------------------------------------------------------------------------------------


def _parse(text: str, where: str) -> Any:
    return parse(text, where, has_lines=not where.startswith(_OVERRIDE))


def _parse_mapping(text: str, where: str) -> dict[Any, Any]:
    values = _parse(text, where)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where}: holds {_shown(values)}; a config is a mapping of sections, as in `loop: {{steps: 100}}`"
        )
    return values


def _escaped(value: Any) -> Any:
    """A `${` that is already resolved must not be resolved again when it is read back."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


# ---- overrides -------------------------------------------------------------------------------------------------------


def _override_layer(text: str) -> Layer:
    """`a.b=1` as the layer `{a: {b: 1}}`. The value is YAML, except that a text key takes it as it is typed."""
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if not equals or len(parts) > MAX_DEPTH or not all(re.fullmatch(r"[\w-]+", part) for part in parts):
        files = "; a second file goes into the first one's `include:`" if text.endswith((".yaml", ".yml")) else ""
        raise ConfigError(
            f"{_OVERRIDE}`{_clipped(text)}`: an override has the form key=value, as in loop.steps=20{files}"
        )
    where = f"{_OVERRIDE}`{_clipped(text)}`"
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    # A regex or a sentence is no YAML: `pattern=<a>: {b` must arrive as it stands.
    verbatim = _type_at(parts) is str and not quoted
    tree: Any = value if verbatim else _parse(value, where)
    for part in reversed(parts):
        tree = {part: tree}
    return Layer(where, tree, tuple(parts))


def _clipped(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _type_at(parts: Sequence[str]) -> Any:
    """The declared type of a dotted key, None where there is no such key."""
    kind: Any = Config
    for part in parts:
        if dataclasses.is_dataclass(kind):
            kind = _hints(kind).get(part)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            return None
    return kind


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Of a section: name of each key -> its declared type."""
    return get_type_hints(kind)


# ---- schema ----------------------------------------------------------------------------------------------------------


def _build(layers: Sequence[Layer]) -> Config:
    problems = [f"{layer.where}: {text}" for layer in layers for text in _problems(layer.values, Config, "")]
    if problems:
        raise ConfigError("\n".join(problems))
    tree = dataclasses.asdict(Config())
    for layer in layers:
        tree = _merged(tree, layer.values, Config, layer.key)
    if not _refers(tree):
        return _made(tree, Config)
    # The defaults are in `tree`: the empty `rewards` here only keeps OmegaConf from adding the default reward again.
    schema = OmegaConf.structured(Config(scoring=ScoringConfig(rewards={})))
    try:
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(tree))))
    except OmegaConfBaseException as error:
        reason = _clipped((error.msg or str(error)).splitlines()[0])
        raise ConfigError(_unresolved(layers, error.full_key or "", reason)) from error
    except RecursionError as error:
        raise ConfigError(f"{layers[0].where}: a reference ${{...}} is nested too deeply; {ESCAPE}") from error


def _refers(value: Any) -> bool:
    """Whether a text in it has a `${`, as a reference or escaped; then OmegaConf has to read it, which is slow."""
    if isinstance(value, dict):
        return any(map(_refers, value.values()))
    return any(map(_refers, value)) if isinstance(value, list) else isinstance(value, str) and "${" in value


def _made(value: Any, kind: Any) -> Any:
    """A value that was checked against `kind`, as OmegaConf would make it: sections frozen, whole numbers as floats."""
    if dataclasses.is_dataclass(kind):
        return cast(Any, kind)(**{name: _made(inner, _hints(kind)[name]) for name, inner in value.items()})
    if get_origin(kind) is dict:
        return {name: _made(inner, get_args(kind)[1]) for name, inner in value.items()}
    if get_origin(kind) is list:
        return list(value)
    return float(value) if kind is float else value


def _unresolved(layers: Sequence[Layer], key: str, reason: str) -> str:
    """The message for a `${...}` that OmegaConf cannot resolve, with the layer that it comes from."""
    for layer in reversed(layers):
        value = _value_at(layer.values, key)
        if isinstance(value, str) and "${" in value:
            return (
                f"{layer.where}: `{key}` is {_shown(value)}, in which ${{ begins a reference to another key: {reason}; "
                f"name a key, as in ${{output}}, or {ESCAPE}"
            )
    return f"`{key}`: {reason}" if key else reason


def _value_at(values: Any, key: str) -> Any:
    """What stands at a dotted key, [index] for lists, as OmegaConf writes one; None where there is nothing."""
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(values, dict):
            values = values.get(part)
        elif isinstance(values, list) and part.isdecimal() and int(part) < len(values):
            values = values[int(part)]
        else:
            return None
    return values


def _merged(tree: dict[str, Any], values: dict[Any, Any], kind: Any, key: Sequence[str]) -> dict[str, Any]:
    """`tree` with `values` put over it, section by section.

    A mapping whose names are the user's own (`scoring.rewards`) is replaced by whoever gives it as a whole, a file or
    an override: a run that names its rewards must not also be paid by the default one. An override of a longer key
    (`scoring.rewards.judge.weight`) changes or adds that entry only. `key`: what of the override's key is still ahead.
    """
    result = dict(tree)
    for name, value in values.items():
        inner = _type_at_child(kind, name)
        replace = get_origin(inner) is dict and len(key) <= 1
        descend = _is_section(inner) and not replace
        result[name] = _merged(result.get(name, {}), value, inner, key[1:]) if descend else value
    return result


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or get_origin(kind) is dict


def _type_at_child(kind: Any, name: str) -> Any:
    return get_args(kind)[1] if get_origin(kind) is dict else _hints(kind)[name]


def _problems(value: Any, kind: Any, key: str) -> Iterator[str]:
    """What is wrong with the value of `key`, which the schema declares as `kind`: one sentence each, keys in full."""
    if value is None or value == "???":  # the latter is OmegaConf's word for a value still to come
        yield f"`{key}` has no value; give {_expected(kind)}, or take the line out"
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = _hints(kind)
        for name, inner in value.items():
            if name in hints:
                yield from _problems(inner, hints[name], _join(key, name))
            else:
                yield f"unknown key `{_join(key, name)}`{_suggest_key(str(name), key, list(hints))}"
    elif get_origin(kind) is dict and isinstance(value, dict):
        for name, inner in value.items():
            if isinstance(name, str):
                yield from _problems(inner, get_args(kind)[1], _join(key, name))
            else:
                yield f"`{key}` has the name {name!r}; names are text, put it in quotes"
    elif get_origin(kind) is list and isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _problems(inner, get_args(kind)[0], f"{key}[{index}]")
    elif isinstance(value, str) and (half := _half_character(value)):
        yield f"`{key}` holds {half}; it has to be text that can be written as UTF-8"
    elif isinstance(value, str) and value.count("${") > MAX_DEPTH:
        yield f"`{key}` has more than {MAX_DEPTH} references ${{...}} to other keys; {ESCAPE}"
    elif isinstance(value, str) and "${" in value and not _is_section(kind):
        return  # an interpolation: OmegaConf resolves it and checks the result
    elif isinstance(value, int) and abs(value) > MAX_WHOLE and kind in (int, float):
        yield f"`{key}` is {_shown(value)}; expected {_expected(kind)} of at most {MAX_WHOLE}"
    elif not _fits(value, kind):
        quote = "; put it in quotes" if kind is str and not isinstance(value, dict | list) else ""
        yield f"`{key}` is {_shown(value)}; expected {_expected(kind)}{quote}"


def _half_character(text: str) -> str:
    """Names a character that no file can hold, as bytes of the command line that are not UTF-8 become; else empty."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half a surrogate pair, or a byte that is not UTF-8, at character {error.start}"
    return ""


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, int | float)
    return kind in (int, str) and isinstance(value, kind)


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
        return f"a section with keys such as {', '.join(names[:4])}"
    if get_origin(kind) is dict:
        return "a mapping of names to sections"
    if get_origin(kind) is list:
        return "a list of texts, as in [a, b]"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _suggest_key(name: str, section: str, siblings: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{_join(section, close[0])}`?"
    elsewhere = [key for key in _all_keys(Config, "") if key.rsplit(".", 1)[-1] == name]
    if elsewhere:
        return f"; did you mean `{'` or `'.join(elsewhere)}`?"
    inside = f"`{section}` has" if section else "the sections are"
    return f"; {inside} {', '.join(siblings)}"


def _all_keys(kind: Any, prefix: str) -> Iterator[str]:
    for name, inner in _hints(kind).items():
        yield _join(prefix, name)
        if dataclasses.is_dataclass(inner):
            yield from _all_keys(inner, _join(prefix, name))


def _join(section: str, name: object) -> str:
    return f"{section}.{name}" if section else str(name)


def _shown(value: Any) -> str:
    text = (
        f"the text {value!r}"
        if isinstance(value, str)
        else str(value).lower()
        if isinstance(value, bool)
        else repr(value)
    )
    return text if len(text) <= 80 else text[:77] + "..."
