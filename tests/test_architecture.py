"""The rules of the house, read from the source: who may import what, and how long a file and a function may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_dist"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL = [*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]

FLOORS = (
    {"types", "errors"},
    {"config"},
    {"telemetry"},
    {"algo"},
    {"models", "weights"},
    {"data", "planning"},
    {"rollout", "scoring", "learner"},
    {"loop"},
    {"cluster", "labels"},
    {"cli"},
    {"__main__"},
)
"""Lowest first; a room may import itself and what lies on a lower floor. Every room has its config section and may use
the maths, so config and algo have floors to themselves."""

ONLY_IN = {
    "vllm": lambda path: path.removeprefix("rollout/") in ("vllm_engine.py", "weight_receiver.py", "spare_model.py"),
    "deepspeed": lambda path: path == "learner/deepspeed_engine.py",
    "ray": lambda path: path.startswith("cluster/"),
    "torch": lambda path: room(path) not in {*WITHOUT_TORCH, "cli"},
}
"""Library -> which files may import it."""

IMPORTERS = ("importlib.import_module", "import_module", "__import__")

WITHOUT_TORCH = ("types", "errors", "config", "telemetry", "planning", "labels")


def room(path: str) -> str:
    """`loop/step.py` -> `loop`, `types.py` -> `types`."""
    return path.split("/")[0].removesuffix(".py")


def inside(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(source: str, path: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also inside functions; relative ones in full; `import_module("x")` too."""
    package = ["rlhf_dist", *path.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def wrong_imports(source: str, path: str) -> list[str]:
    """What `path` imports and may not."""
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    here = room(path)
    found = []
    for line, module in imports(source, path):
        parts = module.split(".")
        if parts[0] in ONLY_IN and not ONLY_IN[parts[0]](path):
            found.append(f"rlhf_dist/{path}:{line} imports {parts[0]}")
        other = parts[1] if parts[0] == "rlhf_dist" and len(parts) > 1 else here
        if other in floor and here != "__init__" and other != here and floor[other] >= floor[here]:
            found.append(f"rlhf_dist/{path}:{line} is in {here} and imports {other}: doors open downward only")
    return found


def long_functions(source: str, limit: int) -> list[str]:
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f.name for f in functions if (f.end_lineno or f.lineno) - f.lineno + 1 > limit]


@pytest.mark.parametrize("path", SOURCES, ids=inside)
def test_imports(path: Path) -> None:
    assert wrong_imports(path.read_text(encoding="utf-8"), inside(path)) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("algo/kl.py", "import vllm"),
        ("rollout/worker.py", "def f():\n    from vllm.engine import x"),
        ("learner/policy_learner.py", "import importlib\nimportlib.import_module('deepspeed')"),
        ("loop/step.py", "import ray.util"),
        ("config/load.py", "import torch.nn as nn"),
        ("data/stream.py", "from rlhf_dist.loop.queue import Q"),
        ("data/stream.py", "from rlhf_dist import loop"),
        ("data/stream.py", "from ..loop import queue"),
        ("models/hf.py", "from rlhf_dist.data import rows"),
        ("learner/policy_learner.py", "from rlhf_dist import rollout"),
        ("types.py", "from rlhf_dist.errors import DataError"),
        ("loop/step.py", "def f():\n    import rlhf_dist.cluster.build"),
        ("cluster/wiring.py", "from rlhf_dist.labels.store import LabelStore"),
    ],
)
def test_a_wrong_import_is_seen(path: str, source: str) -> None:
    assert len(wrong_imports(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rollout/vllm_engine.py", "import vllm, torch"),
        ("learner/deepspeed_engine.py", "import deepspeed"),
        ("cluster/actors.py", "import ray\nfrom rlhf_dist.loop import step"),
        ("cli/train.py", "from rlhf_dist.cluster import build"),
        ("algo/kl.py", "from . import masking\nfrom rlhf_dist.algo import masking\nfrom rlhf_dist import __version__"),
    ],
)
def test_a_right_import_is_let_through(path: str, source: str) -> None:
    assert wrong_imports(source, path) == []


def test_every_room_has_a_floor() -> None:
    known = {name for floor in FLOORS for name in floor} | {"__init__"}
    assert {room(inside(path)) for path in SOURCES} <= known


def test_lower_rooms_import_without_torch() -> None:
    modules = [
        "rlhf_dist." + inside(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for path in SOURCES
        if room(inside(path)) in WITHOUT_TORCH
    ]
    assert imports_torch(modules) == "False"


def imports_torch(modules: list[str]) -> str:
    """Whether these import torch, as Python writes it."""
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_servers_without_a_model_and_the_collator_start_without_torch() -> None:
    """It takes seconds and a quarter of a GiB in each process."""
    modules = ["rlhf_dist.cluster.actors", "rlhf_dist.learner.collator", "rlhf_dist.scoring.scorer"]
    modules += ["rlhf_dist.loop.events", "rlhf_dist.scoring.number", "rlhf_dist.scoring.http_client"]
    assert imports_torch(modules) == "False"


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sizes(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    assert long_functions(source, 60) == []


def test_a_long_function_is_seen() -> None:
    assert long_functions("def f():\n" + "    x = 1\n" * 60, 60) == ["f"]
    assert long_functions("def f():\n" + "    x = 1\n" * 59, 60) == []


def test_no_utils() -> None:
    assert [path for path in ALL if path.stem in ("utils", "util", "helpers", "misc")] == []


def test_a_file_name_appears_once() -> None:
    """So that a traceback, a search or a tab in an editor names one file."""
    names = [path.name for path in SOURCES if path.name != "__init__.py"]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []
