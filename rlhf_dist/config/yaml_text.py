"""YAML text to plain values and back, as configs write it; every error is a `ConfigError` with file and line."""

from __future__ import annotations

import re
from typing import Any

import yaml

from rlhf_dist.errors import ConfigError

MAX_DEPTH = 50
"""Levels of nesting; a config has about six."""
MAX_DIGITS = 1000
"""Of a whole number: Python takes quadratic time to read one, and raises from 4,300 digits on."""
MAX_VALUES = 100_000
"""Values with every alias written out: a few lines of aliases of aliases could stand for billions."""


LINE_ENDS = re.compile("[\x85\u2028\u2029]")
"""Line ends in YAML 1.1 and none in 1.2: PyYAML would make a blank of the first, and drop blanks beside the others."""


class Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `off`, `no` and `yes` are words, `1e-3` is a number.

    A key may come only once, and depth and size have limits.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own name and place)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node, checked before anything is made of it."""
        mark = self.peek_event().start_mark
        alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _problem(f"nested more than {MAX_DEPTH} levels deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and node not in self._sizes:
            raise _problem("an alias stands inside what it refers to", mark)
        if node is not None and not alias:
            self._sizes[node] = self._size(node, mark)
        return node

    def _size(self, node: yaml.Node, mark: yaml.Mark) -> int:
        """Values in `node`, with what its aliases stand for."""
        if isinstance(node, yaml.MappingNode):
            _require_unique_keys(node)
            inner = [child for pair in node.value for child in pair]
        else:
            inner = node.value if isinstance(node, yaml.SequenceNode) else []
        size = 1 + sum(self._sizes[child] for child in inner)
        if size > MAX_VALUES:
            raise _problem(f"more than {MAX_VALUES} values, with every alias written out", mark)
        return size


def _whole_number(loader: Loader, node: yaml.ScalarNode) -> int:
    digits = len(node.value.lstrip("+-"))
    if digits > MAX_DIGITS:
        raise _problem(f"a whole number of {digits:,} digits; put it in quotes if it is text", node.start_mark)
    return loader.construct_yaml_int(node)


Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


class Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or `Loader` would not read back as text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """In double quotes where there is a line end that only some readers take for one: there it is escaped."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if LINE_ENDS.search(text) else None)


Dumper.add_representer(str, Dumper.represent_text)


def _require_unique_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise _problem(f"the key `{key.value}` comes twice", key.start_mark)
            seen.add(key.value)


def _problem(text: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, text, mark)


SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
)
for _tag, _pattern, _first in SCALARS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse(text: str, where: str, has_lines: bool) -> Any:
    """What `text` says. `where` opens a message, with the line behind it where the text has lines of its own."""
    if odd := LINE_ENDS.search(text):
        place = f"{where}:{text.count(chr(10), 0, odd.start()) + 1}" if has_lines else where
        code = f"{ord(odd[0]):04X}"
        raise ConfigError(
            f"{place}: not valid YAML: it holds the character U+{code}, which some readers take for the end of a line; "
            f'take it out, or write it as "\\u{code}" in double quotes'
        )
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if mark and has_lines else where
        raise ConfigError(f"{place}: not valid YAML: {_reason(error)}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # What PyYAML raises for a value that does not fit its tag, as in `!!timestamp x`.
        raise ConfigError(f"{where}: not valid YAML: a tag (`!!...`) with a value that is not of its kind") from error


def _reason(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem or error.context)
    if "found another document" in problem:
        return "it holds several documents (`---` between them); a config is one"
    if r"'\t'" in problem:
        return f"{problem}; indent with spaces, not with tabs"
    if "could not determine a constructor for the tag" in problem:
        return f"{problem}; a config has no tags: write the value itself"
    return problem
