"""`rlhf-dist plan`: what it does without, and what it says of a cluster that does not fit the config."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.config.load import from_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE, REVERSE = str(CONFIGS / "recipes/7b_grpo.yaml"), str(CONFIGS / "reverse.yaml")


@pytest.mark.parametrize(
    "words",
    [
        [RECIPE, "--cluster", "8xH100-80G"],
        [RECIPE, "--cluster", "8xH100-80G", "data.path=of-another-machine.jsonl"],
        [str(CONFIGS / "recipes/8b_ppo_hh.yaml"), "--cluster", "8xH100-80G", "data.path=/not/here"],
        [str(CONFIGS / "local.yaml"), "--cluster", "2xCPU"],
    ],
)
def test_a_plan_needs_no_files(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 0
    found = capsys.readouterr().out
    assert "memory of each pair of rollout worker and learner rank" in found and "not used" not in found


@pytest.mark.parametrize("path", ["/not/here", "~/not-here", "./here//not", "org/not-known"])
def test_a_model_that_is_not_here_is_told(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", RECIPE, "--cluster", "8xH100-80G", f"model.path={path}"]) == 0
    there = os.path.expanduser(path)
    assert f"memory and forecast: model.path = {there}: there is no such directory here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([RECIPE, "--cluster", "4x8xH100-80G"], "not used: 24 of 32 GPUs"),
        ([str(CONFIGS / "recipes/70b_grpo.yaml"), "--cluster", "64x8xH100-80G"], "not used: 448 of 512 GPUs"),
        ([str(CONFIGS / "recipes/7b_grpo_apart.yaml"), "--cluster", "9xH100-80G"], "not used: 1 of 9 GPUs"),
        ([REVERSE, "--gpus", "2"], "not used: 1 of 2 GPUs"),
        ([REVERSE, "--cluster", "3x16xCPU"], "not used: 2 of 3 nodes"),
    ],
)
def test_what_nobody_uses_is_told(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("given", [["--cluster", "2x16xCPU"], ["--gpus", "0"]])
def test_a_recipe_for_gpus_without_any_names_the_option(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", RECIPE, *given]) == 2
    said = capsys.readouterr().err
    assert "cluster.device is cuda, but what is planned for has no GPU" in said and "--cluster 1x8xH100-80G" in said


def test_a_dry_run_on_a_smaller_machine_still_resolves_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", REVERSE, "--dry-run", "rollout.workers=1000", "cluster.device=cpu"]) == 2
    found = capsys.readouterr()
    assert from_yaml(found.out).rollout.workers == 1000 and "rollout.workers 1000" in found.err


def test_a_split_that_does_not_fit_is_not_called_balanced(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(CONFIGS / "recipes/7b_grpo_apart.yaml"), "--cluster"]
    assert main([*words, "8xA100-40G"]) == 2
    assert "split of these GPUs" not in capsys.readouterr().out
    assert main([*words, "8xH100-80G"]) == 0
    assert "split of these GPUs: " in capsys.readouterr().out


def test_long_times_are_whole_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / "recipes/32b_dapo.yaml"), "--cluster", "4x8xH100-80G"]) == 0
    found = capsys.readouterr().out
    assert re.search(r"\d,\d{3} s a step", found) and "e+0" not in found


def test_a_pipeline_is_planned_without_its_stages_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["algo.name=ppo", "algo.group_size=1", "critic.start=tiny", "--cluster", "2xCPU"]
    assert main(["plan", str(CONFIGS / "local.yaml"), *words]) == 0
    found = capsys.readouterr().out
    assert "pipeline: planned without the keys that its stages set (ppo, grpo)" in found and "critic" in found


def test_a_gpu_of_one_kind_needs_no_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", RECIPE, "--cluster", "1x8xh100"]) == 0
    assert "cluster: 1 node, each with 8 H100-80G and 64 CPUs" in capsys.readouterr().out
    assert main(["plan", RECIPE, "--cluster", "1x8xA100"]) == 2
    assert "A100 is not known; there is B200-180G, H200-141G, H100-80G, A100-80G" in capsys.readouterr().err


@pytest.mark.parametrize(
    "size", ["100000x8xH100-80G", "1x000008xH100-80G", "100000xCPU", "8xH100-80G,1000000G", "9" * 5000]
)
def test_a_cluster_that_is_too_large_is_told_the_rule(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = size if "x" in size else f"{size}x8xH100-80G"
    assert main(["plan", RECIPE, "--cluster", size]) == 2
    said = capsys.readouterr().err
    assert "nodes, and GPUs or CPUs of each, have 5 digits at most, and each node's memory in GB 6" in said


@pytest.mark.parametrize(
    "words",
    [["--cluster", "8xH100-80G", "--cluster=2xCPU"], ["--gpus", "8", "--gpus", "8"], ["--response-tokens=0"] * 2],
)
def test_an_option_that_is_given_twice_is_rejected(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", RECIPE, *words]) == 2
    said = capsys.readouterr()
    assert f"argument {words[0].partition('=')[0]}: it is given twice; give it once" in said.err and not said.out


def test_an_empty_cluster_is_not_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", REVERSE, "--cluster", ""]) == 2
    assert "write NODESxGPUSxKIND" in capsys.readouterr().err
