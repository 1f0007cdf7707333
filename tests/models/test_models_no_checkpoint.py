from pathlib import Path

import pytest

from rlhf_dist.config.schema import ModelConfig
from rlhf_dist.errors import ModelError
from rlhf_dist.models.hf import resolve


def test_a_run_without_a_checkpoint_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ModelError, match="has no finished checkpoint") as raised:
        resolve(ModelConfig(path=str(tmp_path / "run")), tmp_path)
    for way in ("--resume", "loop.checkpoint_every", "sft.checkpoint_every"):
        assert way in str(raised.value)
