"""The example of docs/reward-servers.md is a right config, and what it says of the wire is what the server takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rlhf_dist.config.load import load
from rlhf_dist.config.scoring_checks import scoring_problems
from rlhf_dist.scoring.http_server import ScoreRequest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reward-servers.md").read_text(encoding="utf-8")


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
