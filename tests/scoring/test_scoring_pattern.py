import pytest

from rlhf_dist.config.schema import RewardSpec, ScoringConfig
from rlhf_dist.errors import ConfigError, RewardError
from rlhf_dist.scoring.pattern import PatternReward
from rlhf_dist.scoring.scorer import preflight

ENDLESS = r"(.|\s|[^\d])*</answer>"


def pattern(text: str, timeout_s: float = 30.0) -> PatternReward:
    return PatternReward("form", RewardSpec(kind="regex", pattern=text, timeout_s=timeout_s))


def test_the_whole_response_is_matched():
    reward = pattern(r"<think>.*</think>\d+")
    responses = ["<think>a\nb</think>12", "<think></think>", "x<think></think>1", "\ud800 <think>é</think>1"]
    assert reward(responses).tolist() == [1, 0, 0, 0]
    reward.close()


def test_a_pattern_that_backtracks_without_end_is_given_up_by_name():
    reward = pattern(ENDLESS, timeout_s=0.3)
    with pytest.raises(RewardError) as raised:
        reward(["<b></answer>", "a" * 60])
    for words in (
        r"the reward form (pattern '(.|\s|[^\d])*</answer>') did not finish within 0.3 s, at the response 'aaaa",
        "raise scoring.rewards.form.timeout_s",
    ):
        assert words in str(raised.value)
    assert reward(["<b></answer>"]).tolist() == [1]  # in another process
    reward.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"scoring\.rewards\.form\.pattern is empty"),
        ("(", r"scoring\.rewards\.form\.pattern='\(' is not a Python pattern: .* at position 0"),
        ("a{99999999999}", "the repetition number is too large"),
        ("(" * 5000 + ")" * 5000, "it is nested too deeply"),
        (r"\p{L}+", r"bad escape \\p at position 0"),
        ("(?<a>b)", "at position"),
    ],
)
def test_patterns_that_do_not_compile_are_rejected_before_the_start(text, words):
    with pytest.raises(ConfigError, match=words):
        preflight(ScoringConfig(rewards={"form": RewardSpec(kind="regex", pattern=text)}))
