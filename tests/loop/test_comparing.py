"""Policies compared: their answers through the controller's shell, what came of each two, the page, the directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from stand_ins import FakeBodies, FakeRollouts, FakeScoring, actors, members, prompts, scores_of

from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ConfigError, DataError
from rlhf_dist.loop.compare_directory import new_directory
from rlhf_dist.loop.compare_page import compare_page
from rlhf_dist.loop.compare_report import answer_rows, as_json, judged_by, tables
from rlhf_dist.loop.comparing import EXAMPLES, HeadToHead, Judged, Policy, answer, compare, labels
from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.controller_rules import rules_of
from rlhf_dist.loop.run_directory import never_began, write_json
from rlhf_dist.loop.run_lock import LOCK_FILE
from rlhf_dist.loop.shell import Shell
from rlhf_dist.telemetry.console_tables import as_text
from rlhf_dist.types import Message, NonFinite, Prompt, Sampling, Scores

SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, max_tokens=9, stop=())
HOSTILE = "</div><script>alert(1)</script><img src=http://x.y/z onerror=alert(1)>\x1b[2J\x00&lt;"


class Scorers(FakeScoring):
    """Sample i of prompt 0/P has a total of P + i, and a truth of -(P + i), but for the first of 0/1: that is NaN."""

    def scores(self, uid: str, samples: int) -> Scores:
        total = int(uid[2:]) + np.arange(samples, dtype=np.float32)
        truth = -total
        if uid == "0/1":
            truth[0] = np.nan
        return scores_of(total, {"exact": total, "truth": truth})


class Bodies(FakeBodies):
    """A text says which sample of which request it is."""

    def texts(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        assert set(keys) <= self.kept
        return [tuple(f"{key}: {sample}" for sample in range(2)) for key in keys]


def answered(samples: int, judge: str, drops: Sequence[str] = ()) -> tuple[dict[tuple[str, int], Judged], FakeBodies]:
    processes = actors(FakeRollouts(drops=drops), Scorers(), None, Bodies())
    shell = Shell(Controller(rules_of(Config(), False, masked=False), None, members()), processes)
    found, _ = answer(prompts(3), samples, SAMPLING, seed=1, shell=shell, judge=judge)
    assert isinstance(processes.bodies, FakeBodies)
    return found, processes.bodies


def test_answers_have_the_judges_scores() -> None:
    found, bodies = answered(2, "total")
    assert found["0/2", 1] == Judged("eval/0/2/0: 1", 3.0, 13)
    assert len(found) == 6 and bodies.kept == set(), "nobody needs the tokens any more"
    truth, _ = answered(2, "truth")
    assert truth["0/2", 1].score == -3.0
    assert ("0/1", 0) not in truth and ("0/1", 1) in truth, "a score that is not finite decides nothing"


def test_without_samples_the_answers_are_greedy() -> None:
    found, _ = answered(0, "total")
    assert {key: one.text for key, one in found.items()} == {(f"0/{n}", 0): f"eval_greedy/0/{n}/0: 0" for n in range(3)}


def test_a_dropped_prompt_is_not_compared_and_none_at_all_is_an_error() -> None:
    found, _ = answered(1, "total", ["0/1"])
    assert {uid for uid, _ in found} == {"0/0", "0/2"}
    with pytest.raises(DataError, match="no held-out prompt could be answered"):
        answered(1, "total", ["*"])


def policy(label: str, scores: dict[tuple[int, int], float], text: str = "{label} {prompt}") -> Policy:
    """(prompt, sample) -> score."""
    said = {
        (f"eval/{prompt}", sample): Judged(text.format(label=label, prompt=prompt), score, 10 * (1 + sample))
        for (prompt, sample), score in scores.items()
    }
    return Policy(label, f"runs/{label}", said, ())


def asked(count: int, text: str = "what is {n}?") -> list[Prompt]:
    return [Prompt(f"eval/{n}", (Message("user", text.format(n=n)),), "", "test") for n in range(count)]


def compared(policies: Sequence[Policy], margin: float = 0.0) -> HeadToHead:
    return compare(policies, 4, 1, judge="truth", tie_margin=margin, seed=0)


def test_each_two_meet_sample_by_sample() -> None:
    a = policy("a", {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 0.0, (2, 0): 5.0, (3, 0): 1.0})
    b = policy("b", {(0, 0): 0.0, (0, 1): 3.0, (1, 0): 4.0, (2, 0): 1.0})
    (meeting,) = compared([a, b]).meetings
    one = meeting.contest
    assert (one.prompts, one.wins, one.ties, one.losses) == (3, 2, 0, 2), "a's prompt 3 has no counterpart"
    assert one.win_rate == pytest.approx((0.5 + 0 + 1) / 3)
    assert [(row.uid, row.sample) for row in meeting.won] == [("eval/2", 0), ("eval/0", 0)]
    assert [(row.uid, row.sample) for row in meeting.lost] == [("eval/1", 0), ("eval/0", 1)]
    assert (compared([a, b], 1.0).meetings[0].contest.ties, one.longer) == (2, 0)


def test_the_same_text_is_a_tie_whatever_the_judge_says() -> None:
    first, second = policy("a", {(0, 0): 1.0}, "same"), policy("b", {(0, 0): 3.0}, "same")
    (meeting,) = compared([first, second]).meetings
    assert (meeting.contest.ties, meeting.won, meeting.lost) == (1, (), ())


def test_of_three_the_best_has_the_highest_rating() -> None:
    three = [policy(label, {(n, 0): score for n in range(9)}) for label, score in (("a", 2.0), ("b", 3.0), ("c", 1.0))]
    found = compared(three)
    assert [(meeting.first, meeting.second) for meeting in found.meetings] == [("a", "b"), ("a", "c"), ("b", "c")]
    ratings = [row.rating.elo for row in found.standings if row.rating]
    assert ratings[1] > ratings[0] > ratings[2] and sum(ratings) == pytest.approx(3000)
    assert all(row.rating is None for row in compared(three[:2]).standings), "of two the win rate says all"


def test_policies_that_share_no_response_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="a and b: no prompt has a scored response of both"):
        compared([policy("a", {(0, 0): 1.0}), policy("b", {(1, 0): 1.0})])


def test_examples_are_the_largest_differences_and_few() -> None:
    a = policy("a", {(n, 0): float(n) for n in range(20)})
    b = policy("b", {(n, 0): 9.5 for n in range(20)})
    (meeting,) = compared([a, b]).meetings
    assert [row.uid for row in meeting.won] == [f"eval/{n}" for n in range(19, 19 - EXAMPLES, -1)]
    assert [row.uid for row in meeting.lost] == [f"eval/{n}" for n in range(EXAMPLES)]


def test_the_table_and_the_figures_say_the_same() -> None:
    a = policy("a", {(n, 0): 1.0 for n in range(4)})
    b = policy("b", {(n, 0): float(n) for n in range(4)})
    found = compared([a, b])
    text = as_text(lambda box: tables(found, box))
    one = found.meetings[0].contest
    assert f"{one.win_rate:.2f} [{one.low:.2f}, {one.high:.2f}]" in text and "runs/" not in text
    row = next(line for line in text.splitlines() if line.startswith("| a ") and " b " in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][2:5] == ["1", "1", "2"]
    left = Policy("a", "runs/a", a.responses, (NonFinite("eval/9", 0, {"truth": float("nan")}, "'x'"),))
    written = json.loads(json.dumps(as_json(found, [left, b], 3), allow_nan=False))
    assert written["pairs"][0]["win_rate"] == one.win_rate and written["seed"] == 3
    assert [row["left_out"] for row in written["policies"]] == [1, 0]
    assert judged_by(found) == "4 held-out prompts, a sampled response each; judged by truth"


class Tags(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [name for name, _ in attrs if name in ("src", "href", "srcset", "action", "style", "onerror")]


def test_the_page_shows_hostile_texts_as_text_and_bounds_them() -> None:
    a = policy(f"a{HOSTILE}", {(n, 0): 1.0 for n in range(9)}, HOSTILE)
    b = policy("b", {(n, 0): float(n - 4) for n in range(9)}, "x" * 1_000_000)
    page = compare_page(compared([a, b]), asked(9, HOSTILE + "{n}" + "y" * 1_000_000))
    found = Tags(page)
    assert "script" not in found.tags and "img" not in found.tags and found.links == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "\x1b" not in page and "\x00" not in page
    assert "more characters" in page and len(page) < 200_000
    assert "default-src 'none'" in page


def test_a_page_of_many_policies_stays_small() -> None:
    many = [policy(f"p{i}", {(n, 0): float((i * n) % 7) for n in range(30)}, "z" * 5000) for i in range(12)]
    page = compare_page(compared(many), asked(30))
    assert len(page) < 1_000_000 and "Examples of the first 15 pairs" in page
    assert page.count("p10</td><td>p11</td>") == 1, "all figures are there"


def test_a_row_for_each_prompt_with_all_responses() -> None:
    rows = list(answer_rows(asked(2), [policy("a", {(0, 1): 2.0, (0, 0): 1.0}), policy("b", {(1, 0): 3.0})]))
    assert [row["uid"] for row in rows] == ["eval/0", "eval/1"]
    assert [one["score"] for one in rows[0]["responses"]["a"]] == [1.0, 2.0] and rows[0]["responses"]["b"] == []
    assert rows[1]["prompt"] == [{"role": "user", "content": "what is 1?"}]


@pytest.mark.parametrize(
    ("paths", "short"),
    [
        (["runs/local/sft", "runs/local/ppo/"], ["sft", "ppo"]),
        (["runs/a", "runs/a/checkpoints/step-2"], ["a", "a/checkpoints/step-2"]),
        (["runs/a/checkpoints/step-2/hf", "runs/a/checkpoints/step-4/hf"], ["step-2", "step-4"]),
        (["Qwen/Qwen2.5-0.5B", "runs/a"], ["Qwen/Qwen2.5-0.5B", "runs/a"]),
        (["/x/a", "runs/a"], ["/x/a", "runs/a"]),
        (["tiny", "a"], ["tiny", "a"]),
    ],
)
def test_names_are_short_and_differ(paths: list[str], short: list[str]) -> None:
    assert labels(paths) == short


def test_a_finished_directory_is_nobody_elses(tmp_path: Path) -> None:
    with new_directory(str(tmp_path), "a/b") as folder:
        assert never_began(folder)
        with pytest.raises(ConfigError, match="is using this run"), new_directory(str(tmp_path), "a/b"):
            pass
        write_json(folder / "compare.json", {})
    assert sorted(path.name for path in folder.iterdir()) == ["compare.json"]
    assert not never_began(folder), "`train` would take it otherwise"
    with pytest.raises(ConfigError, match="exists, and a comparison needs a directory of its own; give another name="):
        new_directory(str(tmp_path), "a/b").__enter__()


def test_a_failed_comparison_leaves_none_and_a_killed_one_is_in_nobodys_way(tmp_path: Path) -> None:
    with pytest.raises(DataError), new_directory(str(tmp_path), "x"):
        raise DataError("no")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / LOCK_FILE).write_text("1\n")
    with new_directory(str(tmp_path), "x") as folder:
        assert folder == tmp_path / "x"
