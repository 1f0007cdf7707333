"""Writes `docs/configuration.md` from the schema: `python -m rlhf_dist.config.document > docs/configuration.md`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rlhf_dist.config.keys import ANY, given
from rlhf_dist.config.schema import Config

HEAD = """# Configuration

Every key, its type and range, its default and its meaning. Made from `rlhf_dist/config/schema.py` by
`python -m rlhf_dist.config.document > docs/configuration.md`; a test compares the two.

A config is a YAML file. It may begin with `include: [other.yaml]`: paths count from the file's own folder, and what
comes later wins. `key=value` on the command line wins over all files: `learner.optimizer.lr=1e-4`. Unknown keys are
rejected. Problems are reported together, in three rounds: first keys and types, then ranges and rules across keys, then
whether this machine has what is asked for. `rlhf-dist train CONFIG --dry-run` goes so far, prints the resolved config
and the plan, and starts nothing; models, rewards and the contents of data files are checked when a run starts.

Sections are merged key by key. Mappings whose names are your own (`scoring.rewards`, `pipeline.stages`) are replaced by
whoever gives them as a whole, an included file, the file or the command line:
`'scoring.rewards={judge: {kind: model, path: runs/rm}}'` leaves `judge` only, and `scoring.rewards={}` leaves none. A
longer key changes or adds one entry: `scoring.rewards.judge.weight=2`.

`${output}` in a text stands for the value of another key, `${oc.env:HOME}` for an environment variable. For the text
`${` itself write `\\${`, in YAML in single quotes or without quotes: `system: 'costs \\${5}'`.

`~` at the start of a path (`output=~/runs`) is the home of the user on the machine where the command runs.

A config has at most 50 levels of nesting and 8 MiB, is UTF-8, and gives each key once. Tags (`!!...`) are rejected."""
NAMES: dict[Any, str] = {str: "text", list[str]: "list of texts"}


def document() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_section(Config, "")]) + "\n"


def _section(kind: Any, prefix: str, default: Any = None) -> Iterator[str]:
    """A table of the section's own keys, then the sections inside it."""
    default = default or kind()
    ranges = {key.name: key.right for key in given(default)}
    inner: dict[str, tuple[Any, Any]] = {}
    yield f"\n## {prefix.rstrip('.') or 'The top level'}\n"
    if kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("):  # dataclass writes one of its own
        yield f"{kind.__doc__}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for name, hint in get_type_hints(kind).items():
        value, shown = getattr(default, name), NAMES.get(hint) or getattr(hint, "__name__", "")
        if dataclasses.is_dataclass(hint):
            inner[name] = (hint, value)
            continue
        if get_origin(hint) is dict:
            inner[f"{name}.NAME"] = (get_args(hint)[1], None)
            value, shown = ", ".join(value), f"names -> `{prefix}{name}.NAME`"
        elif get_origin(hint) is Literal:
            shown = ", ".join(f"`{choice}`" for choice in get_args(hint))
        if (right := ranges.get(name)) and right is not ANY:
            shown += f", {right.right}"
        text = f"`{str(value).lower()}`" if value != "" else "empty"
        yield f"| `{prefix}{name}` | {shown} | {text} | {_meanings(kind).get(name, '')} |"
    for name, (hint, value) in inner.items():
        yield from _section(hint, f"{prefix}{name}.", value)


def _meanings(kind: Any) -> dict[str, str]:
    """Key -> the text under it in the source, on one line."""
    body = next(node for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef)).body
    found = {}
    for key, text in pairwise(body):
        if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(key.target)] = " ".join(str(text.value.value).split()).replace("|", "\\|")
    return found


if __name__ == "__main__":
    print(document(), end="")
