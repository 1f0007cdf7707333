"""`rlhf-dist prefer` on two real DeepSpeed ranks (ZeRO-2): DPO learns the built-in task, and a resume is exact."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_dist.cli import prefer as command
from rlhf_dist.cluster.prefer_build import PreferGroup
from rlhf_dist.errors import DataError
from rlhf_dist.telemetry.metrics import MetricSums

pytestmark = pytest.mark.timeout(300)
STEPS, CUT_AFTER = 12, 6
CONFIG = f"""
output: RUNS
model: {{tiny: {{hidden_size: 64, intermediate_size: 128, layers: 2, heads: 2, kv_heads: 1, max_positions: 96}}}}
data: {{task: {{name: describe, min_length: 2, max_length: 3, train_size: 200}}}}
preferences: {{responses: 3, held_out: 48, max_tokens: 96}}
prefer:
  steps: {STEPS}
  batch_size: 16
  eval_every: 6
  log_every: 1
  checkpoint_every: {CUT_AFTER}
  optimizer: {{lr: 2e-3, warmup_steps: 2}}
rollout: {{max_prompt_tokens: 64, max_response_tokens: 32}}
learner: {{ranks: 2, cpus: 1, zero_stage: 2, micro_batch_tokens: 512}}
cluster: {{address: local, device: cpu}}
telemetry: {{wandb: "off"}}
"""


class CutError(Exception):
    """What ends a run in its middle."""


@dataclass(frozen=True)
class Runs:
    """Two runs of one config; the second was cut and resumed."""

    config: str
    whole: Path
    cut: Path

    def files(self, run: Path) -> dict[str, torch.Tensor]:
        folder = run / "checkpoints" / f"step-{STEPS}"
        return {
            f"{path.name} {name}": tensor
            for path in sorted(folder.rglob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("prefer")
    config = folder / "run.yaml"
    config.write_text(CONFIG.replace("RUNS", str(folder)))
    train_step = PreferGroup.train_step

    def cut(self: PreferGroup, step: int) -> MetricSums:
        if step > CUT_AFTER:
            raise CutError
        return train_step(self, step)

    assert command.run([str(config), "name=whole"]) == 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CutError):
        patch.setattr(PreferGroup, "train_step", cut)
        command.run([str(config), "name=cut"])
    assert command.run([str(config), "name=cut", "--resume"]) == 0
    return Runs(str(config), folder / "whole", folder / "cut")


def test_the_loss_falls_and_the_implicit_accuracy_rises(runs: Runs) -> None:
    summary = json.loads((runs.whole / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert (summary["command"], summary["method"], summary["step"]) == ("prefer", "dpo", STEPS)
    assert before["prefer/held_out_loss"] == pytest.approx(0.6931, abs=1e-3), "the policy is its reference"
    assert after["prefer/held_out_loss"] < before["prefer/held_out_loss"] - 0.02
    assert after["prefer/accuracy"] > 0.6 and after["prefer/margin"] > 0
    losses = [line["prefer/loss"] for line in metrics(runs.whole) if "prefer/loss" in line]
    assert len(losses) == STEPS and sum(losses[-3:]) < sum(losses[:3])


def test_a_resume_comes_to_the_same_bits(runs: Runs) -> None:
    whole, cut = runs.files(runs.whole), runs.files(runs.cut)
    assert whole.keys() == cut.keys() and any(name.startswith("reference.safetensors") for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name
    timeless = [
        [{name: value for name, value in line.items() if not name.startswith("time/")} for line in metrics(run)]
        for run in (runs.whole, runs.cut)
    ]
    assert timeless[0] == timeless[1]


def test_a_checkpoint_without_its_reference_is_refused(runs: Runs) -> None:
    """Last: it damages the run."""
    (runs.cut / "checkpoints" / f"step-{STEPS}" / "reference.safetensors").unlink()
    with pytest.raises(DataError, match=r"reference\.safetensors"):
        command.run([runs.config, "name=cut", "--resume"])
