"""`report.html` from run directories made here: whole, hostile, empty, damaged, huge."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from rlhf_dist.cli.main import main
from rlhf_dist.config.load import to_yaml
from rlhf_dist.config.schema import Config, EvalConfig, RewardSpec, ScoringConfig
from rlhf_dist.errors import InputError
from rlhf_dist.loop import html_report
from rlhf_dist.loop.html_report import pipeline_page, reported, run_page, write_report
from rlhf_dist.loop.run_facts import read_run
from rlhf_dist.loop.shown_answers import RECORDED, Said, ShownAnswer, keep_answers, read_answers

HOSTILE = "</div><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\u202e&amp;"
BEFORE = {"eval/gold": -0.7, "eval/gold_std": 2.0, "eval/reward": 0.1, "eval/reward_std": 0.7, "eval/kl": 0.0}
AFTER = {"eval/gold": 3.3, "eval/gold_std": 1.0, "eval/reward": 1.7, "eval/reward_std": 0.2, "eval/kl": 6.5}
BINS = [{"predicted": 0.6, "observed": 0.55, "count": 100}, {"predicted": 0.9, "observed": 0.95, "count": 300}]
VOID = {"meta", "img", "br", "path", "circle"}


@pytest.fixture(autouse=True, scope="module")
def _no_git() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html_report, "code_version", lambda: {"version": "1.0", "commit": "abc"})
        yield


class Page(HTMLParser):
    """The tags, attributes and text of a page; every tag that is opened has to be closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self._open[-1:] != ["style"] else ""


