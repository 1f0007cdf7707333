"""Config files, keys and overrides that nobody thought of: a config that holds what was written, or one message."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from fuzzing import mutated, search
from hypothesis import strategies as st

from rlhf_dist.cli.main import main
from rlhf_dist.config.checks import Command, problems
from rlhf_dist.config.load import as_written, from_yaml, load, to_yaml
from rlhf_dist.config.schema import Config, TelemetryConfig
from rlhf_dist.config.yaml_text import parse
from rlhf_dist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*.yaml"))]
COMMANDS: tuple[Command, ...] = ("train", "sft", "reward", "eval")
WORDS = st.sampled_from(
    [
        *(
            ": ",
            "- ",
            "\n",
            "\n  ",
            "{",
            "}",
            "[",
            "]",
            ", ",
            "&a ",
            "*a",
            "<<: ",
            "!!int ",
            "${",
            "}",
            "'",
            '"',
            "|\n",
        ),
        *("#", "~", "null", "true", "1", "-1", "1e3", ".nan", "loop", "steps", "include", "scoring", "rewards", "algo"),
        *("\t", "\x85", "\u2028"),
    ]
)
YAML = st.lists(WORDS | st.text(max_size=3), max_size=40).map("".join)
ODD_TEXTS = st.sampled_from(
    ["\x85", "a \u2028 b", "a\r\nb", "a\n\n  b\n", "1e3", "on", "~", "<<", "\ufeff", "\x7f", "'", " # "]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | ODD_TEXTS
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def keys(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its declared type; a reward's and a stage's under the name `x`."""
    for name, hint in get_type_hints(kind).items():
        inner = get_args(hint)[1] if get_origin(hint) is dict else hint
        place = f"{prefix}{name}.x" if inner is not hint else f"{prefix}{name}"
        if dataclasses.is_dataclass(inner):
            yield from keys(inner, f"{place}.")
        else:
            yield place, hint


KEYS = dict(keys())
A_KEY = st.sampled_from(sorted(KEYS))
OF_A_KEY = {
    int: st.integers(-5, 5) | st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False) | st.integers(-5, 5),
    str: st.text(max_size=20) | ODD_TEXTS,
    bool: st.booleans(),
}


def right_values(key: str) -> st.SearchStrategy[Any]:
    """Values of a key's own type."""
    hint = KEYS[key]
    if get_args(hint) and get_origin(hint) is not list:
        return st.sampled_from(get_args(hint))
    return OF_A_KEY.get(hint, st.lists(st.text(max_size=5), max_size=3))


def at(config: Any, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def tree_of(key: str, value: Any) -> Any:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def same(found: Any, written: Any) -> bool:
    """Whether they are one value: of one type, but for whole numbers where a number is asked for."""
    if isinstance(found, float) and type(written) is int:
        return found == written
    return type(found) is type(written) and found == written


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_round(config: Config) -> None:
    """Written out and read back it is the same, and the checks tell what is wrong in sentences."""
    assert from_yaml(to_yaml(config)) == config or any(
        isinstance(value, float) and math.isnan(value) for _, value in leaves(dataclasses.asdict(config))
    )
    for command in COMMANDS:
        assert all(isinstance(text, str) and text for text in problems(config, command))


@pytest.mark.parametrize("examples", [150, pytest.param(1500, marks=pytest.mark.faults)])
def test_any_text_is_a_config_or_one_message(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "c.yaml"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            check_round(load(path))
        except ConfigError as error:
            assert str(path) in str(error), error

    search(examples, check, YAML.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60))


@pytest.mark.parametrize("examples", [60, pytest.param(600, marks=pytest.mark.faults)])
def test_a_damaged_config_holds_what_is_written_or_is_rejected(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "c.yaml"

    def check(text: str) -> None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
        try:
            config = as_written(path)
        except ConfigError as error:
            assert str(tmp_path) in str(error), error
            return
        written = parse(text, "it", has_lines=True) or {}
        for key, value in leaves(written):
            if key != "include" and "${" not in str(value):
                assert same(at(config, key), value) or value != value, key
        check_round(config)

    search(examples, check, mutated(SHIPPED))


@pytest.mark.parametrize("examples", [150, pytest.param(3000, marks=pytest.mark.faults)])
def test_a_key_takes_what_is_written_or_its_name_is_told(examples: int) -> None:
    def check(given: tuple[str, Any]) -> None:
        key, value = given
        text = json.dumps(tree_of(key, value), ensure_ascii=False)
        try:
            config = from_yaml(text)
        except ConfigError as error:
            name = key.rpartition(".")[0] if isinstance(value, dict) else key
            assert name in str(error) or "not valid YAML" in str(error), error
            return
        assert same(at(config, key), value), (key, value, at(config, key))
        check_round(config)

    chosen = A_KEY.flatmap(lambda key: st.tuples(st.just(key), VALUES | right_values(key)))
    search(examples, check, chosen)


@pytest.mark.parametrize("examples", [150, pytest.param(3000, marks=pytest.mark.faults)])
def test_an_override_is_taken_as_typed_or_told(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("{}")

    def check(given: tuple[str, str]) -> None:
        key, typed = given
        try:
            config = as_written(path, [f"{key}={typed}"])
        except ConfigError as error:
            assert "override" in str(error), error
            return
        if KEYS.get(key) is str and typed[:1] not in ("'", '"') and "${" not in typed:
            assert at(config, key) == typed
        check_round(config)

    typed = YAML | SCALARS.map(lambda value: json.dumps(value, ensure_ascii=False)) | st.text(max_size=20)
    search(examples, check, st.tuples(A_KEY | st.text(max_size=12), typed))


@pytest.mark.parametrize("examples", [30, pytest.param(300, marks=pytest.mark.faults)])
def test_a_command_ends_with_a_plan_or_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], examples: int
) -> None:
    path = tmp_path / "c.yaml"

    def check(text: str) -> None:
        path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
        for words in (["train", str(path), "--dry-run"], ["sft", str(path), "--dry-run"], ["plan", str(path)]):
            code = main(words)
            said = capsys.readouterr()
            assert code in (0, 2) and "Traceback" not in said.err, (words, code, said.err)
            assert (code == 0) == (said.err == ""), said.err

    search(examples, check, mutated(SHIPPED))


def test_line_ends_that_only_some_readers_know_come_back() -> None:
    config = replace(Config(), telemetry=TelemetryConfig(entity="a\x85b", project=" \u2028 \u2029 "))
    assert from_yaml(to_yaml(config)) == config
