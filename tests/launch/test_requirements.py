"""The pinned lists of packages beside pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pins(name: str) -> dict[str, str]:
    """Package -> version of one list; every line has to be an exact pin."""
    lines = [line for line in (ROOT / "launch" / name).read_text().splitlines() if not line.startswith("#")]
    rows = [re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines]
    assert all(rows), [line for line, row in zip(lines, rows, strict=True) if not row]
    return {row[1].lower().replace("_", "-"): row[2] for row in rows if row}


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_lists_agree_with_pyproject(kind: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = pins(f"requirements-{kind}.txt")
    for requirement in project["dependencies"] + project["optional-dependencies"][kind]:
        name, version = re.sub(r"\[.*?\]", "", requirement).split("==")
        assert listed[name].removesuffix("+cpu") == version, name


def test_cpu_list_leaves_out_what_breaks_transformers() -> None:
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(pins("requirements-cpu.txt"))


def test_dev_list_has_every_tool_of_pyproject() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras["dev"]) <= set(pins("requirements-dev.txt"))
