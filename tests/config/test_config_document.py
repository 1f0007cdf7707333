"""`docs/configuration.md` is what the generator writes, and the generator leaves no key out."""

from __future__ import annotations

from pathlib import Path

from rlhf_dist.config.document import document
from rlhf_dist.config.keys import given
from rlhf_dist.config.schema import Config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
WAY_OUT = "run `python -m rlhf_dist.config.document > docs/configuration.md`"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == document(), WAY_OUT


def test_rows() -> None:
    page = document()
    for row in (
        "| `rollout.top_k` | int, 0 or more | `0` | 0: off. |",
        "| `data.path` | text | empty | Training prompts: a file, or a directory written by `datasets.save_to_disk`. "
        "Unused by `task`. |",
        "| `sft.optimizer.lr` | float, greater than 0 | `0.001` |",  # the section's own default, not the optimizer's
    ):
        assert row in page
    assert all(f"| `{key.name}` |" in page for key in given(Config()))
    assert (
        "| `scoring.rewards.NAME.kind` | `exact`, `number`, `regex`, `function`, `model`, `http`, `gold`, `bleu`, "
        in page
    )
