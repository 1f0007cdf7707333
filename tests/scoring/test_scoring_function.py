"""A user's function in a process of its own: whatever it does, the message names it and the run does not hang."""

import os
import time
from contextlib import nullcontext

import pytest

from rlhf_dist.config.schema import RewardSpec, ScoringConfig
from rlhf_dist.errors import ConfigError, RewardError
from rlhf_dist.scoring import function as functions
from rlhf_dist.scoring.function import FunctionReward
from rlhf_dist.scoring.scorer import preflight
from rlhf_dist.scoring.time_limits import Limit

MODULE = """
import asyncio, functools, os, re, signal, stat

def catastrophic(prompts, responses, answers):
    return [float(bool(re.match("(a+)+$", "a" * 40 + "b"))) for _ in responses]

def alarmed(prompts, responses, answers):
    def stop(*_):
        raise TimeoutError("too slow")
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        while True:
            pass
    except TimeoutError:
        return [0.5 for _ in responses]

async def awaits(prompts, responses, answers):
    await asyncio.sleep(0)
    return [1.0 for _ in responses]

async def yields(prompts, responses, answers):
    for _ in responses:
        yield 2.0

class Judge:
    def __init__(self, prompts=None, responses=None, answers=None):
        self.calls = 0
    def __call__(self, prompts, responses, answers):
        self.calls += 1
        return [self.calls for _ in responses]
    async def later(self, prompts, responses, answers):
        return [3.0 for _ in responses]

judge = Judge()
later = judge.later
shorter = lambda prompts, responses, answers: [-len(r) for r in responses]

def with_scale(scale, prompts, responses, answers):
    return [scale for _ in responses]

part = functools.partial(with_scale, 4.0)
biggest = max

def leaves(prompts, responses, answers):
    os._exit(7)

def crashes(prompts, responses, answers):
    os.kill(os.getpid(), signal.SIGSEGV)

def bag(prompts, responses, answers):
    return {i: 1.0 for i in range(len(responses))}

def texts(prompts, responses, answers):
    return "12"

def swapped(responses, prompts, answers):
    return [0.0] * len(responses)

def named_only(prompts, *, responses, answers):
    return [0.0] * len(responses)

def process(prompts, responses, answers):
    return [os.getpid() for _ in responses]

def writes(prompts, responses, answers):
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                os.write(number, bytes.fromhex(answers[0]))
        except OSError:
            pass
    return [1.0 for _ in responses]
"""

