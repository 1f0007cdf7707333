"""The recipes of docs/recipes.md: each has a place on the GPUs of its row, and the documented prompts can be read."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.config.load import load
from rlhf_dist.planning.nodes import place_in
from rlhf_dist.planning.placement import Machine

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*b_*.yaml"), key=lambda path: path.name)
NODE = 8
"""GPUs of a node."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_a_place_on_the_gpus_of_its_row(path: Path, tmp_path: Path) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith("|") and f"/{path.name}`" in line]
    _, _, model, count, placement, *_ = (part.strip() for part in row.split("|"))
    config, gpus = load(path, [f"data.path={tmp_path}"]), int(count)
    assert config.model.path.endswith(f"/{model}") and config.cluster.colocate == (placement == "turns")
    nodes = [Machine(64, min(gpus, NODE), f"10.0.0.{i + 1}") for i in range(-(-gpus // NODE))]
    placed = place_in(config, nodes, "train")
    generate, learn = placed.rollout_workers * placed.rollout_gpus, placed.learner_ranks * placed.learner_gpus
    assert placed.device == "cuda"
    if config.cluster.colocate:
        assert (generate, learn) == (gpus, gpus)
    else:
        assert placement == f"{generate} generate, {learn} learn" and generate + learn == gpus
    assert config.model.dtype == "bfloat16" and config.learner.zero_stage >= 1 and not config.rollout.enforce_eager


def test_every_size_and_data_has_a_recipe() -> None:
    assert {path.stem.split("b_")[0] for path in RECIPES} >= {"0.5", "1.5", "7", "8", "32", "70"}
    assert all(name in PAGE for name in ("GSM8K", "MATH", "HH-RLHF"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_gpus_with_the_memory_of_its_row(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith("|") and f"/{path.name}`" in line]
    _, _, _, count, *_, told, _ = (part.strip() for part in row.split("|"))
    nodes, data = max(1, int(count) // NODE), tmp_path / "train.jsonl"
    data.touch()
    cluster = f"{nodes}x{min(int(count), NODE)}xH100-80G"
    assert main(["plan", str(path), "--cluster", cluster, f"data.path={data}"]) == 0
    planned = capsys.readouterr().out
    found = [float(gb) for gb in re.findall(r"memory of each .*? \(\d+\): ([\d.]+) of 80 GB", planned)]
    assert found == pytest.approx([float(gb) for gb in re.findall(r"\d+", told)], abs=1.0)
    assert "forecast of the phases" in planned


def test_the_prompts_of_hh_are_conversations_that_end_with_the_user(tmp_path: Path) -> None:
    script = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert script
    talk = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant: d"
    with gzip.open(tmp_path / "pairs.gz", "wt", encoding="utf-8") as file:
        for chosen in (talk, "\n\nHuman: \n\nAssistant: d", "\n\nHuman: a?"):
            file.write(json.dumps({"chosen": chosen, "rejected": "x"}) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", script[1], str(tmp_path / "pairs.gz")], capture_output=True, text=True, check=True
    )
    (row,) = done.stdout.splitlines()
    turns = [("user", "a?"), ("assistant", "b"), ("user", "c?")]
    assert [(each["role"], each["content"]) for each in json.loads(row)["messages"]] == turns
