import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from judges import make_texts
from sample_groups import group_of, two_turns

from rlhf_dist.config.schema import RewardSpec, ScoringConfig
from rlhf_dist.data.describe import gold
from rlhf_dist.errors import ConfigError, DataError, InputError, ModelError, RewardError
from rlhf_dist.scoring import function as functions
from rlhf_dist.scoring.function import FunctionReward
from rlhf_dist.scoring.scorer import Scorer, preflight
from rlhf_dist.scoring.texts import texts_of
from rlhf_dist.types import Group, Message, Prompt

MODULE = """
import time
from collections import Counter

def length(prompts, responses, answers):
    return [len(r) for r in responses]

def echo(prompts, responses, answers):
    return [float(p == "hi" and a == "ba") for p, a in zip(prompts, answers)]

def array(prompts, responses, answers):
    import numpy
    return numpy.arange(len(responses), dtype="float64")

def generator(prompts, responses, answers):
    responses.clear()
    return (True for _ in answers)

def raises(prompts, responses, answers):
    return helper(responses)

def helper(responses):
    raise KeyError("missing")  # line 23

def deep(prompts, responses, answers):
    return sum(Counter(0))  # line 26

def leaves(prompts, responses, answers):
    raise SystemExit(3)

def few(prompts, responses, answers):
    return [1.0]

def nothing(prompts, responses, answers):
    pass

def text(prompts, responses, answers):
    return ["1.0"] * len(responses)

def nan(prompts, responses, answers):
    return [0.0, float("nan")]

def huge(prompts, responses, answers):
    return [1e300, 0.0]

def matrix(prompts, responses, answers):
    import numpy
    return numpy.ones((len(responses), 2))

def sleeps(prompts, responses, answers):
    time.sleep(30)

def slow_generator(prompts, responses, answers):
    for _ in responses:
        time.sleep(30)
        yield 1.0

def two(prompts, responses):
    return [0.0] * len(responses)

number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with modules of the user's, as the command would find it."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("import math\nvalue = 1 / 0\n")
    (tmp_path / "my_typo.py").write_text("def f(:\n")
    (tmp_path / "my_needs.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "my_exit.py").write_text("raise SystemExit(1)\n")
    (tmp_path / "my_hang.py").write_text("import threading\nthreading.Event().wait(60)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("my_")]:
        del sys.modules[name]


def spec(function: str, **options) -> RewardSpec:
    return RewardSpec(kind="function", function=f"my_rewards:{function}", **options)


def call(function: str, **options) -> list[float]:
    reward = FunctionReward("mine", spec(function, **options))
    values = reward(["hi", "hi"], ["ab", "z" * 200], ["ba", "ba"])
    assert values.dtype == np.float32
    return values.tolist()


def rollout(texts: tuple[str, ...], answer: str = "ba", special: Sequence[str] = ()) -> Group:
    prompt = Prompt("0/3", (Message("system", "s"), Message("user", "hi")), answer, "reverse")
    n = len(texts)
    return group_of([0, 0], [0] * n, [1] * n, prompt=prompt, texts=texts, special=special)


def test_of_two_turns_the_last_is_scored_behind_what_was_said_before():
    prompt = rollout(("a",)).prompt
    texts = texts_of(two_turns(prompt))
    assert (texts.prompts, texts.responses, texts.answers, texts.ended) == (("hi",), ("last",), ("ba",), (True,))
    said = (Message("assistant", "first"), Message("user", "what it read"))
    assert texts.conversations == (prompt.messages + said,)


def test_special_tokens_are_shown_to_the_rewards_that_ask_for_them():
    pattern = "<think>.*</think>b"
    plain, kept = (RewardSpec(kind="regex", pattern=pattern, keep_special_tokens=keep) for keep in (False, True))
    with closing(Scorer(ScoringConfig({"plain": plain, "kept": kept}))) as scorer:
        group = rollout(("ab", "b"), special=("<think>a</think>b", "b"))
        found = scorer.score(group)
        assert {name: values.tolist() for name, values in found.components.items()} == {
            "plain": [0, 0],
            "kept": [1, 0],
        }
        sent = replace(texts_of(group), responses=("<think>a</think>b", "b"))
        assert all(values.tolist() == [1, 0] for values in scorer.score_texts(sent).components.values())


def test_functions_are_called_in_batch(here):
    assert call("length") == [2, 200]
    assert call("echo") == [1, 1]
    assert call("array") == [0, 1]
    assert call("generator") == [1, 1]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", r"the reward mine \(my_rewards:raises\) raised KeyError: 'missing' at .*my_rewards\.py:23"),
        ("deep", r"raised TypeError: .* at .*my_rewards\.py:26"),
        ("leaves", "raised SystemExit: 3 at .*my_rewards"),
        ("few", "returned 1 values for 2 responses"),
        ("nothing", r"returned None \(NoneType\); it has to return a list of 2 numbers"),
        ("text", r"returned '1\.0', not a number \(str\), for response 0: 'ab'"),
        ("matrix", "not a number"),
    ],
)
def test_misbehaving_functions_are_named(here, function, words):
    with pytest.raises(RewardError, match=words):
        call(function)


@pytest.mark.parametrize("function", ["sleeps", "slow_generator"])
def test_a_function_that_never_returns_is_given_up(here, function):
    with pytest.raises(RewardError, match=rf"my_rewards:{function}\) did not return within 0\.2 s for 2 responses"):
        call(function, timeout_s=0.2)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("my_rewards", "has to look like package.module:function"),
        ("my_rewards:", "has to look like package.module:function"),
        ("no_such_module_xyz:f", "no module named 'no_such_module_xyz'"),
        ("my_needs:f", "no module named 'not_installed_anywhere'"),
        ("my_broken:f", r"importing my_broken raised ZeroDivisionError: .* at .*my_broken\.py:2"),
        ("my_typo:f", r"importing my_typo raised SyntaxError: .* at .*my_typo\.py:1"),
        ("my_exit:f", "importing my_exit raised SystemExit: 1"),
        ("my_rewards:lenght", r"my_rewards\.py has no function 'lenght'; it has length, echo"),
        ("my_rewards:number", "has no function 'number'"),
        ("my_rewards:two", r"is two\(prompts, responses\); it is called with \(prompts, responses, answers\)"),
    ],
)
def test_functions_that_cannot_be_used_are_told_before_the_start(here, function, words):
    config = ScoringConfig(rewards={"mine": RewardSpec(kind="function", function=function)})
    with pytest.raises(ConfigError, match=words) as raised:
        preflight(config)
    assert str(raised.value).startswith("scoring.rewards.mine.function=")
    assert isinstance(raised.value, InputError)


def test_the_total_is_the_weighted_sum_and_each_component_is_kept(here):
    config = ScoringConfig(
        rewards={
            "right": RewardSpec(kind="exact", weight=2.0),
            "form": RewardSpec(kind="regex", pattern="[a-z]+", weight=0.5),
            "short": spec("length", weight=-0.25),
        }
    )
    preflight(config)
    scores = Scorer(config).score(rollout(("ba", "AB", "abc")))
    assert {name: values.tolist() for name, values in scores.components.items()} == {
        "right": [1, 0, 0],
        "form": [1, 0, 1],
        "short": [2, 2, 3],
    }
    assert scores.total.dtype == np.float32
    assert scores.total.tolist() == [2.0, -0.5, -0.25]


def test_functions_see_the_last_user_turn_and_the_answer(here):
    scores = Scorer(ScoringConfig(rewards={"echo": spec("echo")})).score(rollout(("x", "y")))
    assert scores.total.tolist() == [1, 1]


def test_an_answer_is_needed_to_compare():
    scorer = Scorer(ScoringConfig(rewards={"right": RewardSpec(kind="exact")}))
    with pytest.raises(
        RewardError, match=r"the reward right compares with an answer and prompt 0/3 of reverse has none"
    ):
        scorer.score(rollout(("",), answer=""))
    number = Scorer(ScoringConfig(rewards={"n": RewardSpec(kind="number")}))
    assert number.score(rollout(("it is 4.0", "5"), answer="4")).total.tolist() == [1, 0]


def test_bad_patterns_and_no_rewards_are_refused():
    def check(words, rewards):
        with pytest.raises(ConfigError, match=words):
            preflight(ScoringConfig(rewards=rewards))

    check(
        r"scoring\.rewards\.form\.pattern='\(' is not a Python pattern", {"form": RewardSpec(kind="regex", pattern="(")}
    )
    check(r"scoring\.rewards\.form\.pattern is empty", {"form": RewardSpec(kind="regex")})
    check("scoring.rewards is empty", {})


def test_an_import_that_hangs_is_given_up(here, monkeypatch):
    monkeypatch.setattr(functions, "IMPORT_LIMIT_S", 0.2)
    with pytest.raises(ConfigError, match=r"mine\.function=my_hang:f: importing my_hang took longer than 0\.2 s"):
        preflight(ScoringConfig(rewards={"mine": RewardSpec(kind="function", function="my_hang:f")}))


def test_one_call_at_a_time_reaches_a_function(here):
    (here / "my_single.py").write_text(
        "import threading\nbusy = threading.Lock()\n"
        "def f(prompts, responses, answers):\n"
        "    assert busy.acquire(blocking=False)\n"
        "    threading.Event().wait(0.002)\n"
        "    busy.release()\n"
        "    return [len(r) for r in responses]\n"
    )
    reward = FunctionReward("mine", RewardSpec(kind="function", function="my_single:f", timeout_s=20))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: reward(["p"], ["x" * n], ["a"]).tolist(), range(20)))
    assert found == [[float(n)] for n in range(20)]


class Judge:
    """A reward model that counts."""

    def __init__(self):
        self.closed = threading.Event()

    def score(self, group):
        return np.array([sample.length for sample in group.trajectories], np.float32)

    def score_texts(self, texts):
        return np.array([-len(response) for response in texts.responses], np.float32)

    def close(self):
        self.closed.set()


def test_any_mix_has_a_component_each_and_models_read_the_tokens():
    judge, asked = Judge(), []
    config = ScoringConfig(
        rewards={
            "right": RewardSpec(kind="exact"),
            "judge": RewardSpec(kind="model", path="somewhere", weight=3.0),
            "truth": RewardSpec(kind="gold", weight=0.0),
        },
        gold="truth",
    )

    def make(name, spec):
        asked.append((name, spec.path))
        return judge

    scorer = Scorer(config, make)
    scores = scorer.score(rollout(("ba", "AB c")))
    truth = gold(["hi", "hi"], ["ba", "AB c"])
    assert asked == [("judge", "somewhere")] and list(scores.components) == ["right", "judge", "truth"]
    np.testing.assert_array_equal(scores.components["judge"], [1, 1])
    np.testing.assert_array_equal(scores.components["truth"], truth)
    assert scores.total.tolist() == [4, 3]
    assert scores.distinct.tolist() == [1, 1] and len(set(scores.hashes.tolist())) == 2
    assert scorer.score_texts(make_texts(["ba", "x"], ["ba", "y"])).total.tolist() == [-5, -3]
    scorer.close()
    assert judge.closed.is_set()


def test_models_are_looked_at_and_not_made_before_the_start():
    def refuse(name, spec):
        raise ModelError(f"{name} is no good")

    config = ScoringConfig(rewards={"judge": RewardSpec(kind="model", path="x")})
    with pytest.raises(ModelError, match="judge is no good"):
        preflight(config, refuse)
    preflight(config, lambda name, spec: None)


def test_text_without_its_answer_is_refused():
    scorer = Scorer(ScoringConfig(rewards={"right": RewardSpec(kind="exact")}))
    with pytest.raises(DataError, match="the reward right compares with an answer, and response 1 has an empty one"):
        scorer.score_texts(make_texts(["a", "b"], ["a", ""]))


def test_a_sum_beyond_float32_is_told(here):
    config = ScoringConfig(
        rewards={"long": spec("length", weight=1e38), "short": RewardSpec(kind="regex", pattern="x")}
    )
    with pytest.raises(RewardError, match=r"the weighted sum of long, short is 5e\+38 for a response, beyond float32"):
        Scorer(config).score(rollout(("xxxxx",)))