IMPORTS = {
    "my_alarm": ("import signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\nsignal.alarm(1)\n", ""),
    "my_thread": (
        "import threading\n\ndef f():\n    raise KeyError('deep')\n\nimport my_helper\nmy_helper.call(f)\n",
        r"importing my_thread raised KeyError: 'deep' at .*my_thread\.py:4",
    ),
    "my_json": ("import json\n\njson.loads('{')\n", r"raised JSONDecodeError: .* at .*my_json\.py:3"),
    "my_import": ("from math import nothing\n", r"raised ImportError: cannot import name .* at .*my_import\.py:1"),
    "my_needs": (
        "import json\nimport not_there\n",
        r"no module named 'not_there'; .*imported at .*my_needs\.py:2",
    ),
    "my_exit": ("import os\nos._exit(3)\n", r"importing my_exit ended the process \(exit code 3\)"),
    "my_loop": ("import re\nre.match('(a+)+$', 'a' * 40 + 'b')\n", r"importing my_loop took longer than 0\.5 s"),
    "my_tab": ("def f(a):\n\treturn a\n        return 2\n", r"raised TabError: .* at .*my_tab\.py:3"),
    "my_null": ("x = '\0'\n", "raised (SyntaxError|ValueError): .*null bytes"),
}
"""Module -> its text, words of the message (empty: it can be imported)."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "my_helper.py").write_text("def call(f):\n    f()\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reward(function: str, timeout_s: float = 30.0) -> FunctionReward:
    return FunctionReward("mine", RewardSpec(kind="function", function=function, timeout_s=timeout_s))


def call(function: str, timeout_s: float = 30.0) -> list[float]:
    made = reward(f"my_rewards:{function}", timeout_s)
    try:
        return made(["p", "p"], ["a", "bc"], ["", ""]).tolist()
    finally:
        made.close()


@pytest.mark.parametrize(
    ("function", "values"),
    [
        ("alarmed", [0.5, 0.5]),
        ("awaits", [1, 1]),
        ("yields", [2, 2]),
        ("judge", [1, 1]),
        ("later", [3, 3]),
        ("shorter", [-1, -2]),
        ("part", [4, 4]),
    ],
)
def test_whatever_can_be_called_is_a_reward(here, function, values):
    assert call(function) == values


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("catastrophic", r"my_rewards:catastrophic\) did not return within 0\.3 s for 2 responses; .*mine\.timeout_s"),
        ("leaves", r"ended its process \(exit code 7\) in a call for 2 responses"),
        ("crashes", r"ended its process \(signal SIGSEGV\)"),
        ("bag", r"returned \{0: 1\.0, 1: 1\.0\} \(dict\); it has to return a list of 2 numbers"),
        ("texts", r"returned '12' \(str\)"),
    ],
)
def test_a_call_that_cannot_be_used_names_the_reward(here, function, words):
    with pytest.raises(RewardError, match=words):
        call(function, 0.3 if function == "catastrophic" else 30.0)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("Judge", "Judge is a class; name a function, or an object of the class that can be called"),
        ("biggest", "biggest does not say which arguments it takes"),
        ("swapped", r"is swapped\(responses, prompts, answers\); .* in this order"),
        ("named_only", r"is named_only\(prompts, \*, responses, answers\); it is called with"),
        ("shorte", "has no function 'shorte'; .*; did you mean shorter"),
    ],
)
def test_what_cannot_be_called_is_rejected_before_the_start(here, function, words):
    with pytest.raises(ConfigError, match=words):
        reward(f"my_rewards:{function}")
    with pytest.raises(ConfigError, match=r"no module named 'my_reward'; .*; did you mean my_rewards"):
        reward(f"my_reward:{function}")


@pytest.mark.parametrize(("module", "text", "words"), [(name, *row) for name, row in IMPORTS.items()])
def test_an_import_that_fails_names_the_users_line(here, module, text, words, monkeypatch):
    (here / f"{module}.py").write_text(f"{text}\ndef f(prompts, responses, answers):\n    return [1.0]\n")
    config = ScoringConfig(rewards={"mine": RewardSpec(kind="function", function=f"{module}:f")})
    monkeypatch.setattr(functions, "IMPORT_LIMIT_S", 0.5 if module == "my_loop" else 30.0)
    with pytest.raises(ConfigError, match=words) if words else nullcontext():
        preflight(config)


def test_the_process_is_kept_between_calls_and_ends_with_the_reward(here):
    made = reward("my_rewards:process")
    (first,), (second,) = (made(["p"], ["r"], [""]).tolist() for _ in range(2))
    assert first == second != os.getpid()
    made.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)


def test_the_limit_of_the_group_holds_and_is_named(here):
    made = reward("my_rewards:catastrophic")
    with pytest.raises(RewardError, match=r"did not return within 0\.27 s .* or raise scoring\.timeout_s"):
        made(["p"], ["r"], [""], Limit.of_group(0.3))
    busy = (
        r"^the reward mine .* was busy with another group for 0\.1 s; .* raise scoring\.timeout_s or scoring\.replicas"
    )
    with made._turn.take(None, "the test"), pytest.raises(RewardError, match=busy):
        made(["p"], ["r"], [""], Limit(time.monotonic() + 0.1, 0.1, "scoring.timeout_s"))


def message(body: str) -> str:
    return (len(body).to_bytes(8, "big") + body.encode()).hex()


@pytest.mark.parametrize(
    "written",
    [
        "ff" * 8,
        ((1 << 30).to_bytes(8, "big") + b"x").hex(),
        *map(message, ["{", "[" * 100_000, "7", "{}", '{"values": [1.0]}', '{"values": ["1", 2.0]}', '{"raised": 7}']),
        *map(message, ['{"values": [1e400, 9' + "9" * 400 + "]}", '{"values": [1.0, 2.0], "more": 1}']),
    ],
)
def test_what_a_function_writes_to_the_run_is_no_answer(here, written):
    made = reward("my_rewards:writes", 5.0)
    try:
        with pytest.raises(RewardError, match=r"wrote something else than an answer to the run"):
            made(["p", "p"], ["a", "bc"], [written, ""])
        assert made(["p"], ["a"], [""]).tolist() == [1.0]
    finally:
        made.close()
