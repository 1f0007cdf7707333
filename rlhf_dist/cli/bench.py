"""`rlhf-dist bench NAME`: runs `benchmarks/NAME.py` of the checkout the package lies in."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import rlhf_dist
from rlhf_dist.errors import InputError

USAGE = """usage: rlhf-dist bench NAME [--out FILE] [key=value ...]

Runs benchmarks/NAME.py of the checkout; `rlhf-dist bench NAME --help` shows what it takes."""


def run(argv: Sequence[str]) -> int:
    """Run one benchmark with the words after its name; returns its exit code."""
    folder = Path(rlhf_dist.__file__).parents[1] / "benchmarks"
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="\n\n")
        print("\n".join(_told(folder, name) for name in _names(folder)) or f"There is no benchmark in {folder}.")
        return 0
    return run_in(folder, argv)


def run_in(folder: Path, argv: Sequence[str]) -> int:
    """Run `folder/NAME.py`'s `main(argv)`. Raises `InputError` where there is no such benchmark."""
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}; benchmarks are part of a checkout: install from one with `pip install -e`"
        )
    known = ", ".join(_names(folder)) or "none"
    if not argv:
        raise InputError(f"bench needs the name of a benchmark; in {folder} there is {known}")
    name = argv[0]
    if name not in _names(folder):
        raise InputError(f"there is no benchmark `{name}` in {folder}; there is {known}")
    # As with `python benchmarks/NAME.py`: a benchmark may import its neighbours.
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", folder / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return int(module.main(list(argv[1:])) or 0)


def _told(folder: Path, name: str) -> str:
    """A benchmark with what its file says of it in the first line: "`rlhf-dist bench NAME`: what it measures."."""
    first, *_ = (ast.get_docstring(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))) or "").splitlines()
    return f"  {name:<18}{first.partition(': ')[2].rstrip('.')}"


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith("_"))
