"""What a run with every part writes to metrics.jsonl stands in docs/metrics.md."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from stand_ins import FakeCritic, FakeReference, FakeRollouts, lines
from test_loop_rl_training import CONFIG, whole

from rlhf_dist.config.schema import AlgoConfig, KLConfig, ShapingConfig
from rlhf_dist.data.stream import PromptStream

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_every_metric_of_a_run_is_on_the_page(tmp_path: Path) -> None:
    names = set(re.findall(r"`(\w+/\w+)`", PAGE.read_text(encoding="utf-8")))
    found: set[str] = set()
    algo = AlgoConfig(name="ppo", kl=KLConfig(coef=0.1), shaping=ShapingConfig(normalize="running", clip=5.0))
    ppo = replace(CONFIG, algo=algo, eval=replace(CONFIG.eval, samples=2))
    first = PromptStream(CONFIG.data, CONFIG.seed, CONFIG.eval.prompts).take(1)[0]
    rollouts = FakeRollouts(drops=[first.uid])
    runs = [
        whole(tmp_path / "grpo", CONFIG, rollouts=rollouts),
        whole(tmp_path / "ppo", ppo, critic=FakeCritic(), reference=FakeReference()),
    ]
    for run in runs:
        for line in lines(run.directory.metrics):
            found |= line.keys() - {"step"}
    known = {"reward/exact": "reward/NAME", "eval/exact": "eval/NAME", "eval/pass_at_2": "eval/pass_at_K"}
    known["data/dropped_prompt_empty"] = "data/dropped_REASON"
    assert known.keys() <= found and len(found) > 40
    assert {known.get(name, name) for name in found} - names == set()
