"""Methods that learn on real Ray, vLLM and DeepSpeed: GSPO, and that of the guide in docs/algorithms.md.

Another, NLPO, samples and learns under one mask, which is where it was after a run that failed and was resumed.
And GRPO over conversations of two turns.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "algorithms.md"
LIMIT_S = 280.0
STEPS = 14
REWARD = """
import os

HERE = os.path.dirname(__file__)

def share_of_e(prompts, responses, answers):
    if os.path.exists(f"{HERE}/gone") and os.path.exists(f"{HERE}/runs/run/checkpoints/step-1"):
        raise ConnectionError("the judge is gone")
    return [response.count("e") / max(1, len(response)) for response in responses]
"""
CONFIG = f"""
output: runs
data: {{source: task, task: {{name: reverse, min_length: 3, max_length: 3}}}}
model: {{tiny: {{hidden_size: 64, intermediate_size: 128, layers: 2, heads: 2, kv_heads: 2}}}}
scoring: {{rewards: {{e: {{kind: function, function: "rewards:share_of_e"}}}}}}
rollout: {{cpus: 1, max_prompt_tokens: 48, max_response_tokens: 8, kv_cache_gib: 0.1}}
learner: {{cpus: 1, optimizer: {{lr: 3e-3, warmup_steps: 1}}}}
loop: {{steps: {STEPS}, checkpoint_every: 0}}
eval: {{prompts: 4, every: 0, samples: 1}}
telemetry: {{wandb: "off", progress: plain}}
"""
CALL = [sys.executable, "-m", "rlhf_dist", "train", "run.yaml"]


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A run in `folder`, by the package that lies there if one does."""
    (folder / "rewards.py").write_text(REWARD)
    (folder / "run.yaml").write_text(CONFIG)
    package = folder if (folder / "rlhf_dist").exists() else ROOT
    return subprocess.run(
        [*CALL, "name=run", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def run(folder: Path, *words: str) -> list[dict[str, float]]:
    """What a run that ended well has logged of its steps."""
    done = call(folder, *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward/mean" in line]


def learnt(steps: list[dict[str, float]]) -> bool:
    rewards = [step["reward/mean"] for step in steps]
    return bool(np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2)


@pytest.mark.faults  # for its time
def test_gspo_learns_in_several_updates_a_batch(tmp_path: Path) -> None:
    clip = ["algo.clip_low=0.02", "algo.clip_high=0.03", "learner.updates_per_batch=2"]
    steps = run(tmp_path, "algo.name=gspo", "algo.group_size=4", "loop.prompts_per_step=16", *clip)
    assert learnt(steps), steps
    assert all(step["policy/clipped_low"] + step["policy/clipped_high"] < 1 for step in steps)
    assert max(step["policy/clipped_low"] + step["policy/clipped_high"] for step in steps) > 0, "the bounds are met"


def test_the_second_turn_of_a_conversation_is_learnt(tmp_path: Path) -> None:
    """Only the second response is scored, and the first one of this model is hardly ever a word of the list.

    Had what the user says between the two been taken for sampled, the logprobs of sampler and learner would not agree.
    """
    turns = ["data.task.name=guess", "rollout.max_prompt_tokens=72"]
    steps = run(tmp_path, *turns, "algo.group_size=4", "loop.prompts_per_step=16")
    assert learnt(steps), steps
    assert max(step["rollout/logprob_diff_max"] for step in steps) <= 1e-4
    assert max(step["rollout/response_length_max"] for step in steps) > 8, "a response alone has at most 8 tokens"


@pytest.mark.faults  # for its time
def test_the_method_of_the_guide_learns_in_one_file_and_one_row(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    file, row = blocks
    shutil.copytree(ROOT / "rlhf_dist", tmp_path / "rlhf_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "rlhf_dist" / "algo" / "mine.py").write_text(file)
    methods = tmp_path / "rlhf_dist" / "config" / "methods.py"
    text = methods.read_text(encoding="utf-8")
    opening = "METHODS: dict[str, Method] = {\n"
    assert text.count(opening) == 1
    methods.write_text(text.replace(opening, opening + row), encoding="utf-8")
    steps = run(tmp_path, "algo.name=mine", "algo.group_size=4", "loop.prompts_per_step=16")
    assert learnt(steps), steps


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_nlpo_samples_and_learns_under_one_mask_and_goes_on_with_it(tmp_path: Path) -> None:
    every = ["loop.checkpoint_every=1", "loop.keep_checkpoints=9", "loop.prompts_per_step=16"]
    mask = ["algo.name=nlpo", "algo.group_size=1", "algo.mask_top_p=0.5", "algo.mask_every=3", "loop.steps=4", *every]
    (tmp_path / "gone").touch()
    failed = call(tmp_path, *mask)
    assert failed.returncode == 1 and "ConnectionError: the judge is gone" in failed.stderr.splitlines()[-1]
    (tmp_path / "gone").unlink()
    steps = run(tmp_path, *mask, "--resume")
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    folders = {n: tmp_path / "runs" / "run" / "checkpoints" / f"step-{n}" for n in (1, 2, 3, 4)}
    masks, policies = ({n: weights(f / part) for n, f in folders.items()} for part in ("mask", "hf"))
    assert same(masks[1], masks[2]), "the mask of a resumed run is the one it had"
    assert not same(masks[1], policies[1])
    assert same(masks[3], policies[3]) and same(masks[4], policies[3]), "it follows every third version"
    size = next(tensor for name, tensor in masks[1].items() if "embed" in name).shape[0]
    for step in steps:
        # Unmasked, the random model's entropy is close to the logarithm of its vocabulary.
        assert step["policy/entropy"] < math.log(size) - 0.5, step
        # A sampler without the mask, or with another, would be off by about 0.7, the logarithm of what is masked.
        assert step["rollout/logprob_diff_max"] < 0.05, step
