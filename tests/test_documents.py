"""What the pages say, as far as a test can tell: examples load, messages are real, links and slots are filled."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_dist.config.checks import problems
from rlhf_dist.config.load import from_yaml, load
from rlhf_dist.config.schema import Config, DataConfig, RewardSpec, ScoringConfig, SftConfig
from rlhf_dist.data.demonstrations import demonstrations
from rlhf_dist.data.stream import PromptStream, held_out
from rlhf_dist.errors import RlhfError
from rlhf_dist.scoring.function import FunctionReward
from rlhf_dist.scoring.scorer import Scorer
from rlhf_dist.scoring.texts import Texts
from rlhf_dist.types import Message

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
DATA_PAGE = (ROOT / "docs" / "data-and-rewards.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULE = "my_rewards"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every file that the page shows, made the current one."""
    for name, text in re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", DATA_PAGE, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "path", "texts"),
    [
        ("jsonl", "prompts.jsonl", [("What is 3 + 4?", "7"), ("What is 10 - 4?", "6"), ("What is 2 + 2?", "4")]),
        ("jsonl", "chat.jsonl", [("3 + 4?", "7"), ("2 + 2?", "4")]),
        (
            "gsm8k",
            "gsm8k.jsonl",
            [
                ("Ann has 3 apples and buys 4. How many has she?", "7"),
                ("Bo had 10 pens and lost 4. How many are left?", "6"),
            ],
        ),
    ],
)
def test_prompts(files: Path, source: str, path: str, texts: list[tuple[str, str]]) -> None:
    config = DataConfig(source=source, path=path, shuffle=False)  # pyright: ignore[reportArgumentType]
    prompts = PromptStream(config, 0, 0).take(len(texts))
    assert [(prompt.messages[-1].content, prompt.answer) for prompt in prompts] == texts


def test_tables(files: Path) -> None:
    subprocess.run([sys.executable, "make_tables.py"], cwd=files, check=True, capture_output=True, timeout=120)
    for source, path in (("parquet", "prompts.parquet"), ("dataset", "prompts")):
        config = DataConfig(source=source, path=path, shuffle=False)  # pyright: ignore[reportArgumentType]
        assert [prompt.answer for prompt in PromptStream(config, 0, 2).take(3)] == ["1", "2", "3"]
        assert [prompt.answer for prompt in held_out(config, 2)] == ["7", "8"]


def test_demonstrations(files: Path) -> None:
    found = demonstrations(DataConfig(source="jsonl", path="demonstrations.jsonl"), SftConfig(), 0, 0)
    assert [demo.response for demo in found] == ["7", "4"]
    text = demonstrations(DataConfig(source="jsonl", path="text.jsonl"), SftConfig(objective="text"), 0, 0)
    assert [(demo.messages, demo.response) for demo in text] == [((), "Any text at all."), ((), "And another.")]


def test_the_config_and_its_reward(files: Path) -> None:
    config = load(files / "my.yaml")
    assert problems(config, "train") == []
    reward = FunctionReward("brief", config.scoring.rewards["brief"])
    assert reward(["q"] * 3, ["7", "7 apples", "8"], ["7"] * 3).tolist() == pytest.approx([1.0, 0.93, 0.0])
    assert len(PromptStream(config.data, config.seed, config.eval.prompts)) == 2


def test_the_readme_shows_the_same() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (row,) = re.findall(r"^```json\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    ppo, rewards, at_once = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert code in DATA_PAGE and row in DATA_PAGE and rewards in DATA_PAGE
    assert problems(from_yaml(ppo), "train") == []
    assert problems(from_yaml(at_once), "train") == []


def bad_data(text: str, held_back: int = 0) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        (folder / "bad.jsonl").write_text(text, encoding="utf-8")
        return PromptStream(DataConfig(source="jsonl", path="bad.jsonl"), 0, held_back)

    return read


def bad_reward(body: str, timeout_s: float = 5.0) -> Callable[[Path], object]:
    def score(folder: Path) -> object:
        (folder / f"{MODULE}.py").write_text(f"def brief(prompts, responses, answers):\n    {body}\n", encoding="utf-8")
        spec = RewardSpec(kind="function", function=f"{MODULE}:brief", timeout_s=timeout_s)
        user, ends = (Message("user", "q"),), (True, True)
        texts = Texts(("q", "q"), ("x", "y"), ("a", "a"), (user, user), ends)
        return Scorer(ScoringConfig({"brief": spec})).score_texts(texts)

    return score


@pytest.mark.parametrize(
    "action",
    [
        bad_data('{"prompt": "a", "answer": "b"}\nhello\n'),
        bad_data('{"question": "a", "answer": "b"}\n'),
        bad_data('{"prompt": " ", "answer": "b"}\n'),
        bad_data('{"prompt": "a"}\n'),
        bad_data('{"prompt": "a", "answer": NaN}\n'),
        bad_data('[{"prompt": "a", "answer": "b"}]'),
        bad_data('{"prompt": "a", "answer": "b"}\n' * 3, held_back=Config().eval.prompts),
        bad_reward("1 / 0"),
        bad_reward("return [1.0]"),
        bad_reward("return [float('nan'), 1.0]"),
        bad_reward("import time; time.sleep(2)", timeout_s=0.1),
    ],
)
def test_messages_are_those_of_the_page(files: Path, action: Callable[[Path], object]) -> None:
    with pytest.raises(RlhfError) as caught:
        action(files)
    message = str(caught.value).replace("within 0.1 s", "within 5 s").replace(str(files) + "/", "...")
    assert f"| `{message}` |" in DATA_PAGE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_slots(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
    named = re.findall(r"(?:configs|launch|docs|docker|tests|rlhf_dist)/[\w/.-]+\.(?:yaml|sh|md|py|txt)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert re.findall(r"@@\w+@@", text) == [], "figures of real runs go here"