def run_of(path: Path, command: str = "train", said: str = "nice", **more: Any) -> Path:
    """A run directory with everything."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(Config(name=path.name, eval=EvalConfig(prompts=256, samples=4))))
    results = {"before": BEFORE, "after": AFTER} if command == "train" else {"after": {"accuracy": 0.85}}
    ledger = {"ledger": "96 groups issued"} if command == "train" else {"calibration": BINS}
    summary = {"command": command, "seconds": 61.0, "versions": {"vllm": "9.9"}, **results, **ledger, **more}
    (path / "summary.json").write_text(json.dumps(summary))
    event = {
        "time": "2026-01-01T00:00:00+00:00",
        "kind": "warning",
        "message": f"beware {said}",
        "facts": {"alert": "fault"},
    }
    (path / "events.jsonl").write_text(json.dumps(event) + "\n")
    lines = [
        {"step": i, "reward/mean": i, "reward/proxy": i, "reward/gold": min(i, 8 - i), "kl/reference": i / 2}
        for i in range(1, 7)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if command == "train":
        for step in (0, 6):
            # Of prompt i the gold reward goes from 0 to i - 10.
            rows = [
                ShownAnswer(
                    f"q{i}", Said(f"greedy {step}", 1.0), Said(f"{said} {i}", 0.5, float(bool(step) and i - 10))
                )
                for i in range(RECORDED)
            ]
            keep_answers(path, step, rows)
    return path


def page_of(path: Path) -> Page:
    return Page(write_report(path).read_text(encoding="utf-8"))


def test_the_page_of_a_run_has_all_its_parts(tmp_path: Path) -> None:
    path = run_of(tmp_path / "ppo")
    page = page_of(path)
    for part in ("What was run", "Before and after", "Answers", "Curves", "Over-optimisation", "Calibration", "Faults"):
        assert part in page.text, part
    for fact in ("-0.70 → 3.30", "96 groups issued", "vllm 9.9", "1m01s", "beware nice", "faults: 1;", "grpo"):
        assert fact in page.text, fact
    # 1.96 deviations of a mean of eval.prompts x eval.samples = 256 x 4.
    assert "3.300 (3.24 to 3.36)" in page.text
    assert "gold was highest at step 4, 4.00 at 2.0 nats; at the end it was 2.00 at 3.0 nats" in page.text
    assert page.tags.count("svg") >= 4 and not {"script", "link", "img", "iframe"} & {*page.tags}
    assert not [a for a in page.attributes if a[0] in ("src", "href", "onerror", "onclick")]


def test_the_keys_that_were_changed_are_listed_also_those_of_a_reward(tmp_path: Path) -> None:
    path = run_of(tmp_path / "ppo")
    rewards = {"mine": RewardSpec(kind="regex", pattern="a+")}
    config = Config(name="ppo", seed=7, scoring=ScoringConfig(rewards=rewards))
    (path / "config.yaml").write_text(to_yaml(config))
    changed = ["name", "seed", "scoring.rewards.mine.kind", "scoring.rewards.mine.pattern"]
    assert [*read_run(path).changed] == [key for key in read_run(path).config if key in changed]
    assert f"{len(changed)} keys that are not at their default" in page_of(path).text


def test_answers_are_the_first_prompts_then_the_largest_rise_and_fall(tmp_path: Path) -> None:
    text = page_of(run_of(tmp_path / "ppo")).text
    shown = [int(i) for i in re.findall(r"(?<![a-z])q(\d+)", text)]
    assert shown == [0, 1, 2, 3, 4, 5, 31, 30, 6, 7]
    assert "not chosen" in text and "the largest rise against before training" in text and "greedy 6" in text


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    page = page_of(run_of(tmp_path / "ppo", said=HOSTILE, outcome="failed", message=HOSTILE))
    assert not {"script", "img"} & {*page.tags}
    assert "<script>alert(1)</script>" in page.text and "\\x1b[2J\\u202e&amp;" in page.text
    assert "\x1b" not in page.text and "\u202e" not in page.text
    policy = [value for _, value in page.attributes if value and "default-src 'none'" in value]
    assert policy, "even what got past the escaping could load nothing"


def test_what_an_address_hides_stays_hidden(tmp_path: Path) -> None:
    path = run_of(tmp_path / "ppo")
    config = (path / "config.yaml").read_text()
    assert "\nmodel:\n  path: tiny" in config
    (path / "config.yaml").write_text(config.replace("path: tiny", "path: https://me:s3cret@host/a?key=t0ken", 1))
    text = write_report(path).read_text()
    assert "https://host/a" in text and "s3cret" not in text and "t0ken" not in text


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", "a: [", "config.yaml"),
        ("summary.json", "{", "no end is recorded"),
        ("metrics.jsonl", "nonsense\n", "No curves: metrics.jsonl"),
        ("events.jsonl", None, "events.jsonl is missing"),
        ("answers/after.json", '{"step": 3, "rows": [{"prompt": 1}]}', "No answers after training"),
        ("answers/after.json", None, "answers/after.json is missing"),
        ("answers/before.json", "[]", "No answers"),
    ],
)
def test_a_part_that_cannot_be_read_is_said(tmp_path: Path, file: str, content: str | None, words: str) -> None:
    path = run_of(tmp_path / "ppo")
    (path / file).unlink()
    if content is not None:
        (path / file).write_text(content)
    assert words in page_of(path).text


def test_a_run_with_nothing_but_an_empty_log_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    text = page_of(tmp_path).text
    assert "no end is recorded" in text and "No results" in text and "No curves" in text
    assert "nan" not in text.lower() and "0.000" not in text, "nothing is invented"


def test_a_run_of_a_version_without_samples_shows_its_greedy_answers(tmp_path: Path) -> None:
    path = run_of(tmp_path / "ppo", step=6, answers={"prompts": ["p"], "before": ["old"], "after": ["calm"]})
    for name in ("before.json", "after.json"):
        (path / "answers" / name).unlink()
    text = page_of(path).text
    assert "this run kept no sampled ones" in text and "calm" in text


@pytest.mark.parametrize(
    "bins", [[], None, 3, [{}], [{"predicted": 2, "observed": 0, "count": 1}], [{**BINS[0], "count": 0}]]
)
def test_a_calibration_that_is_none_is_said(tmp_path: Path, bins: Any) -> None:
    path = run_of(tmp_path / "reward", "reward", calibration=bins)
    text = page_of(path).text
    assert "no calibration" in text or "cannot be read" in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from([*AFTER]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = (
    "outcome",
    "message",
    "command",
    "before",
    "after",
    "answers",
    "step",
    "ledger",
    "seconds",
    "versions",
    "calibration",
)


@given(st.dictionaries(st.sampled_from(KEYS), JSON), JSON, st.sampled_from(["train", "reward", "sft"]))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_summary_comes_to_a_page(tmp_path: Path, summary: dict[str, Any], models: Any, command: str) -> None:
    run = tmp_path / "a"
    run.mkdir(exist_ok=True)
    (run / "summary.json").write_text(json.dumps({"command": command} | summary))
    (tmp_path / "pipeline.json").write_text(json.dumps({"models": models}))
    for page in (run_page(read_run(run)), pipeline_page(tmp_path)):
        assert "script" not in Page(page).tags


def test_the_page_of_a_pipeline_compares_its_stages(tmp_path: Path) -> None:
    stages = {"sft": "sft", "reward": "reward", "ppo": "train", "grpo": "train"}
    for name, command in stages.items():
        run_of(tmp_path / name, command)
    run_of(tmp_path / "ppo.old-1")
    for ended in (False, True):
        if ended:
            (tmp_path / "pipeline.json").write_text(json.dumps({"models": [{"model": name} for name in stages]}))
        page = page_of(tmp_path)
        assert ("has not ended" in page.text) != ended
        assert all(f"Stage {name}" in page.text for name in stages) and "Stage ppo.old-1" not in page.text
        assert "gold reward, ppo" in page.text and "gold reward, grpo" in page.text
        # 100 x |0.6 - 0.55| + 300 x |0.9 - 0.95| over 400.
        assert "400 held-out pairs" in page.text and "differ by 0.050" in page.text
    order = [page.text.index(f"Stage {name}") for name in stages]
    assert order == sorted(order)


def test_a_pipeline_file_cannot_name_what_lies_elsewhere(tmp_path: Path) -> None:
    run_of(tmp_path / "outside", said="precious")
    run_of(tmp_path / "pipe" / "sft", "sft")
    (tmp_path / "pipe" / "pipeline.json").write_text(
        json.dumps({"models": [{"model": "../outside"}, {"model": "sft"}]})
    )
    assert "precious" not in pipeline_page(tmp_path / "pipe")


def test_a_huge_run_comes_to_a_small_page(tmp_path: Path) -> None:
    path = run_of(tmp_path / "ppo", after=AFTER | {f"eval/{i}": 1.0 for i in range(3_000)})
    keep_answers(path, 6, [ShownAnswer("q", Said("x" * 1_000_000, 1.0), Said("y" * 1_000_000, 1.0))] * RECORDED)
    assert (path / "answers" / "after.json").stat().st_size < 200_000
    names = ("reward/mean", "reward/gold", "reward/proxy", "kl/reference", "policy/entropy")
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(20_000):
            file.write(json.dumps({"step": step} | dict.fromkeys(names, step / 7)) + "\n")
    with (path / "events.jsonl").open("a") as file:
        file.write((path / "events.jsonl").read_text() * 5_000)
    assert len(run_page(read_run(path))) < 300_000


def test_answers_come_back_as_they_were_kept(tmp_path: Path) -> None:
    rows = (ShownAnswer("é\n", Said("a", None), None), ShownAnswer("b", None, None, "(dropped: too long)"))
    keep_answers(tmp_path, 0, rows)
    assert read_answers(tmp_path, "before.json").rows == rows and not (tmp_path / "answers" / "after.json").exists()


def test_the_command_writes_it_again_and_rejects_what_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_of(tmp_path / "ppo")
    assert main(["report", str(path)]) == 0 and f"report: {path}/report.html" in capsys.readouterr().out
    for wrong in (tmp_path / "nothing", tmp_path / "ppo" / "answers"):
        assert main(["report", str(wrong)]) == 2
        assert "neither a run's directory nor a pipeline's" in capsys.readouterr().err
    with pytest.raises(InputError):
        pipeline_page(tmp_path / "nothing")
    assert not (tmp_path / "ppo" / "answers" / "report.html").exists()


def test_a_page_that_cannot_be_made_is_told_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> Path:
        raise ZeroDivisionError("of nothing")

    monkeypatch.setattr(html_report, "write_report", fails)
    assert reported(tmp_path) == f"no report: ZeroDivisionError: of nothing; `rlhf-dist report {tmp_path}` writes it"
