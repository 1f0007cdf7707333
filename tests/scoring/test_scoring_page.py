"""The examples of docs/reward-servers.md and docs/rewards.md are right configs, and the wire is as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlhf_dist.config.load import load
from rlhf_dist.config.scoring_checks import scoring_problems
from rlhf_dist.scoring.http_server import ScoreRequest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "reward-servers.md").read_text(encoding="utf-8")
REWARDS = (DOCS / "rewards.md").read_text(encoding="utf-8")


def test_the_configs(tmp_path: Path) -> None:
    mixed, served = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for text, kinds in ((mixed, ["model", "http", "regex", "gold"]), (served, ["model"])):
        (tmp_path / "page.yaml").write_text(text)
        config = load(tmp_path / "page.yaml")
        assert list(scoring_problems(config)) == []
        assert [spec.kind for spec in config.scoring.rewards.values()] == kinds


def test_the_request() -> None:
    request, answer = re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    texts = ScoreRequest.model_validate_json(request).texts()
    assert [message.role for message in texts.conversations[0]] == ["system", "user"]
    assert len(json.loads(answer)["scores"]) == len(texts.responses)


def test_the_configs_of_the_page_of_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf_dist.config.effects.missing_library", lambda kind: "")  # extras, as the page says
    (tmp_path / "person.schema.json").write_text("{}")
    blocks = re.findall(r"^```yaml\n(.*?)^```", REWARDS, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    for text in blocks:
        (tmp_path / "page.yaml").write_text(text)
        assert list(scoring_problems(load(tmp_path / "page.yaml"))) == []


def test_the_pattern_of_the_page_of_rewards() -> None:
    pattern = re.search(r"pattern: '(.*)'", REWARDS)
    assert pattern
    good = ["<think>a\nb</think>\n<answer>7</answer>", " <think></think><answer></answer> "]
    bad = ["<answer>7</answer>", "<think>a</think><answer>7</answer> so", "<think><think>a</think><answer>7</answer>"]
    assert all(re.fullmatch(pattern[1], text, re.DOTALL) for text in good)
    assert not any(re.fullmatch(pattern[1], text, re.DOTALL) for text in bad)
